"""The models that compare pictures and texts: `Blip2ForImageTextRetrieval` and its halves, and the Q-Former alone.

All of them come from one checkpoint (Salesforce/blip2-itm-vit-g and its like) and read from it what they need. Source:
BLIP-2 paper, section 3.2; transformers' classes of the same names, whose outputs these are.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from blip2c._core import UnsupportedError
from blip2c.config import MAX_VOCABULARY, retrieval_core
from blip2c.forward import Blip2WithQFormer, PackedTexts, Wishes, join_text, qformer_output, vision_output
from blip2c.inputs import check_ids, check_mask, to_numpy
from blip2c.outputs import Like, ModelOutput
from blip2c.parts import QFormer
from blip2c.pretrained import refuse_options

# Beginnings of all names in BLIP-2 checkpoints.
PARTS = (
    "vision_model.", "query_tokens", "embeddings.", "qformer.", "vision_projection.", "text_projection.", "itm_head.",
    "language_projection.", "language_model.",
)  # fmt: skip
_NOTHING = Wishes(False, False)


class Blip2Retrieval(Blip2WithQFormer):
    """What the models without a language model share."""

    _speaks = False
    _leaves_out = PARTS
    _reads: ClassVar[dict[str, bool]] = {"vision": True, "text": True, "match": True}

    @classmethod
    def _core_of(cls, config: Any) -> dict[str, Any]:
        return retrieval_core(config, **cls._reads)

    @property
    def _image_token_bound(self) -> int:
        return MAX_VOCABULARY

    def _states(self, arrays: dict[str, Any], like: Like, wishes: Wishes) -> ModelOutput:
        """The Q-Former's output, which stays float32 under float16."""
        return qformer_output(arrays, like, wishes, self._qformer_stays_float32)

    def _packed(self, ids: NDArray[np.int64], mask: NDArray[np.uint8] | None) -> PackedTexts:
        """ids [B, T] and mask [B, T] as the C part takes them."""
        limit = int(self._core_config["qformer"]["max_position_embeddings"])
        if ids.shape[1] > limit:
            raise ValueError(f"input_ids: {ids.shape[1]} tokens, the Q-Former has positions for {limit}")
        offsets = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
        seen = None if mask is None or mask.all() else np.ascontiguousarray(mask.reshape(-1))
        return ids.astype(np.int32).reshape(-1), offsets, seen

    @property
    def _vocabulary(self) -> int:
        return int(self._core_config["qformer"]["vocab_size"])


class Blip2ForImageTextRetrieval(Blip2Retrieval):
    """How well pictures and texts fit: cosines of what each becomes alone (ITC), or by reading them together (ITM)."""

    def forward(
        self,
        pixel_values: Any,
        input_ids: Any,
        attention_mask: Any = None,
        use_image_text_matching_head: bool | None = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = False,
        **options: Any,
    ) -> Any:
        """pixel_values [B, 3, S, S]; input_ids, attention_mask [B, T] as Blip2Processor makes them.

        Where the config has an image token, rows begin with num_query_tokens of it; these are left out.

        Without use_image_text_matching_head (ITC): logits_per_image [B, J] are cosines of pictures with texts (any J):
        of each picture the query nearest to the text. They are not probabilities. text_embeds [J, P] and
        image_embeds [B, Q, P] have length 1. With it (ITM): picture b and text b are read together; logits_per_image
        [B, 2] are logits of "no" and "yes": softmax gives a probability. text_embeds [B, Q + T, D_q] and image_embeds
        [B, Tv, D_v] are then the hidden states of Q-Former and vision encoder, as upstream names them.
        logits_per_text is the transpose. Beside them text_model_output (the Q-Former's) and vision_model_output, with
        hidden_states and attentions of the vision encoder where asked for. return_dict=False gives a tuple.

        Raises ValueError for ids, masks and pictures that do not fit, NumericError for pixels that are not finite,
        UnsupportedError for options that are not computed (upstream: Blip2ForImageTextRetrieval.forward).
        """
        self._check_config()
        _check_token_types(options.pop("token_type_ids", None))
        refuse_options("forward", options, {})
        wishes = self._wishes({"output_hidden_states": output_hidden_states, "output_attentions": output_attentions})
        like, interpolate = Like(pixel_values, self._dtype, self._core), bool(interpolate_pos_encoding)
        pixels = self._pixels(pixel_values, interpolate)
        text = self._text(input_ids, attention_mask, bool(use_image_text_matching_head))
        if use_image_text_matching_head and len(text[1]) - 1 != len(pixels):
            raise ValueError(
                f"input_ids has {len(text[1]) - 1} rows, pixel_values has {len(pixels)} pictures: matching reads one"
                " text with each picture"
            )
        stages = self._core.encode_stages(
            pixels,
            hidden_states=wishes.hidden_states is not False,
            attentions=wishes.attentions,
            interpolate=interpolate,
            text=text if use_image_text_matching_head else None,
            on_device=like.stays,
        )
        vision = vision_output(stages, like, wishes)
        result = self._match(stages) if use_image_text_matching_head else self._compare(stages, text)
        logits = result["logits"]
        output = ModelOutput(
            loss=None,
            logits_per_image=like.floats(logits),
            logits_per_text=like.floats(logits.T),
            text_embeds=like.floats(result["text_embeds"]),
            image_embeds=like.floats(result["image_embeds"]),
            text_model_output=self._states({"qformer": result["states"]}, like, _NOTHING),
            vision_model_output=vision,
        )
        return self._finished(output, return_dict)

    def _compare(self, stages: dict[str, Any], text: PackedTexts) -> dict[str, Any]:
        read, count = self._core.read_texts(text), len(text[1]) - 1
        first = np.ascontiguousarray(read["embeds"][text[1][:-1]])
        return {
            "logits": self._core.similarity(to_numpy(stages["embeds"]), first),
            "text_embeds": first,
            "image_embeds": stages["embeds"],
            "states": read["text"].reshape(count, -1, read["text"].shape[1]),
        }

    def _match(self, stages: dict[str, Any]) -> dict[str, Any]:
        joined = {"qformer": stages["qformer"], "text": stages["text"]}
        join_text(joined, len(stages["qformer"]))
        states = joined["qformer"]
        return {"logits": stages["match"], "text_embeds": states, "image_embeds": stages["vision"], "states": states}

    def _text(self, input_ids: Any, attention_mask: Any, together: bool) -> PackedTexts:
        """Checked texts, without the image tokens in front of them."""
        ids, skipped = to_numpy(input_ids), 0
        mask = None
        if attention_mask is not None:
            mask = check_mask(attention_mask, ids.shape, empty=True)
        if self._image_token is not None:
            skipped = self._queries
            if ids.ndim == 2 and not (ids.shape[1] >= skipped and (ids[:, :skipped] == self._image_token).all()):
                raise ValueError(
                    f"input_ids: every row must begin with {skipped} image tokens ({self._image_token}): pass texts and"
                    " images to the processor together"
                )
        checked = check_ids(ids[:, skipped:] if ids.ndim == 2 else ids, self._vocabulary)
        if mask is None:
            return self._packed(checked, None)
        if together and not mask[:, :skipped].all():
            raise UnsupportedError("attention_mask: hiding image tokens is not computed")
        # Read alone, a text that nobody may see has nothing to say; beside a picture the queries see themselves.
        return self._packed(checked, check_mask(mask[:, skipped:], checked.shape, empty=together))


