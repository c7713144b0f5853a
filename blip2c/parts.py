"""Parts of a model under the names that scripts call them by: model.vision_model(pixel_values), model.qformer(...), ...

A part is made anew for each access and owns nothing; the weights stay in the model's C part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blip2c._core import DeviceArray, UnsupportedError
from blip2c.inputs import check_embeds, check_mask, given_floats, joined, to_numpy
from blip2c.outputs import Like

if TYPE_CHECKING:
    from blip2c.forward import Blip2WithLanguageModel, Blip2WithQFormer, Wishes


class Part:
    """What every part answers: config, dtype and device as the model's."""

    def __init__(self, model: Blip2WithQFormer, config: Any) -> None:
        self._model = model
        self.config = config

    @property
    def dtype(self) -> Any:
        """The model's."""
        return self._model.dtype

    @property
    def device(self) -> Any:
        """The model's."""
        return self._model.device

    def eval(self) -> Part:
        """It always is."""
        return self

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {self._model!r}"

    def _wishes(self, options: dict[str, Any]) -> Wishes:
        wishes = self._model._wishes(options)
        if options:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(options)}")
        return wishes


class VisionModel(Part):
    """The vision encoder (upstream: Blip2VisionModel)."""

    def __init__(self, model: Blip2WithQFormer) -> None:
        super().__init__(model, model.config.vision_config)

    def __call__(
        self,
        pixel_values: Any = None,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """pixel_values [B, 3, S, S] -> last_hidden_state [B, T, D_v] and pooler_output [B, D_v].

        interpolate_pos_encoding: pictures of any size. output_hidden_states: hidden_states, layers + 1 of [B, T, D_v],
        the last before post_layernorm; output_attentions: attentions [B, H, T, T]. Raises as Blip2Model.forward().
        """
        from blip2c.forward import vision_output

        model, wishes = self._model, self._wishes(options)
        like = Like(pixel_values, model._dtype, model._core)
        stages = model._core.encode_stages(
            model._pixels(pixel_values, bool(interpolate_pos_encoding)),
            hidden_states=wishes.hidden_states is not False,
            attentions=wishes.attentions,
            interpolate=bool(interpolate_pos_encoding),
            qformer=False,
            on_device=like.stays,
        )
        return model._finished(vision_output(stages, like, wishes), return_dict)


class QFormer(Part):
    """The Q-Former (upstream: Blip2QFormerModel)."""

    def __init__(self, model: Blip2WithQFormer) -> None:
        super().__init__(model, model.config.qformer_config)

    def __call__(
        self,
        query_embeds: Any,
        query_length: int | None = None,
        attention_mask: Any = None,
        encoder_hidden_states: Any = None,
        encoder_attention_mask: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """query_embeds [B, L, D_q], of which the first query_length (None: all) look at the picture.

        The others are texts, where the model reads texts. encoder_hidden_states [B, T, D_v] are the pictures (one B may
        be 1), not needed without queries. attention_mask [B, L] and encoder_attention_mask [B, T] hide what is 0. Gives
        last_hidden_state [B, L, D_q] and pooler_output [B, D_q], its first row. output_hidden_states: layers + 1 of
        [B, L, D_q]; output_attentions: attentions [B, H, L, L] and, of the layers that look at the picture,
        cross_attentions [B, H, query_length, T]. Raises ValueError for what does not fit, UnsupportedError for texts
        where the model reads none.
        """
        from blip2c.forward import join_text, qformer_output

        model, wishes = self._model, self._wishes(options)
        core = model._core_config["qformer"]
        embeds = check_embeds(query_embeds, (None, int(core["hidden_size"])), "query_embeds", model._core)
        queries = embeds.shape[1] if query_length is None else int(query_length)
        if not 0 <= queries <= embeds.shape[1]:
            raise ValueError(f"query_length is {queries}, query_embeds has {embeds.shape[1]} rows")
        image = None
        if queries:
            if encoder_hidden_states is None:
                raise ValueError("qformer: encoder_hidden_states must be given")
            image = check_embeds(
                encoder_hidden_states, (None, int(core["encoder_hidden_size"])), "encoder_hidden_states", model._core
            )
            if len(embeds) != len(image) and 1 not in (len(embeds), len(image)):
                raise ValueError(f"qformer: query_embeds for {len(embeds)} pictures, there are {len(image)}")
        batch = max(len(embeds), 0 if image is None else len(image))
        mask = _mask(attention_mask, embeds.shape[:2], "attention_mask", batch)
        shown = None
        if image is not None:
            shown = _mask(encoder_attention_mask, image.shape[:2], "encoder_attention_mask", batch)
        like = Like(query_embeds if image is None else encoder_hidden_states, model._dtype, model._core)
        stages = model._core.run_qformer(
            _repeated(embeds[:, :queries], batch),
            _repeated(embeds[:, queries:], batch) if queries < embeds.shape[1] else None,
            None if mask is None else np.ascontiguousarray(mask[:, :queries]),
            None if mask is None or queries == embeds.shape[1] else np.ascontiguousarray(mask[:, queries:]),
            None if image is None else _repeated(image, batch),
            shown,
            hidden_states=wishes.hidden_states is not False,
            attentions=wishes.attentions,
            on_device=like.stays,
        )
        if "text" in stages:
            join_text(stages, batch)
        return model._finished(qformer_output(stages, like, wishes, model._qformer_stays_float32), return_dict)


def _repeated(array: Any, batch: int) -> Any:
    """`batch` rows of an array that has as many, or one."""
    if isinstance(array, DeviceArray):
        one = array
        while len(array) < batch:
            array = joined([array, one][:batch], 0)
        return array
    return np.ascontiguousarray(np.broadcast_to(array, (batch, *array.shape[1:])))


def _mask(value: Any, shape: tuple[int, ...], name: str, batch: int) -> NDArray[np.uint8] | None:
    """The mask, or None where it hides nothing."""
    if value is None:
        return None
    mask = check_mask(value, shape, name, "what it masks")
    return None if mask.all() else _repeated(mask, batch)


class LanguageProjection(Part):
    """The linear layer between Q-Former and language model."""

    def __init__(self, model: Blip2WithLanguageModel) -> None:
        super().__init__(model, model.config)
        self.in_features = int(model.config.qformer_config.hidden_size)
        self.out_features = int(model.config.text_config.hidden_size)

    def __call__(self, x: Any) -> Any:
        """x [..., D_q] floats -> [..., D_lm]. Raises TypeError or ValueError."""
        array = given_floats(x, self._model._core, "x")
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(f"language_projection: expected floats, found {array.dtype}")
        if array.ndim < 1 or array.shape[-1] != self.in_features:
            raise ValueError(f"language_projection: expected [..., {self.in_features}], found shape {array.shape}")
        like = Like(x, self._model._dtype, self._model._core)
        ordered = array if isinstance(array, DeviceArray) else np.ascontiguousarray(array, dtype=np.float32)
        out = self._model._core.project(ordered.reshape(-1, self.in_features), on_device=like.stays)
        return like.floats(out.reshape(*array.shape[:-1], self.out_features))


class TokenEmbedding(Part):
    """The language model's token embeddings."""

    _model: Blip2WithLanguageModel

    def __init__(self, model: Blip2WithLanguageModel) -> None:
        super().__init__(model, model.config.text_config)
        self.num_embeddings = int(model._core_config["text"]["vocab_size"])
        self.embedding_dim = int(model.config.text_config.hidden_size)

    def __call__(self, input_ids: Any) -> Any:
        """Ids of any shape -> [..., D_lm]. Raises TypeError, ValueError for an id outside the vocabulary."""
        ids = to_numpy(input_ids)
        if not np.issubdtype(ids.dtype, np.integer):
            raise TypeError(f"input_ids must be integers, found {ids.dtype}")
        if ids.size and not 0 <= ids.min() <= ids.max() < self.num_embeddings:
            raise ValueError(f"input_ids must be in 0..{self.num_embeddings - 1}, found {ids.min()}..{ids.max()}")
        like = Like(input_ids, self._model._dtype, self._model._core)
        out = self._model._core.embed(np.ascontiguousarray(ids.reshape(-1), dtype=np.int32), on_device=like.stays)
        return like.floats(out.reshape(*ids.shape, self.embedding_dim))


class LanguageModel(Part):
    """The language model alone (upstream: the class that text_config names)."""

    _model: Blip2WithLanguageModel

    def __init__(self, model: Blip2WithLanguageModel) -> None:
        super().__init__(model, model.config.text_config)

    @property
    def generation_config(self) -> Any:
        """The defaults of generate() that really count, as in transformers 5.23: made from text_config."""
        return self._model._generation_defaults

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._model._generation_defaults = value

    def get_input_embeddings(self) -> TokenEmbedding:
        """The token embeddings, called with ids."""
        return TokenEmbedding(self._model)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        labels: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """Ids [B, T] or inputs_embeds [B, T, D_lm] -> logits [B, T, V], and loss where labels [B, T] are given."""
        from blip2c.forward import LANGUAGE_OPTIONS
        from blip2c.pretrained import refuse_options

        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("language_model: expected one of input_ids and inputs_embeds")
        model, keep = self._model, options.pop("logits_to_keep", None)
        wishes, targets = model._wishes(options), model._labels(labels, options)
        refuse_options("language_model", options, LANGUAGE_OPTIONS)
        like = Like(input_ids if inputs_embeds is None else inputs_embeds, model._dtype, model._core)
        prompt = model._prompt(None, input_ids, inputs_embeds, attention_mask)
        decoder = model._decoder(decoder_input_ids, decoder_attention_mask, targets, len(prompt.rows.offsets) - 1)
        return model._finished(model._language(prompt, decoder, like, wishes, targets, keep)[0], return_dict)

    def generate(
        self,
        inputs: Any = None,
        *,
        input_ids: Any = None,
        inputs_embeds: Any = None,
        attention_mask: Any = None,
        **generate_kwargs: Any,
    ) -> Any:
        """The language model's own generate(): of ids [B, T] with the prompt in front, of embeddings new tokens alone.

        Options and errors as Blip2ForConditionalGeneration.generate(); UnsupportedError in a Blip2Model.
        """
        model = self._model
        begin = getattr(model, "_generate", None)
        if begin is None:
            raise UnsupportedError(f"{type(model).__name__} does not generate: load Blip2ForConditionalGeneration")
        ids = inputs if input_ids is None else input_ids
        if ids is None and inputs_embeds is None:
            raise ValueError("language_model.generate: expected input_ids or inputs_embeds")
        prompt = model._prompt(None, ids, inputs_embeds, attention_mask)
        return begin(
            prompt, generate_kwargs, Like(ids if inputs_embeds is None else inputs_embeds, model._dtype, model._core)
        )
