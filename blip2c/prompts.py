"""From pictures and prompts of one model to what its C part takes, and from its ids back to words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c._core import DeviceArray, NumericError, Prefix, UnsupportedError
from blip2c.callables import Hooks
from blip2c.captions import Caption, Captions
from blip2c.forward import Blip2WithQFormer, decoder_arguments
from blip2c.generation import Call
from blip2c.images import load_image
from blip2c.inputs import DecoderRows, Floats, check_pixels, check_positions, pack_ragged, pack_texts
from blip2c.modeling import Blip2ForConditionalGeneration, new_tokens
from blip2c.processing import Blip2Processor, InstructBlipProcessor
from blip2c.tokenizer import Blip2Tokenizer

__all__ = ["ROW_ERRORS", "Plan", "Prompts", "read_pixels", "shared_beginning"]

# What one row may raise without being the fault of the others.
ROW_ERRORS = (ValueError, TypeError, OSError, NumericError)

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """What a call asks for. decoder: what every text of an encoder-decoder begins with, one row; else None."""

    call: Call
    decoder: DecoderRows | None

    @property
    def options(self) -> dict[str, Any]:
        """The C part's: see blip2c.generation.core_options()."""
        return self.call.core

    @property
    def ends(self) -> set[int]:
        """The ids that end a text."""
        return {int(i) for i in np.atleast_1d(np.asarray(self.options.get("eos_ids", []), np.int64))}


