"""What the models with a language model share: checked inputs, one pass through every part, outputs in upstream's form.

NumPy in, NumPy out; torch in, torch out; what lies on the model's device stays there. Results come in the order and
shapes of transformers 5.23; hidden states and attention weights are given for every part when asked for: more than
its Blip2ForConditionalGeneration passes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip2c import kernels
from blip2c._core import UnsupportedError
from blip2c.inputs import (
    NO_POSITIONS,
    DecoderRows,
    Floats,
    PackedRows,
    check_embeds,
    check_ids,
    check_labels,
    check_mask,
    check_pixels,
    check_positions,
    decoder_rows,
    joined,
    pack,
    pack_embeds,
    shift_right,
    to_numpy,
)
from blip2c.outputs import Like, ModelOutput
from blip2c.parts import LanguageModel, LanguageProjection, QFormer, TokenEmbedding, VisionModel
from blip2c.pretrained import Blip2PreTrainedModel, refuse_options

F32 = NDArray[np.float32]
PackedTexts = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8] | None]
# What transformers' language models take besides; the values ask for nothing but what happens here anyway.
LANGUAGE_OPTIONS: dict[str, tuple[Any, ...]] = {
    "use_cache": (None, True, False),
    "past_key_values": (None,),
    "position_ids": (None,),
    "decoder_inputs_embeds": (None,),
    "encoder_outputs": (None,),
}


class Wishes(NamedTuple):
    """What of output_hidden_states and output_attentions is asked for."""

    hidden_states: Any
    attentions: bool

    def states(self, arrays: Sequence[Any] | None) -> tuple[Any, ...] | None:
        """The hidden states; where only some layers were named (an int or a list of them), None for the others."""
        if arrays is None or isinstance(self.hidden_states, bool):
            return None if arrays is None else tuple(arrays)
        named = [self.hidden_states] if isinstance(self.hidden_states, int) else list(self.hidden_states)
        wanted = {i % len(arrays) for i in named if -len(arrays) <= i < len(arrays)}
        return tuple(array if i in wanted else None for i, array in enumerate(arrays))


class Pictures(NamedTuple):
    """Pictures on their way to the language model: features [B, Q, D_lm] and the outputs of what they came through."""

    features: Floats
    vision: Any
    qformer: Any


class Prompt(NamedTuple):
    """Rows for the language model: `embeds` [B, P, D_lm] take the places of ids that are -1; ids [B, T] or None."""

    rows: PackedRows
    embeds: Floats | None
    ids: NDArray[np.int64] | None


class Labels(NamedTuple):
    """What the loss compares with: ids [B, T], ignore_index where nothing is compared; items None: mean over those."""

    ids: NDArray[np.int64]
    ignore_index: int
    items: float | None

    def loss(self, logits: Any, shift: bool) -> np.float32:
        """Cross entropy in float32 of logits [B, T, V] as transformers 5.23 computes it; shift: of the next token."""
        logits = to_numpy(logits)
        batch, length, vocabulary = logits.shape
        if self.ids.shape != (batch, length):
            raise ValueError(f"labels have shape {self.ids.shape}, expected {(batch, length)} as the logits have")
        targets = self.ids
        if shift:
            targets = np.full_like(self.ids, self.ignore_index)
            targets[:, :-1] = self.ids[:, 1:]
        targets = np.ascontiguousarray(targets).reshape(-1)
        flat = np.ascontiguousarray(logits).reshape(-1, vocabulary)
        total = kernels.cross_entropy(flat, targets, self.ignore_index).sum(dtype=np.float64)
        count = (targets != self.ignore_index).sum() if self.items is None else self.items
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.float32(np.float64(total) / np.float64(count))


class Blip2WithQFormer(Blip2PreTrainedModel):
    """What every model here has: a Q-Former, and checks and outputs in one form."""

    # Under float16 transformers leaves this class's Q-Former as it is.
    _qformer_stays_float32 = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See forward()."""
        return self.forward(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Each model's own."""
        raise NotImplementedError

    @property
    def vision_model(self) -> VisionModel:
        """The vision encoder: vision_model(pixel_values)."""
        return VisionModel(self)

    @property
    def qformer(self) -> QFormer:
        """The Q-Former: qformer(query_embeds=model.query_tokens, encoder_hidden_states=image_embeds)."""
        return QFormer(self)

    @property
    def query_tokens(self) -> Any:
        """The learned queries [1, Q, D_q], a copy: a tensor where torch is loaded, else an array. float32."""
        return Like.loaded("float32").floats(self._core.weights("query_tokens")["query_tokens"])

    def _pixels(self, value: Any, interpolate: bool = False) -> Any:
        vision = self._core_config["vision"]
        patch = int(vision["patch_size"]) if interpolate else None
        return check_pixels(value, int(vision["image_size"]), patch, self._core)

    @property
    def _queries(self) -> int:
        return int(self._core_config["num_query_tokens"])

    @property
    def _image_token_bound(self) -> int:
        """The image token's id is below it."""
        raise NotImplementedError

    @property
    def _image_token(self) -> int | None:
        # As it is now: scripts that bring old checkpoints up to date set it after loading.
        token = self.config.image_token_index
        vocabulary = self._image_token_bound
        if token is None:
            return None
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocabulary:
            raise ValueError(f"config.image_token_index must be None or in 0..{vocabulary - 1}, found {token!r}")
        return int(token)

    def _check_config(self) -> None:
        """The weights were bound by the configuration as it was: an edit since then is refused, not ignored."""
        if self._core_config["image_token_id"] != -1 or self.config.image_token_index is not None:
            self._image_token  # noqa: B018 - honoured whenever it changes, so only checked
        now = self._core_of(self.config)
        for part, before in self._core_config.items():
            values = before.items() if isinstance(before, Mapping) else [(None, before)]
            for name, value in values:
                found = now[part] if name is None else now[part].get(name)
                if part != "image_token_id" and found != value:
                    where = part if name is None else f"{part}_config.{name}"
                    raise ValueError(
                        f"config.{where} was {value!r} when the model was loaded and is {found!r} now: pass the changed"
                        " config to from_pretrained(config=)"
                    )

    def _wishes(self, options: dict[str, Any]) -> Wishes:
        """Takes output_hidden_states and output_attentions out of `options`; the config's where they are not given."""
        states, weights = options.pop("output_hidden_states", None), options.pop("output_attentions", None)
        states = self.config.get("output_hidden_states", False) if states is None else states
        weights = self.config.get("output_attentions", False) if weights is None else weights
        if not isinstance(states, bool | int) and not (
            isinstance(states, list | tuple) and all(isinstance(i, int) for i in states)
        ):
            raise TypeError(f"output_hidden_states must be a bool or indices of layers, found {states!r}")
        return Wishes(states or False, bool(weights))

    def _finished(self, result: ModelOutput, return_dict: bool | None) -> Any:
        """The output, or a tuple where return_dict or else the config says so."""
        as_dict = self.config.get("return_dict", True) if return_dict is None else return_dict
        return result if as_dict is None or as_dict else result.to_tuple()


class Blip2WithLanguageModel(Blip2WithQFormer):
    """The common part of Blip2ForConditionalGeneration and Blip2Model."""

    # -- parts ---------------------------------------------------------------------------------------------------

    @property
    def language_projection(self) -> LanguageProjection:
        """The linear layer from the Q-Former to the language model."""
        return LanguageProjection(self)

    @property
    def language_model(self) -> LanguageModel:
        """The language model alone: its config, its generation defaults, language_model(inputs_embeds=...)."""
        return LanguageModel(self)

    def get_input_embeddings(self) -> TokenEmbedding:
        """The language model's token embeddings, called with ids."""
        return TokenEmbedding(self)

    # -- pictures ------------------------------------------------------------------------------------------------

    def _texts(self, options: dict[str, Any]) -> PackedTexts | None:
        """What the Q-Former reads beside the pictures, taken out of `options`; None where it reads nothing."""
        return None

    def _pictures(
        self, pixel_values: Any, interpolate: Any, wishes: Wishes, like: Like, texts: PackedTexts | None
    ) -> Pictures:
        """Pixels through vision encoder, Q-Former and projection."""
        stages = self._core.encode_stages(
            self._pixels(pixel_values, bool(interpolate)),
            hidden_states=wishes.hidden_states is not False,
            attentions=wishes.attentions,
            interpolate=bool(interpolate),
            text=texts,
            on_device=like.stays,
        )
        if texts is not None:
            join_text(stages, len(stages["vision"]))
        return Pictures(
            stages["image_features"],
            vision_output(stages, like, wishes),
            qformer_output(stages, like, wishes, self._qformer_stays_float32),
        )

    def _given_pictures(self, outputs: Any) -> Pictures:
        """mm_encoder_outputs={"image": what get_image_features gave}."""
        image = outputs.get("image") if isinstance(outputs, Mapping) else None
        features = getattr(image, "pooler_output", None)
        if features is None:
            raise ValueError('mm_encoder_outputs must be {"image": output of get_image_features()}')
        core, text = self._core_config, self.config.text_config
        shape = (int(core["num_query_tokens"]), int(text.hidden_size))
        array = check_embeds(features, shape, "mm_encoder_outputs['image'].pooler_output", self._core)
        return Pictures(array, getattr(image, "vision_outputs", None), getattr(image, "qformer_outputs", None))

    # -- rows ----------------------------------------------------------------------------------------------------

    @property
    def _positions(self) -> int:
        """How many tokens a sequence may have: learned positions end, relative ones and most rotary ones do not."""
        return int(self._core_config["text"].get("max_position_embeddings", NO_POSITIONS))

    def _check_length(self, rows: PackedRows, new_tokens: int = 0) -> None:
        """See check_positions(). Frequencies that hold for so many tokens only: upstream counts pads among them."""
        text = self._core_config["text"]
        rotary = "inv_freq" in text and "max_position_embeddings" in text
        check_positions(rows._replace(mask=None) if rotary else rows, self._positions, new_tokens)

    @property
    def _vocabulary(self) -> int:
        return int(self._core_config["text"]["vocab_size"])

    @property
    def _image_token_bound(self) -> int:
        return self._vocabulary

    def _ids(self, value: Any, name: str = "input_ids") -> NDArray[np.int64]:
        return check_ids(value, self._vocabulary, name)

    def _rows(self, input_ids: Any, attention_mask: Any, pictures: int) -> PackedRows:
        ids = self._ids(input_ids)
        mask = None if attention_mask is None else check_mask(attention_mask, ids.shape)
        return pack(ids, mask, self._image_token, self._queries, pictures)

    def _prompt(self, features: Floats | None, input_ids: Any, inputs_embeds: Any, attention_mask: Any) -> Prompt:
        """Prompts with the pictures' features in their places; features None: prompts alone."""
        ids = None if input_ids is None else self._ids(input_ids)
        if inputs_embeds is None:
            if ids is None:
                raise ValueError("input_ids must be given: forward() gives logits for them")
            if features is not None:
                return Prompt(self._rows(ids, attention_mask, features.shape[0]), features, ids)
            mask = None if attention_mask is None else check_mask(attention_mask, ids.shape)
            return Prompt(pack(ids, mask, -1, 0, ids.shape[0]), None, ids)
        width = int(self.config.text_config.hidden_size)
        embeds = check_embeds(inputs_embeds, (None, width), "inputs_embeds", self._core)
        if ids is not None and ids.shape != embeds.shape[:2]:
            raise ValueError(f"inputs_embeds are for {embeds.shape[:2]} tokens, input_ids has {ids.shape}")
        mask = None if attention_mask is None else check_mask(attention_mask, embeds.shape[:2])
        places = None if features is None else self._image_places(embeds, ids)
        rows, embeds = pack_embeds(embeds, mask, ids, places, features)
        return Prompt(rows, embeds, ids)

    def _image_places(self, embeds: Any, ids: NDArray[np.int64] | None) -> NDArray[np.bool_] | None:
        """[B, T]: where the image token stands, by its id or, without ids, by its embedding; None: there is none."""
        token = self._image_token
        if token is None:
            return None
        if ids is not None:
            return np.equal(ids, token)
        own = self._core.embed(np.array([token], np.int32))[0]
        # Tensors of get_input_embeddings() came through the model's dtype, arrays did not.
        rounded = to_numpy(Like.loaded(self._dtype).floats(own))
        embeds = to_numpy(embeds)
        places: NDArray[np.bool_] = (embeds == own).all(axis=-1) | (embeds == rounded).all(axis=-1)
        return places

    def _decoder(self, ids: Any, mask: Any, labels: Labels | None, batch: int) -> DecoderRows | None:
        """The decoder's rows: as given, or the labels moved one to the right (T5's _shift_right)."""
        if not self.config.is_encoder_decoder:
            if ids is not None or mask is not None:
                raise ValueError("decoder_input_ids: this language model has no decoder of its own")
            return None
        if ids is None:
            if labels is None:
                raise ValueError(
                    "decoder_input_ids must be given, or labels to make them of: this is an encoder-decoder"
                )
            text = self.config.text_config
            start, pad = text.get("decoder_start_token_id"), text.get("pad_token_id")
            if start is None or pad is None:
                raise ValueError("labels: the text config needs decoder_start_token_id and pad_token_id to shift them")
            ids = shift_right(labels.ids, int(start), int(pad), labels.ignore_index)
        return decoder_rows(ids, mask, batch, self._vocabulary)

    def _labels(self, value: Any, options: dict[str, Any]) -> Labels | None:
        """Takes the loss's own options out of `options`."""
        ignore, items = options.pop("ignore_index", -100), options.pop("num_items_in_batch", None)
        if value is None:
            return None
        ids = check_labels(value, self._vocabulary, int(ignore))
        return Labels(ids, int(ignore), None if items is None else float(to_numpy(items)))

    # -- the language model --------------------------------------------------------------------------------------

    def _language(
        self,
        prompt: Prompt,
        decoder: DecoderRows | None,
        like: Like,
        wishes: Wishes,
        labels: Labels | None = None,
        logits_to_keep: Any = None,
    ) -> tuple[ModelOutput, Any]:
        """The language model's output as transformers' class of it gives it, and its logits [B, T, V] in float32."""
        rows = prompt.rows
        self._check_length(rows)
        beside = {} if decoder is None else decoder_arguments(decoder)
        out = self._core.forward(
            prompt.embeds,
            rows.ids,
            rows.offsets,
            rows.mask,
            wishes.hidden_states is not False,
            wishes.attentions,
            on_device=like.stays,
            **beside,
        )
        batch = len(rows.offsets) - 1
        logits = out["logits"].reshape(batch, -1, out["logits"].shape[-1])

        def states(key: str) -> tuple[Any, ...] | None:
            arrays = out.get(key)
            shaped = None if arrays is None else [like.floats(a.reshape(batch, -1, a.shape[-1])) for a in arrays]
            return wishes.states(shaped)

        def weights(key: str) -> tuple[Any, ...] | None:
            return tuple(like.floats(a) for a in out[key]) if key in out else None

        width = int(self.config.text_config.hidden_size)
        if decoder is None:
            logits = kept(logits, logits_to_keep)
            result = ModelOutput(
                loss=None if labels is None else like.number(labels.loss(logits, shift=True)),
                logits=like.floats(logits),
                past_key_values=None,
                hidden_states=states("hidden_states"),
                attentions=weights("attentions"),
            )
            return result, logits
        if logits_to_keep not in (None, 0):
            raise UnsupportedError("logits_to_keep: encoder-decoders give the logits of every decoder token")
        result = ModelOutput(
            loss=None if labels is None else like.number(labels.loss(logits, shift=False)),
            logits=like.floats(logits),
            past_key_values=None,
            decoder_hidden_states=states("decoder_hidden_states"),
            decoder_attentions=weights("decoder_attentions"),
            cross_attentions=weights("cross_attentions"),
            encoder_last_hidden_state=like.floats(out["encoder_last_hidden_state"][0].reshape(batch, -1, width)),
            encoder_hidden_states=states("encoder_hidden_states"),
            encoder_attentions=weights("encoder_attentions"),
        )
        return result, logits

    def _forward(
        self,
        pictures: Pictures,
        like: Like,
        wishes: Wishes,
        *,
        input_ids: Any,
        inputs_embeds: Any,
        attention_mask: Any,
        decoder_input_ids: Any,
        decoder_attention_mask: Any,
        labels: Any,
        options: dict[str, Any],
    ) -> ModelOutput:
        """From pictures to logits and loss."""
        keep = options.pop("logits_to_keep", None)
        targets = self._labels(labels, options)
        refuse_options("forward", options, LANGUAGE_OPTIONS)
        prompt = self._prompt(pictures.features, input_ids, inputs_embeds, attention_mask)
        decoder = self._decoder(decoder_input_ids, decoder_attention_mask, targets, pictures.features.shape[0])
        # Upstream computes a decoder-only model's loss here, not in it: labels may leave out what stands in front.
        language, logits = self._language(prompt, decoder, like, wishes, targets if decoder else None, keep)
        loss, shown = language.loss, language.logits
        if targets is not None and decoder is None:
            length = targets.ids.shape[1]
            loss = like.number(targets.loss(logits[:, -length:], shift=True))
            shown = shown[:, -length:]
        return ModelOutput(
            loss=loss,
            logits=shown,
            vision_outputs=pictures.vision,
            qformer_outputs=pictures.qformer,
            language_model_outputs=language,
        )


def decoder_arguments(rows: DecoderRows) -> dict[str, Any]:
    """As the C part takes them."""
    return {"decoder_ids": rows.ids, "decoder_offsets": rows.offsets, "decoder_mask": rows.mask}


def kept(logits: Any, keep: Any) -> Any:
    """The last `keep` positions (0 or None: all), or those that an index array names."""
    if keep is None:
        return logits
    if isinstance(keep, int | np.integer):
        if keep < 0:
            raise ValueError(f"logits_to_keep must not be negative, found {keep}")
        return logits[:, -int(keep) :] if keep else logits
    places = to_numpy(keep)
    if places.ndim != 1 or not (np.issubdtype(places.dtype, np.integer) or places.dtype == bool):
        raise TypeError(f"logits_to_keep must be a number or a list of positions, found {places.dtype} {places.shape}")
    return to_numpy(logits)[:, places]


def vision_output(stages: Mapping[str, Any], like: Like, wishes: Wishes) -> ModelOutput:
    """BaseModelOutputWithPooling of the vision encoder."""
    states, weights = stages.get("vision_hidden_states"), stages.get("vision_attentions")
    return ModelOutput(
        last_hidden_state=like.floats(stages["vision"]),
        pooler_output=like.floats(stages["pooled"]),
        hidden_states=None if states is None else wishes.states([like.floats(a) for a in states]),
        attentions=None if weights is None else tuple(like.floats(a) for a in weights),
    )


def join_text(stages: dict[str, Any], batch: int) -> None:
    """A Q-Former's queries (where there are any) and texts, apart in the C part, become one as upstream has it."""
    text = stages.pop("text")
    text = text.reshape(batch, -1, text.shape[-1])
    stages["qformer"] = joined([stages["qformer"], text], 1) if "qformer" in stages else text
    for key, axis in (("hidden_states", 1), ("attentions", 2)):
        words, queries = stages.pop(f"qformer_text_{key}", None), stages.get(f"qformer_{key}")
        if words is not None and queries is not None:
            words = [joined(pair, axis) for pair in zip(queries, words, strict=True)]
        if words is not None:
            stages[f"qformer_{key}"] = words


def qformer_output(stages: Mapping[str, Any], like: Like, wishes: Wishes, stays_float32: bool = True) -> ModelOutput:
    """BaseModelOutputWithPoolingAndCrossAttentions of the Q-Former."""

    def floats(array: Any) -> Any:
        return like.floats(array, keep=stays_float32 and like.dtype == "float16")

    def many(key: str) -> tuple[Any, ...] | None:
        return tuple(floats(a) for a in stages[key]) if key in stages else None

    queries = floats(stages["qformer"])
    return ModelOutput(
        last_hidden_state=queries,
        pooler_output=queries[:, 0, :],
        hidden_states=wishes.states(many("qformer_hidden_states")),
        past_key_values=None,
        attentions=many("qformer_attentions"),
        cross_attentions=many("qformer_cross_attentions"),
    )
