"""`InstructBlipForConditionalGeneration`: a BLIP-2 whose Q-Former reads the instruction beside the picture."""

from __future__ import annotations

from typing import Any

import numpy as np

from blip2c.config import Blip2Config, InstructBlipConfig
from blip2c.forward import PackedTexts
from blip2c.inputs import check_ids, check_mask
from blip2c.modeling import Blip2ForConditionalGeneration


class InstructBlipForConditionalGeneration(Blip2ForConditionalGeneration):
    """InstructBLIP over Flan-T5 or Vicuna (upstream: transformers' class of the same name).

    Everything is as in Blip2ForConditionalGeneration, and pictures come with qformer_input_ids [B, N], the instruction
    in the Q-Former's own vocabulary (InstructBlipProcessor makes both), and qformer_attention_mask [B, N].
    """

    config_class: type[Blip2Config] = InstructBlipConfig
    _qformer_stays_float32 = False

    def forward(  # type: ignore[override] # arguments in upstream's order
        self,
        pixel_values: Any,
        qformer_input_ids: Any = None,
        qformer_attention_mask: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        interpolate_pos_encoding: bool | None = False,
        mm_encoder_outputs: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """As Blip2ForConditionalGeneration.forward(). qformer_outputs hold the queries' states, then the text's."""
        options["qformer_input_ids"], options["qformer_attention_mask"] = qformer_input_ids, qformer_attention_mask
        return super().forward(
            pixel_values,
            input_ids,
            attention_mask,
            decoder_input_ids,
            decoder_attention_mask,
            inputs_embeds,
            labels,
            interpolate_pos_encoding,
            mm_encoder_outputs,
            return_dict,
            **options,
        )

    def get_image_features(  # type: ignore[override] # arguments in upstream's order
        self,
        pixel_values: Any,
        qformer_input_ids: Any = None,
        qformer_attention_mask: Any = None,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """The projected queries, after they read picture and instruction, as pooler_output [B, Q, D_lm]."""
        options["qformer_input_ids"], options["qformer_attention_mask"] = qformer_input_ids, qformer_attention_mask
        return super().get_image_features(pixel_values, interpolate_pos_encoding, return_dict, **options)

    def generate(  # type: ignore[override] # arguments in upstream's order
        self,
        pixel_values: Any = None,
        qformer_input_ids: Any = None,
        qformer_attention_mask: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        interpolate_pos_encoding: bool | None = False,
        mm_encoder_outputs: Any = None,
        **generate_kwargs: Any,
    ) -> Any:
        """As Blip2ForConditionalGeneration.generate()."""
        generate_kwargs["qformer_input_ids"] = qformer_input_ids
        generate_kwargs["qformer_attention_mask"] = qformer_attention_mask
        return super().generate(
            pixel_values,
            input_ids,
            attention_mask,
            inputs_embeds,
            interpolate_pos_encoding,
            mm_encoder_outputs,
            **generate_kwargs,
        )

    def _texts(self, options: dict[str, Any]) -> PackedTexts | None:
        ids, mask = options.pop("qformer_input_ids", None), options.pop("qformer_attention_mask", None)
        if ids is None:
            if mask is not None:
                raise ValueError("qformer_attention_mask was given without qformer_input_ids")
            return None
        qformer = self._core_config["qformer"]
        checked = check_ids(ids, int(qformer["vocab_size"]), "qformer_input_ids")
        if checked.shape[1] > int(qformer["max_position_embeddings"]):
            raise ValueError(
                f"qformer_input_ids: {checked.shape[1]} tokens, the Q-Former has positions for"
                f" {qformer['max_position_embeddings']}"
            )
        shown = None
        if mask is not None:
            # All zeros are fine here: the queries see themselves.
            shown = check_mask(mask, checked.shape, "qformer_attention_mask", "qformer_input_ids", empty=True)
        offsets = np.arange(len(checked) + 1, dtype=np.int64) * checked.shape[1]
        kept = None if shown is None or shown.all() else np.ascontiguousarray(shown.reshape(-1))
        return checked.astype(np.int32).reshape(-1), offsets, kept