class Prompts:
    """Pictures and prompts for one model. Holds no state beside it; may be used by any number of threads."""

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor) -> None:
        self.model = model
        self.processor = processor
        self.words_tokenizer = processor.qformer_tokenizer if isinstance(processor, InstructBlipProcessor) else None
        self.queries = int(model._core_config["num_query_tokens"])

    @property
    def keeps_prefixes(self) -> bool:
        """Whether beginnings of prompts can be read once and kept: not by an encoder, which reads a prompt as a whole,
        and not where the picture's features depend on the prompt."""
        return not self.model.config.is_encoder_decoder and self.words_tokenizer is None

    def plan(self, generate_options: dict[str, Any]) -> Plan:
        """What generate()'s options mean here. Raises for what is unknown, wrong or not done."""
        options = dict(generate_options)
        if options.get("tokenizer") is None:
            options["tokenizer"] = self.processor.tokenizer
        decoder = self.model._begin_decoder(options, 1) if self.model.config.is_encoder_decoder else None
        call = self.model._call(options, [])
        if call.outputs is not None:
            raise UnsupportedError(
                f"{call.outputs}={call[call.outputs]!r}: this gives words; use the generate() of `model.model`"
            )
        return Plan(call, decoder)

    def pixels(self, picture: Any) -> F32:
        """[1, 3, S, S] of anything that load_image() takes. Raises ROW_ERRORS."""
        return read_pixels(self.model, self.processor, picture)

    def encode(self, pixels: F32) -> Floats:
        """[B, 3, S, S] to the image features [B, Q, D_lm]; where the Q-Former reads the prompt, too, to the image
        embeddings [B, T, Dv]. They stay where the model is."""
        core = self.model._core
        encode = core.encode if self.words_tokenizer is None else core.vision
        encoded: Floats = encode(pixels, on_device=core.device != "cpu")
        return encoded

    def features(self, encoded: Floats, prompt: str | None) -> Floats:
        """What encode() gave of one picture as the language model reads it, [Q, D_lm]."""
        core = self.model._core
        if isinstance(encoded, DeviceArray) and encoded.device != core.device:  # the model has been moved
            encoded = encoded.numpy()
        if self.words_tokenizer is None:
            return encoded
        words = pack_texts([self._words(self.words_tokenizer, prompt)])
        features: Floats = core.read(encoded[None], words, on_device=core.device != "cpu")[0]
        return features

    def ids(self, prompt: str | None, plan: Plan) -> list[int]:
        """Ids of a prompt behind its image. Raises ValueError for a prompt that the model has no room for."""
        model, options = self.model, plan.options
        if prompt is None and model.config.text_config.get("bos_token_id") is not None:
            ids = [int(model._start_ids(1)[0, -1])]
        elif prompt is None or isinstance(prompt, str):
            ids = list(self.processor.tokenizer(prompt or "")["input_ids"])
        else:
            raise TypeError(f"a prompt must be a string, found {type(prompt).__name__}")
        vocabulary = int(model._core_config["text"]["vocab_size"])
        if not ids:
            raise ValueError("the prompt is empty, and the tokenizer puts nothing in front of it")
        if max(ids) >= vocabulary:
            raise ValueError(f"prompt: token {max(ids)} is outside the model's vocabulary of {vocabulary}")
        if model._image_token is not None and model._image_token in ids:
            raise ValueError("the prompt holds <image>: the picture is put in front by itself")
        length = self.queries + len(ids) if plan.decoder is None else len(plan.decoder.ids)
        room = new_tokens(options, length)
        if room == 0:
            what = "the decoder begins with {} tokens"
            if plan.decoder is None:
                what = "the prompt is {} tokens long, image included"
            raise ValueError(f"{what.format(length)}; max_length is {options['max_length']}")
        check_positions(pack_ragged([ids], model._image_token, self.queries), model._positions, room)
        if self.words_tokenizer is not None:
            self._words(self.words_tokenizer, prompt)
        return ids

    def behind(self, ids: Sequence[int], known: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """What the model has yet to read of picture and ids, of which it knows `known` tokens (0, or the picture at
        least), and the same as the rules see it: int32 [Q + len(ids) - known]."""
        rows = pack_ragged([list(ids)], self.model._image_token, self.queries)
        return rows.ids[known:], rows.rule_ids[known:]

    def generate(
        self,
        plan: Plan,
        features: Floats | None,
        new: NDArray[np.int32],
        rules: NDArray[np.int32],
        prefix: Prefix | None,
        *,
        key: int = 0,
        keep: bool = False,
    ) -> dict[str, Any]:
        """One prompt by itself, with Python between the steps where the plan wants it; see _core.Model.generate().

        features, new, rules: of what stands behind prefix (rules: of an encoder-decoder the decoder's ids).
        """
        model, decoder = self.model, plan.decoder
        seen = rules if prefix is None else np.concatenate([prefix.rule_ids, rules])
        hooks = Hooks(
            plan.call,
            seen[seen >= 0].astype(np.int64)[None],
            rule_ids=seen[None],
            vocabulary=model._vocabulary,
            unconditional=None if decoder is not None else model._without_picture,
        )
        hooks.begin()
        out = model._core.generate(
            None if features is None else features[None],
            new,
            np.array([0, len(new)], np.int64),
            None,
            rules,
            plan.options,
            hooks=hooks.functions,
            prefixes=None if prefix is None else [prefix],
            keys=np.array([key], np.uint64),
            keep=keep,
            **({} if decoder is None else decoder_arguments(decoder)),
        )
        hooks.end()
        return out

    def texts(self, plan: Plan, found: Mapping[str, Any], name: str) -> Any:
        """Results of one prompt as words: a Caption, or Captions where num_return_sequences asks for several.

        name: the picture's.
        """
        rows = zip(found["ids"], found["lengths"], strict=True)
        texts = [self._caption(ids[: int(length)], plan.ends) for ids, length in rows]
        return texts[0] if plan.options["num_return_sequences"] == 1 else Captions(texts, [name] * len(texts))

    def _caption(self, ids: Any, ends: set[int]) -> Caption:
        new = [int(i) for i in ids]
        text = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
        return Caption(text, new, finished=bool(new) and new[-1] in ends)

    def words(self, prompt: str | None) -> list[int] | None:
        """The prompt as the Q-Former reads it; None where it reads no text and none is given. Raises ValueError where
        there is no room for it, UnsupportedError for a prompt that nobody would read."""
        if self.words_tokenizer is None and prompt is not None:
            raise UnsupportedError("prompt: this model's Q-Former reads no text")
        return None if self.words_tokenizer is None else self._words(self.words_tokenizer, prompt)

    def _words(self, tokenizer: Blip2Tokenizer, prompt: str | None) -> list[int]:
        ids = list(tokenizer(prompt or "")["input_ids"])
        qformer: Mapping[str, Any] = self.model._core_config["qformer"]
        if len(ids) > int(qformer["max_position_embeddings"]):
            raise ValueError(
                f"the prompt is {len(ids)} tokens long for the Q-Former, which has positions for"
                f" {qformer['max_position_embeddings']}"
            )
        if max(ids, default=0) >= int(qformer["vocab_size"]):
            raise ValueError(
                f"prompt: token {max(ids)} is outside the Q-Former's vocabulary of {qformer['vocab_size']}"
            )
        return ids


def read_pixels(model: Blip2WithQFormer, processor: Blip2Processor, picture: Any) -> F32:
    """[1, 3, S, S] of anything that load_image() takes. Raises ROW_ERRORS."""
    values = processor.image_processor(load_image(picture), return_tensors="np")["pixel_values"]
    pixels: F32 = check_pixels(values, int(model._core_config["vision"]["image_size"]))
    return pixels


def shared_beginning(rows: Sequence[list[int]]) -> int:
    """How many ids all rows begin with."""
    first, last = min(rows), max(rows)
    for place, (a, b) in enumerate(zip(first, last, strict=False)):
        if a != b:
            return place
    return min(len(first), len(last))
