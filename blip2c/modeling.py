"""`Blip2ForConditionalGeneration`: the transformers spelling over the C engine. Change the import, keep the script.

NumPy in, NumPy out; torch in, torch out. torch is only touched when a tensor was handed over. What is not computed here
raises UnsupportedError naming the option; no option is silently dropped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c.generation import core_options
from blip2c.inputs import (
    DecoderRows,
    PackedRows,
    begin_decoder,
    check_ids,
    check_mask,
    check_pixels,
    check_positions,
    decoder_rows,
    pack,
)
from blip2c.outputs import Like, ModelOutput
from blip2c.pretrained import Blip2PreTrainedModel, refuse_options

NO_POSITIONS = 2**31 - 1
FORWARD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "decoder_input_ids": (None,),
    "decoder_attention_mask": (None,),
    "inputs_embeds": (None,),
    "labels": (None,),
    "interpolate_pos_encoding": (None, False),
    "mm_encoder_outputs": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True, False),
    "logits_to_keep": (None, 0),
    "past_key_values": (None,),
    "position_ids": (None,),
}


class Blip2ForConditionalGeneration(Blip2PreTrainedModel):
    """BLIP-2 that writes text about pictures (upstream: transformers' class of the same name).

    Made by `from_pretrained`. Weights are immutable and may be shared by threads. `generation_config` is what the
    folder's generation_config.json says; as in transformers 5.23 it has no effect on generate(), which takes its
    defaults from `language_model.generation_config` (made from text_config).
    """

    # -- computing -----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See forward()."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        pixel_values: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """logits [B, T, V] of every position, with vision_outputs, qformer_outputs and language_model_outputs.

        pixel_values [B, 3, S, S]; input_ids [B, T] with num_query_tokens image tokens a row (without an image token in
        the config the queries go in front, and T grows by them); attention_mask [B, T]. NumPy results are float32;
        tensors have the model's dtype. return_dict=False gives a tuple. Raises as generate() does.

        Encoder-decoders (T5): input_ids go to the encoder; decoder_input_ids [B, Td] (with decoder_attention_mask) must
        be given, and logits [B, Td, V] are of these.
        """
        decoder_ids, decoder_mask = None, None
        if self.config.is_encoder_decoder:
            decoder_ids, decoder_mask = (
                options.pop("decoder_input_ids", None),
                options.pop("decoder_attention_mask", None),
            )
        refuse_options("forward", options, FORWARD_OPTIONS)
        pixels = self._pixels(pixel_values)
        if input_ids is None:
            raise ValueError("input_ids must be given: forward() gives logits for them")
        rows = self._rows(input_ids, attention_mask, pixels.shape[0])
        check_positions(rows, self._positions)
        decoder: dict[str, Any] = {}
        if self.config.is_encoder_decoder:
            if decoder_ids is None:
                raise ValueError("decoder_input_ids must be given: forward() gives logits for them")
            decoder = decoder_arguments(decoder_rows(decoder_ids, decoder_mask, pixels.shape[0], self._vocabulary))
        stages = self._core.encode_stages(pixels)
        out = self._core.forward(stages["image_features"], rows.ids, rows.offsets, rows.mask, **decoder)
        like = Like(pixel_values, self._dtype)
        logits = like.floats(out["logits"].reshape(pixels.shape[0], -1, out["logits"].shape[-1]))
        vision, qformer = self._stage_outputs(stages, like)
        result = ModelOutput(
            loss=None,
            logits=logits,
            vision_outputs=vision,
            qformer_outputs=qformer,
            language_model_outputs=ModelOutput(
                logits=logits, past_key_values=None, hidden_states=None, attentions=None
            ),
        )
        return result if return_dict is None or return_dict else result.to_tuple()

    def get_image_features(
        self,
        pixel_values: Any,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """The projected queries as pooler_output [B, Q, D_lm]; last_hidden_state [B, T, Dv] is the vision model's.

        Beside them vision_outputs and qformer_outputs, as transformers 5.23 returns it.
        """
        options["interpolate_pos_encoding"] = interpolate_pos_encoding
        refuse_options("get_image_features", options, FORWARD_OPTIONS)
        like = Like(pixel_values, self._dtype)
        stages = self._core.encode_stages(self._pixels(pixel_values))
        vision, qformer = self._stage_outputs(stages, like)
        result = ModelOutput(
            last_hidden_state=vision.last_hidden_state,
            pooler_output=like.floats(stages["image_features"]),
            hidden_states=None,
            attentions=None,
            vision_outputs=vision,
            qformer_outputs=qformer,
        )
        return result if return_dict is None or return_dict else result.to_tuple()

    def generate(
        self,
        pixel_values: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs: Any,
    ) -> Any:
        """Ids [B * num_return_sequences, T + new] int64: the prompt with its image tokens, then what was generated.

        Of encoder-decoders (T5) the decoder's ids: decoder_start_token_id, or decoder_input_ids where they are given
        (with decoder_attention_mask), then what was generated; it is these that lengths count and penalties see.
        Without input_ids the prompt is the image tokens and bos. Options: see `blip2c.generation.GenerationConfig`.
        Rows that end early are filled with the pad id. In checkpoints without an image token the result has no ids for
        the picture, but max_length counts it.

        Raises ValueError for inputs that do not fit (placeholders, sizes, masks, ids, positions), NumericError for
        pixels that are not finite, UnsupportedError for options that are not computed here.
        """
        refuse_options(
            "generate",
            {"inputs_embeds": inputs_embeds, "interpolate_pos_encoding": interpolate_pos_encoding},
            FORWARD_OPTIONS,
        )
        pixels = self._pixels(pixel_values)
        ids = self._start_ids(pixels.shape[0]) if input_ids is None else self._ids(input_ids)
        rows = self._rows(ids, attention_mask, pixels.shape[0])
        length, prompts, rule_ids = int(rows.offsets[1]), ids, rows.rule_ids
        decoder: dict[str, Any] = {}
        if self.config.is_encoder_decoder:
            begun = self._begin_decoder(generate_kwargs, pixels.shape[0])
            length, prompts, rule_ids = begun.shown.shape[1], begun.shown, begun.ids
            decoder = decoder_arguments(begun)
        options = self._options(generate_kwargs, [length])
        check_positions(rows, self._positions, new_tokens(options, length))
        features = self._core.encode(pixels)
        out = self._core.generate(features, rows.ids, rows.offsets, rows.mask, rule_ids, options, **decoder)
        prompts = np.repeat(prompts, out["ids"].shape[0] // prompts.shape[0], axis=0)
        sequences = np.concatenate([prompts, np.asarray(out["ids"], np.int64)], axis=1)
        return Like(pixel_values, self._dtype).ids(sequences)

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _positions(self) -> int:
        """How many tokens a sequence may have: learned positions end, rotary and relative ones do not."""
        return int(self._core_config["text"].get("max_position_embeddings", NO_POSITIONS))

    @property
    def _vocabulary(self) -> int:
        return int(self._core_config["text"]["vocab_size"])

    def _begin_decoder(self, generate_kwargs: dict[str, Any], rows: int) -> DecoderRows:
        """The decoder's rows before the first new token; takes what says so out of generate()'s arguments."""
        ids, mask = generate_kwargs.pop("decoder_input_ids", None), generate_kwargs.pop("decoder_attention_mask", None)
        given = generate_kwargs.get("generation_config")
        for name in ("decoder_start_token_id", "bos_token_id"):
            for value in (
                generate_kwargs.get(name),
                getattr(given, name, None),
                getattr(self.language_model.generation_config, name, None),
            ):
                if value is not None:
                    return begin_decoder(ids, mask, value, rows, self._vocabulary)
        raise ValueError("decoder_start_token_id or bos_token_id must be given: the text config has neither")

    @property
    def _image_token(self) -> int | None:
        # As it is now: scripts that bring old checkpoints up to date set it after loading.
        token = self.config.image_token_index
        vocabulary = self._vocabulary
        if token is None:
            return None
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocabulary:
            raise ValueError(f"config.image_token_index must be None or in 0..{vocabulary - 1}, found {token!r}")
        return int(token)

    def _pixels(self, value: Any) -> NDArray[np.float32]:
        return check_pixels(value, int(self._core_config["vision"]["image_size"]))

    def _ids(self, value: Any) -> NDArray[np.int64]:
        return check_ids(value, self._vocabulary)

    def _rows(self, input_ids: Any, attention_mask: Any, pictures: int) -> PackedRows:
        ids = self._ids(input_ids)
        mask = None if attention_mask is None else check_mask(attention_mask, ids.shape)
        return pack(ids, mask, self._image_token, int(self._core_config["num_query_tokens"]), pictures)

    def _start_ids(self, batch: int) -> NDArray[np.int64]:
        bos = self.config.text_config.bos_token_id
        if bos is None:
            raise ValueError("input_ids must be given: the text config has no bos_token_id to start with")
        image = [] if self._image_token is None else [self._image_token] * int(self._core_config["num_query_tokens"])
        return np.tile(np.array([[*image, bos]], np.int64), (batch, 1))

    def _options(self, generate_kwargs: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        """generate()'s options as the C part takes them, over the language model's defaults; lengths of prompts."""
        return core_options(
            self.language_model.generation_config,
            generate_kwargs,
            lengths,
            max_positions=self.config.text_config.get("max_position_embeddings"),
        )

    @staticmethod
    def _stage_outputs(stages: Mapping[str, Any], like: Like) -> tuple[ModelOutput, ModelOutput]:
        vision = ModelOutput(
            last_hidden_state=like.floats(stages["vision"]),
            pooler_output=like.floats(stages["pooled"]),
            hidden_states=None,
            attentions=None,
        )
        # transformers keeps the Q-Former in float32 under float16.
        queries = like.floats(stages["qformer"], keep=like.dtype == "float16")
        qformer = ModelOutput(
            last_hidden_state=queries,
            pooler_output=queries[:, 0, :],
            hidden_states=None,
            past_key_values=None,
            attentions=None,
            cross_attentions=None,
        )
        return vision, qformer


def decoder_arguments(rows: DecoderRows) -> dict[str, Any]:
    """As the C part takes them."""
    return {"decoder_ids": rows.ids, "decoder_offsets": rows.offsets, "decoder_mask": rows.mask}


def new_tokens(options: Mapping[str, Any], length: int) -> int:
    """By how many tokens a row of `length` may grow under options of core_options()."""
    bounds = [options["max_new_tokens"], None if options["max_length"] is None else options["max_length"] - length]
    return max(min(int(bound) for bound in bounds if bound is not None), 0)