class Blip2TextModelWithProjection(Blip2Retrieval):
    """The half that reads texts, without a vision encoder (upstream: the class of the same name)."""

    main_input_name = "input_ids"
    _reads = {"vision": False, "text": True, "match": False}  # noqa: RUF012

    def forward(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        position_ids: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """input_ids, attention_mask [B, T] (no image tokens) -> text_embeds [B, T, P], rows of length 1.

        The first token's stands for the text. Beside them last_hidden_state [B, T, D_q] and, when asked for,
        hidden_states and attentions. position_ids must be 0, 1, 2, ... where they are given.
        """
        self._check_config()
        _check_token_types(options.pop("token_type_ids", None))
        wishes, like = self._wishes(options), Like(input_ids, self._dtype, self._core)
        refuse_options("forward", options, {})
        ids = check_ids(input_ids, self._vocabulary)
        mask = None if attention_mask is None else check_mask(attention_mask, ids.shape)
        if position_ids is not None and not (to_numpy(position_ids) == np.arange(ids.shape[1])).all():
            raise UnsupportedError("position_ids other than 0, 1, 2, ... are not computed")
        text = self._packed(ids, mask)
        read = self._core.read_texts(text, wishes.hidden_states is not False, wishes.attentions, like.stays)
        embeds = read.pop("embeds")
        join_text(read, len(ids))
        states = self._states(read, like, wishes)
        result = ModelOutput(
            text_embeds=like.floats(embeds.reshape(*ids.shape, -1)),
            last_hidden_state=states.last_hidden_state,
            hidden_states=states.hidden_states,
            attentions=states.attentions,
        )
        return self._finished(result, return_dict)


class Blip2VisionModelWithProjection(Blip2Retrieval):
    """The half that looks at pictures, without the text side (upstream: the class of the same name)."""

    _reads = {"vision": True, "text": False, "match": False}  # noqa: RUF012

    def forward(
        self,
        pixel_values: Any,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """pixel_values [B, 3, S, S] -> image_embeds [B, Q, P], rows of length 1, one a query.

        Beside them the vision encoder's last_hidden_state [B, T, D_v], hidden_states and attentions.
        """
        self._check_config()
        wishes, like = self._wishes(options), Like(pixel_values, self._dtype, self._core)
        interpolate = bool(interpolate_pos_encoding)
        refuse_options("forward", options, {})
        stages = self._core.encode_stages(
            self._pixels(pixel_values, interpolate),
            hidden_states=wishes.hidden_states is not False,
            attentions=wishes.attentions,
            interpolate=interpolate,
            on_device=like.stays,
        )
        vision = vision_output(stages, like, wishes)
        result = ModelOutput(
            image_embeds=like.floats(stages["embeds"]),
            last_hidden_state=vision.last_hidden_state,
            hidden_states=vision.hidden_states,
            attentions=vision.attentions,
        )
        return self._finished(result, return_dict)


class Blip2QFormerModel(Blip2Retrieval):
    """The Q-Former of any BLIP-2 checkpoint alone (upstream: the class of the same name).

    Made by from_pretrained() of the whole checkpoint, of which the Q-Former is read; `config` is the whole one.
    """

    main_input_name = "query_embeds"

    @classmethod
    def _core_of(cls, config: Any) -> dict[str, Any]:
        text = bool(config.qformer_config.get("use_qformer_text_input", False))
        return retrieval_core(config, vision=False, text=text, match=False, heads=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """query_embeds, query_length, attention_mask, encoder_hidden_states ...: see blip2c.parts.QFormer."""
        self._check_config()
        return QFormer(self)(*args, **kwargs)


def _check_token_types(value: Any) -> None:
    """BERT's tokenizer may give them; the Q-Former knows one type only."""
    if value is not None and to_numpy(value).any():
        raise UnsupportedError("token_type_ids other than 0 are not computed: the Q-Former has one type of token")
