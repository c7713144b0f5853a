"""`Blip2ForConditionalGeneration`: the transformers spelling over the C engine. Change the import, keep the script.

Beside it `Blip2Model`, the same checkpoint without generate(). What is not computed here raises UnsupportedError naming
the option; no option is silently dropped.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c._core import UnsupportedError
from blip2c.callables import Hooks
from blip2c.forward import Blip2WithLanguageModel, PackedTexts, Prompt, decoder_arguments
from blip2c.generation import Call, resolve
from blip2c.generation_outputs import compute_transition_scores, generated
from blip2c.inputs import DecoderRows, Floats, begin_decoder
from blip2c.outputs import Like, ModelOutput
from blip2c.pretrained import generation_options
from blip2c.steps import Steps


class Blip2ForConditionalGeneration(Blip2WithLanguageModel):
    """BLIP-2 that writes text about pictures (upstream: transformers' class of the same name).

    Made by `from_pretrained`. Weights are immutable and may be shared by threads. `generation_config` is what the
    folder's generation_config.json says; as in transformers 5.23 it has no effect on generate(), which takes its
    defaults from `language_model.generation_config` (made from text_config).
    """

    def forward(
        self,
        pixel_values: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        interpolate_pos_encoding: bool | None = False,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """logits [B, T, V] of every position, with vision_outputs, qformer_outputs and language_model_outputs.

        pixel_values [B, 3, S, S], of any size with interpolate_pos_encoding; or None and mm_encoder_outputs={"image":
        output of get_image_features()}. input_ids [B, T] with num_query_tokens image tokens a row (without an image
        token in the config the queries go in front, and T grows by them), or inputs_embeds [B, T, D_lm] with the image
        token's embedding there; attention_mask [B, T]. labels [B, <= T] (-100: not compared) give loss, the mean cross
        entropy of the next tokens in float32, and logits of their places only; num_items_in_batch divides instead.
        Encoder-decoders: decoder_input_ids [B, Td], or the labels moved one to the right; logits [B, Td, V].

        output_hidden_states, output_attentions: of every part, in vision_outputs, qformer_outputs (with
        cross_attentions) and language_model_outputs; hidden states [B, T, D], attentions [B, H, Tq, Tk].
        logits_to_keep: the last places only. NumPy results are float32; tensors have the model's dtype. There is no
        cache to hand over: past_key_values are refused and none are returned. return_dict=False gives a tuple.
        Raises as generate() does (upstream: Blip2ForConditionalGeneration.forward).
        """
        self._check_config()
        wishes, texts = self._wishes(options), self._texts(options)
        if pixel_values is not None and mm_encoder_outputs is not None:
            raise ValueError("expected one of pixel_values and mm_encoder_outputs, found both")
        like = Like(_first(pixel_values, input_ids, inputs_embeds), self._dtype, self._core)
        pictures = (
            self._pictures(pixel_values, interpolate_pos_encoding, wishes, like, texts)
            if mm_encoder_outputs is None
            else self._given_pictures(mm_encoder_outputs)
        )
        result = self._forward(
            pictures,
            like,
            wishes,
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            labels=labels,
            options=options,
        )
        return self._finished(result, return_dict)

    def get_image_features(
        self,
        pixel_values: Any,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """The projected queries as pooler_output [B, Q, D_lm]; last_hidden_state [B, T, D_v] is the vision model's.

        Beside them vision_outputs and qformer_outputs, as transformers 5.23 returns it; hidden states and attentions
        where asked for.
        """
        self._check_config()
        wishes, texts = self._wishes(options), self._texts(options)
        _refuse_rest("get_image_features", options)
        like = Like(pixel_values, self._dtype, self._core)
        pictures = self._pictures(pixel_values, interpolate_pos_encoding, wishes, like, texts)
        result = ModelOutput(
            last_hidden_state=pictures.vision.last_hidden_state,
            pooler_output=like.floats(pictures.features),
            hidden_states=pictures.vision.hidden_states,
            attentions=pictures.vision.attentions,
            vision_outputs=pictures.vision,
            qformer_outputs=pictures.qformer,
        )
        return self._finished(result, return_dict)

    def generate(
        self,
        pixel_values: Any = None,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        interpolate_pos_encoding: bool | None = False,
        mm_encoder_outputs: Mapping[str, Any] | None = None,
        **generate_kwargs: Any,
    ) -> Any:
        """Ids [B * num_return_sequences, T + new] int64: the prompt with its image tokens, then what was generated.

        Of encoder-decoders (T5) the decoder's ids: decoder_start_token_id, or decoder_input_ids where they are given
        (with decoder_attention_mask), then what was generated; it is these that lengths count and penalties see.
        pixel_values, mm_encoder_outputs, interpolate_pos_encoding and inputs_embeds: as in forward(). With
        inputs_embeds and no input_ids the result is the new tokens alone, and rules see no prompt. Without either the
        prompt is the image tokens and bos. Rows that end early are filled with the pad id. In checkpoints without an
        image token the result has no ids for the picture, but max_length counts it.

        Options: see `blip2c.generation.resolve` (seeds) and `GenerationConfig`; processors, stopping criteria and
        streamers: `blip2c.callables`; with return_dict_in_generate an output of `blip2c.generation_outputs`.

        Raises ValueError for inputs that do not fit (placeholders, sizes, masks, ids, positions), NumericError for
        pixels that are not finite, UnsupportedError for options that are not computed here.
        """
        self._check_config()
        texts = self._texts(generate_kwargs)
        features = self._features(pixel_values, interpolate_pos_encoding, mm_encoder_outputs, texts)
        if input_ids is None and inputs_embeds is None:
            input_ids = self._start_ids(features.shape[0])
        prompt = self._prompt(features, input_ids, inputs_embeds, attention_mask)
        return self._generate(
            prompt, generate_kwargs, Like(_first(pixel_values, input_ids, inputs_embeds), self._dtype, self._core)
        )

    def _generate(self, prompt: Prompt, generate_kwargs: dict[str, Any], like: Like) -> Any:
        """From rows to sequences."""
        self._check_text_options()
        rows, prompts, rule_ids, mask = prompt.rows, prompt.ids, prompt.rows.rule_ids, prompt.rows.mask
        batch, length, decoder = len(rows.offsets) - 1, int(rows.offsets[1]), {}
        if self.config.is_encoder_decoder:
            begun = self._begin_decoder(generate_kwargs, batch)
            length, prompts, rule_ids, mask = begun.shown.shape[1], begun.shown, begun.ids, begun.mask
            decoder = decoder_arguments(begun)
        call = self._call(generate_kwargs, [length])
        self._check_length(rows, new_tokens(call.core, length))
        shown = np.empty((batch, 0), np.int64) if prompts is None else prompts
        states = self._watcher(call, batch)
        hooks = Hooks(
            call,
            shown,
            rule_ids=rule_ids.reshape(batch, length),
            vocabulary=self._vocabulary,
            skip=None if mask is None else np.argmax(mask.reshape(batch, length), axis=1),
            tensors=like.torch is not None,
            unconditional=None if decoder else self._without_picture,
            states=states,
        )
        hooks.begin()
        out = self._core.generate(
            prompt.embeds,
            rows.ids,
            rows.offsets,
            rows.mask,
            rule_ids,
            call.core,
            hooks=hooks.functions,
            tap=None if states is None else states.see,
            tap_weights=states is not None and states.wants_weights,
            **decoder,
        )
        hooks.end()
        return generated(call, out, shown, hooks, like, is_encoder_decoder=bool(decoder))

    def _watcher(self, call: Call, batch: int) -> Steps | None:
        """Where hidden states or attention weights of every step are asked for."""
        wanted = {name: call[f"output_{name}"] is True for name in ("hidden_states", "attentions")}
        if call["return_dict_in_generate"] is not True or not any(wanted.values()):
            return None
        if call["use_cache"] is False:
            name = next(name for name, is_wanted in wanted.items() if is_wanted)
            raise UnsupportedError(
                f"use_cache=False with output_{name}=True: every step would give those of all tokens; blip2c gives"
                " those of its new token"
            )
        core = call.core
        rows = core["num_beams"] if core["num_beams"] > 1 else core["num_return_sequences"]
        return Steps(self._core_config["text"], batch, rows, **wanted)

    def compute_transition_scores(
        self, sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
    ) -> Any:
        """See blip2c.generation_outputs.compute_transition_scores."""
        return compute_transition_scores(sequences, scores, beam_indices, normalize_logits)

    def _without_picture(self, ids: NDArray[np.int64], mask: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Logits [n, V] of the last of ids [n, t] by the language model alone; mask [n, t]."""
        offsets = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
        flat = ids.astype(np.int32).reshape(-1)
        logits = self._core.forward(None, flat, offsets, mask.reshape(-1))["logits"]
        last: NDArray[np.float32] = np.asarray(logits)[offsets[1:] - 1]
        return last

    def _check_text_options(self) -> None:
        """text_config was read when the model was loaded: an edit of generate()'s options there is refused."""
        for name, value in generation_options(self.config.text_config).items():
            if value != self._text_options[name]:
                raise ValueError(
                    f"config.text_config.{name} was {self._text_options[name]!r} when the model was loaded and is"
                    f" {value!r} now: pass {name} to generate(), or set language_model.generation_config.{name}"
                )

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

    # -- inside --------------------------------------------------------------------------------------------------

    def _features(
        self, pixel_values: Any, interpolate: Any, outputs: Mapping[str, Any] | None, texts: PackedTexts | None
    ) -> Floats:
        """The pictures as the language model reads them, [B, Q, D_lm], from pixels or precomputed."""
        if outputs is None:
            pixels = self._pixels(pixel_values, bool(interpolate))
            features: Floats = self._core.encode(pixels, bool(interpolate), texts, on_device=self._core.device != "cpu")
            return features
        if pixel_values is not None:
            raise ValueError("expected one of pixel_values and mm_encoder_outputs, found both")
        return self._given_pictures(outputs).features

    def _start_ids(self, batch: int) -> NDArray[np.int64]:
        bos = self.config.text_config.bos_token_id
        if bos is None:
            raise ValueError("input_ids must be given: the text config has no bos_token_id to start with")
        image = [] if self._image_token is None else [self._image_token] * int(self._core_config["num_query_tokens"])
        return np.tile(np.array([[*image, bos]], np.int64), (batch, 1))

    def _call(self, generate_kwargs: Mapping[str, Any], lengths: Sequence[int]) -> Call:
        """What generate() is asked for, over the language model's defaults; lengths of prompts."""
        return resolve(
            self.language_model.generation_config,
            generate_kwargs,
            lengths,
            max_positions=self.config.text_config.get("max_position_embeddings"),
        )


class Blip2Model(Blip2WithLanguageModel):
    """BLIP-2's features and logits, without generate() (upstream: transformers' Blip2Model); the same checkpoints."""

    def forward(
        self,
        pixel_values: Any,
        input_ids: Any,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        labels: Any = None,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """As Blip2ForConditionalGeneration.forward()."""
        self._check_config()
        wishes, like = self._wishes(options), Like(pixel_values, self._dtype, self._core)
        result = self._forward(
            self._pictures(pixel_values, interpolate_pos_encoding, wishes, like, None),
            like,
            wishes,
            input_ids=input_ids,
            inputs_embeds=None,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            labels=labels,
            options=options,
        )
        return self._finished(result, return_dict)

    def get_image_features(
        self, pixel_values: Any, interpolate_pos_encoding: bool | None = False, **options: Any
    ) -> Any:
        """What the vision encoder gives: last_hidden_state [B, T, D_v], pooler_output [B, D_v]."""
        self._check_config()
        return self.vision_model(pixel_values, interpolate_pos_encoding, **options)

    def get_qformer_features(
        self, pixel_values: Any, interpolate_pos_encoding: bool | None = False, **ignored: Any
    ) -> Any:
        """The Q-Former's last hidden state [B, Q, D_q]; a warning names what is left out."""
        self._check_config()
        if ignored:
            warnings.warn(f"get_qformer_features does not use {', '.join(sorted(ignored))}", stacklevel=2)
        like = Like(pixel_values, self._dtype, self._core)
        pictures = self._pictures(pixel_values, interpolate_pos_encoding, self._wishes({}), like, None)
        return pictures.qformer.last_hidden_state

    def get_text_features(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        labels: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """last_hidden_state [B, T, D_lm] of the language model (of its encoder, where it has one) for texts alone.

        decoder_input_ids, decoder_attention_mask and labels are taken and change nothing, as upstream.
        """
        self._check_config()
        wishes, like = self._wishes(options), Like(input_ids, self._dtype, self._core)
        _refuse_rest("get_text_features", options)
        prompt = self._prompt(None, input_ids, None, attention_mask)
        decoder, encoder = None, ""
        if self.config.is_encoder_decoder:  # one step of the decoder, which changes nothing in the encoder
            start = np.zeros((len(prompt.rows.offsets) - 1, 1), np.int64)
            decoder, encoder = self._decoder(start, None, None, start.shape[0]), "encoder_"
        out, _ = self._language(prompt, decoder, like, wishes._replace(hidden_states=True))
        states = out[f"{encoder}hidden_states"]
        result = ModelOutput(
            last_hidden_state=states[-1],
            pooler_output=None,
            hidden_states=wishes.states(states) if wishes.hidden_states is not False else None,
            attentions=out.get(f"{encoder}attentions"),
        )
        return self._finished(result, return_dict)


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((value for value in values if value is not None), None)


def _refuse_rest(where: str, options: Mapping[str, Any]) -> None:
    if options:
        raise TypeError(f"{where} has no option {', '.join(options)}")


def new_tokens(options: Mapping[str, Any], length: int) -> int:
    """By how many tokens a row of `length` may grow under options of core_options()."""
    bounds = [options["max_new_tokens"], None if options["max_length"] is None else options["max_length"] - length]
    return max(min(int(bound) for bound in bounds if bound is not None), 0)
