"""What happens in Python between the steps of generate(): processors, stopping criteria, streamers, recording.

`Hooks` turns them into the few functions that the C search calls back (csrc/python/py_hooks.h). With any of them all
rows of the batch go on together until the last has ended, as in transformers, because that is what its callables are
made for. Callables of transformers' classes, or classes made of them, get tensors; others get tensors if the model was
given tensors, else NumPy arrays.
Whatever a callable raises comes out of generate() unchanged, and the model stays usable.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c import _core
from blip2c import options as check
from blip2c._core import UnsupportedError
from blip2c.generation import Call
from blip2c.generation_outputs import log_softmax
from blip2c.inputs import to_numpy
from blip2c.steps import Steps
from blip2c.stop_strings import StopStrings

__all__ = ["Hooks"]

Ids = NDArray[np.int64]
Scores = NDArray[np.float32]
Processor = Callable[[Ids, Scores], Scores]
Range = tuple[str, str | None]

# A processor of transformers' own class takes the place of the rule that its option would have made.
REPLACES = {
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "NoBadWordsLogitsProcessor": "bad_words_ids",
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "min_new_tokens",
    "PrefixConstrainedLogitsProcessor": "prefix_allowed_tokens_fn",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
}


class Hooks:
    """The Python side of one call of generate().

    prompts: int64 [B, T], what callables see in front of the new tokens. rule_ids: int32 [B, T'], what the rules of the
    C part see there (-1: an image feature). skip: int64 [B] or None, leading ids that the repetition penalty does not
    see. tensors: the model was given tensors. unconditional(ids [n, t], mask [n, t]) -> logits [n, V]: the language
    model without a picture, for guidance_scale; None where it can not be had. states: the watcher of the model's calls,
    where hidden states or attention weights are wanted.

    functions: for the C part, None where nothing is to be called. logits, scores: what was recorded, [rows, V] a step.
    """

    def __init__(
        self,
        call: Call,
        prompts: Ids,
        *,
        rule_ids: NDArray[np.int32],
        vocabulary: int,
        skip: Ids | None = None,
        tensors: bool = False,
        unconditional: Callable[[Ids, NDArray[np.uint8]], Scores] | None = None,
        states: Steps | None = None,
    ) -> None:
        self._call = call
        self._prompts = prompts
        self._rules = rule_ids
        self._vocabulary = vocabulary
        self._skip = skip
        self._tensors = tensors
        self._started = 0.0
        self._ended: NDArray[np.bool_] | None = None
        self.states = states
        self.logits: list[Scores] = []
        self.scores: list[Scores] = []
        self._streamer = _checked_streamer(call)
        self._criteria = _listed("stopping_criteria", call["stopping_criteria"])
        self._stops = self._stop_functions()
        self._steps = self._processors(unconditional)
        record = call["return_dict_in_generate"] is True
        functions: dict[str, Any] = {}
        self._processes = any(not isinstance(step, tuple) for step in self._steps)
        if self._processes:
            functions["process"] = self._process
        if self._stops:
            functions["stop"] = self._stop
        if self._streamer is not None:
            functions["put"] = self._put
        self._keeps_logits = record and call["output_logits"] is True
        if self._keeps_logits or states is not None:
            functions["logits"] = self._keep_logits
        if record and call["output_scores"] is True:
            functions["scores"] = self.scores.append
        self.functions = functions or None

    def begin(self) -> None:
        """Just before the search: the clock of max_time starts, a streamer gets the prompts."""
        self._started = time.time()
        if self._streamer is not None:
            rows = self._call.core["num_return_sequences"] if self._call.core["num_beams"] == 1 else 1
            self._streamer.put(self._given(np.repeat(self._prompts, rows, axis=0), self._streamer))

    def end(self) -> None:
        """After the search."""
        if self._streamer is not None:
            self._streamer.end()

    # -- processors ----------------------------------------------------------------------------------------------

    def _processors(self, unconditional: Any) -> list[Range | Processor]:
        """Callables, and between them ranges of rules that the C part applies, in transformers' order."""
        call = self._call
        placed: dict[str, list[Processor]] = {}
        replaced: set[str] = set()
        if _guides(call):
            placed["sequence_bias"] = [_Guidance(call, unconditional)]
        for processor in _listed("logits_processor", call["logits_processor"]):
            rule = REPLACES.get(_upstream_name(processor, "logits_process"), "")
            if rule in _active_rules(call) and rule not in replaced:
                _warn_of_replaced(processor, rule)
                replaced.add(rule)
                placed.setdefault(rule, []).append(self._wrapped(processor))
            else:
                placed.setdefault("logits_processor", []).append(self._wrapped(processor))
        prefix = call["prefix_allowed_tokens_fn"]
        if prefix is not None and "prefix_allowed_tokens_fn" not in replaced:
            placed["prefix_allowed_tokens_fn"] = [self._constrained(prefix)]
        if call["watermarking_config"] is not None:
            placed["renormalize_logits"] = [self._wrapped(_watermark(call["watermarking_config"], self._vocabulary))]
        return _in_order(placed, replaced)

    def _process(self, new: Ids, scores: Scores) -> Scores:
        ids = self._behind_prompts(new)
        times = scores.shape[0] // self._prompts.shape[0]
        rules = np.concatenate([np.repeat(self._rules, times, axis=0), new], axis=1, dtype=np.int32)
        skip = None if self._skip is None else np.repeat(self._skip, times)
        for step in self._steps:
            if isinstance(step, tuple):
                scores = _core.apply_rules(scores, rules, self._rules.shape[1], skip, self._call.core, *step)
            else:
                scores = step(ids, scores)
        return scores

    def _wrapped(self, processor: Any) -> Processor:
        if not callable(processor):
            raise TypeError(f"logits_processor: expected callables, found {type(processor).__name__}")

        def call(ids: Ids, scores: Scores) -> Scores:
            result = to_numpy(processor(self._given(ids, processor), self._given(scores, processor)))
            if result.shape != scores.shape or result.dtype.kind != "f":
                raise ValueError(
                    f"logits_processor: {_name(processor)} returned {result.dtype} {list(result.shape)},"
                    f" expected floats {list(scores.shape)}"
                )
            if np.isnan(result).any():
                raise _core.NumericError(f"logits_processor: {_name(processor)} returned NaN")
            return np.ascontiguousarray(result, np.float32)

        return call

    def _constrained(self, allowed: Any) -> Processor:
        """Source: transformers' PrefixConstrainedLogitsProcessor."""
        if not callable(allowed):
            raise TypeError(f"prefix_allowed_tokens_fn: expected a callable, found {type(allowed).__name__}")

        def call(ids: Ids, scores: Scores) -> Scores:
            beams = self._call.core["num_beams"]
            mask = np.full_like(scores, -np.inf)
            for row in range(ids.shape[0]):
                item = row // beams
                mask[row, _allowed(allowed(item, self._given(ids[row], allowed)), item, scores.shape[1])] = 0
            result = scores + mask
            # Where the allowed tokens of every beam are forbidden already, the constraint holds all the same.
            nothing = np.isneginf(result.max(axis=1)).reshape(-1, beams).all(axis=1).repeat(beams)
            return np.where(nothing[:, None], mask, result)

        return call

    # -- stopping ------------------------------------------------------------------------------------------------

    def _stop_functions(self) -> list[Callable[[Ids], Any]]:
        names = {_upstream_name(criterion, "stopping_criteria") for criterion in self._criteria}
        stops: list[Callable[[Ids], Any]] = []
        limit = self._call["max_time"]
        if limit is not None:
            seconds = check.number("max_time", limit)
            if "MaxTimeCriteria" not in names:
                stops.append(lambda ids: time.time() - self._started > seconds)
        strings = self._call["stop_strings"]
        if strings is not None and "StopStringCriteria" not in names:
            spoken = StopStrings(strings, self._call["tokenizer"])
            stops.append(lambda ids: np.array([spoken.ends(row) for row in ids.tolist()]))
        for criterion in self._criteria:
            self._check_criterion(criterion)
            stops.append(self._criterion(criterion))
        return stops

    def _check_criterion(self, criterion: Any) -> None:
        name = _upstream_name(criterion, "stopping_criteria")
        if not callable(criterion):
            raise TypeError(f"stopping_criteria: expected callables, found {type(criterion).__name__}")
        if name == "MaxLengthCriteria":
            limit = _limit(self._call.core, self._prompts.shape[1])
            if criterion.max_length > limit:  # upstream it takes the place of max_length
                raise UnsupportedError(
                    f"stopping_criteria: MaxLengthCriteria({criterion.max_length}) is longer than max_length ({limit});"
                    " set max_length"
                )
        if name == "EosTokenCriteria" and self._call.core["eos_ids"]:
            given = {int(i) for i in to_numpy(criterion.eos_token_id).reshape(-1)}
            if given != set(self._call.core["eos_ids"]):
                raise UnsupportedError(
                    "stopping_criteria: EosTokenCriteria beside another eos_token_id; set eos_token_id"
                )

    def _criterion(self, criterion: Any) -> Callable[[Ids], Any]:
        def call(ids: Ids) -> Any:
            scores = None
            if "scores" in (self.functions or {}):
                scores = tuple(self._given(row, criterion) for row in self.scores)
            return to_numpy(criterion(self._given(ids, criterion), scores))

        return call

    def _stop(self, new: Ids) -> NDArray[np.bool_]:
        ids = self._behind_prompts(new)
        ends = np.zeros(ids.shape[0], np.bool_)
        for stop in self._stops:
            flags = np.asarray(stop(ids))
            if flags.dtype != np.bool_ or flags.shape not in ((), (1,), ends.shape):
                raise ValueError(
                    f"stopping_criteria: expected bool [{ends.shape[0]}], found {flags.dtype} {list(flags.shape)}"
                )
            ends |= flags
        if self._call.core["num_beams"] > 1 or self._pads_ended_rows():
            return ends
        # Without an end token transformers lets ended rows speak on until the last has ended.
        self._ended = ends if self._ended is None else self._ended | ends
        return np.full_like(ends, self._ended.all())

    def _pads_ended_rows(self) -> bool:
        return bool(self._call.core["eos_ids"]) or any(hasattr(c, "eos_token_id") for c in self._criteria)

    # -- recording -----------------------------------------------------------------------------------------------

    def _keep_logits(self, logits: Scores) -> None:
        """After each model call."""
        if self._keeps_logits:
            # A processor may write into what it is given.
            self.logits.append(logits.copy() if self._processes else logits)
        if self.states is not None:
            self.states.end_step()

    # -- giving --------------------------------------------------------------------------------------------------

    def _put(self, tokens: Ids) -> None:
        self._streamer.put(self._given(tokens, self._streamer))

    def _behind_prompts(self, new: Ids) -> Ids:
        times = new.shape[0] // self._prompts.shape[0]
        return np.concatenate([np.repeat(self._prompts, times, axis=0), new], axis=1)

    def _given(self, array: NDArray[Any], callable_: Any) -> Any:
        torch = sys.modules.get("torch")
        kinds = type(callable_).__mro__
        wants = self._tensors or any(kind.__module__.startswith("transformers.") for kind in kinds)
        return torch.from_numpy(array) if wants and torch is not None else array


class _Guidance:
    """guidance_scale: log p + (scale - 1) (log p - log q), q being the language model without the picture.

    The row that q reads begins with negative_prompt_ids, or with the prompt's last token, and grows by the tokens that
    the row of the same number gets; as upstream it is not reordered when beams change places.
    Source: transformers' UnbatchedClassifierFreeGuidanceLogitsProcessor.
    """

    def __init__(self, call: Call, unconditional: Any) -> None:
        if unconditional is None:
            raise UnsupportedError(f"guidance_scale={call['guidance_scale']!r}: not with an encoder-decoder")
        self._scale = np.float32(check.number("guidance_scale", call["guidance_scale"]))
        self._ask = unconditional
        ids, mask = call["negative_prompt_ids"], call["negative_prompt_attention_mask"]
        self._ids: Ids | None = None if ids is None else to_numpy(ids).astype(np.int64)
        self._mask: NDArray[np.uint8] | None = None if mask is None else to_numpy(mask).astype(np.uint8)
        self._begun = False

    def __call__(self, ids: Ids, scores: Scores) -> Scores:
        last = ids[:, -1:]
        if self._ids is None:
            self._ids = last
        elif self._begun:
            self._ids = np.concatenate([self._ids, last], axis=1)
        if self._mask is None:
            self._mask = np.ones(self._ids.shape, np.uint8)
        elif self._begun:
            self._mask = np.concatenate([self._mask, np.ones(last.shape, np.uint8)], axis=1)
        self._begun = True
        if self._ids.shape[0] != ids.shape[0] or self._mask.shape != self._ids.shape:
            raise ValueError(
                f"negative_prompt_ids: expected {ids.shape[0]} rows and a mask of the same shape, found"
                f" {list(self._ids.shape)} and {list(self._mask.shape)}"
            )
        without = log_softmax(self._ask(self._ids, self._mask))
        return self._scale * (log_softmax(scores) - without) + without


def _guides(call: Call) -> bool:
    scale = call["guidance_scale"]
    if scale is not None and scale != 1:
        return True
    for name in ("negative_prompt_ids", "negative_prompt_attention_mask"):
        if call[name] is not None:
            warnings.warn(f"`{name}` has no effect without `guidance_scale`", stacklevel=6)
    return False


def _in_order(placed: dict[str, list[Processor]], replaced: set[str]) -> list[Range | Processor]:
    steps: list[Range | Processor] = []
    first: str | None = _core.RULES[0]
    for rule, after in zip(_core.RULES, (*_core.RULES[1:], None), strict=True):
        if rule not in placed:
            continue
        if first is not None and first != rule:
            steps.append((first, rule))
        steps += placed[rule]
        first = after if rule in replaced else rule
    if first is not None:
        steps.append((first, None))
    return steps


def _active_rules(call: Call) -> set[str]:
    """The rules that the options of the call make; transformers would have built a processor for each."""
    core, options = call.core, call.options
    least = max(core["min_length"], core["min_new_tokens"] or 0)
    made = {
        "sequence_bias": "biased" in core,
        "repetition_penalty": core["repetition_penalty"] != 1,
        "no_repeat_ngram_size": core["no_repeat_ngram_size"] > 0,
        "min_length": bool(core["eos_ids"]) and least > 0,
        "min_new_tokens": bool(core["eos_ids"]) and (core["min_new_tokens"] or 0) > 0,
        "prefix_allowed_tokens_fn": call["prefix_allowed_tokens_fn"] is not None,
        "remove_invalid_values": core["remove_invalid_values"],
    }
    names = set(REPLACES.values()) - set(made)
    return {name for name, is_made in made.items() if is_made} | {n for n in names if options[n] is not None}


def _allowed(ids: Any, item: int, vocabulary: int) -> NDArray[np.int64]:
    result = to_numpy(ids).reshape(-1)
    if result.size == 0:
        raise ValueError(
            f"`prefix_allowed_tokens_fn` returned an empty list for batch ID {item}. This means that the constraint is"
            " unsatisfiable. Please check your implementation of `prefix_allowed_tokens_fn`"
        )
    if result.dtype.kind not in "iu" or result.min() < 0 or result.max() >= vocabulary:
        raise ValueError(f"prefix_allowed_tokens_fn: batch ID {item}: expected ids from 0 to {vocabulary - 1}")
    return result.astype(np.int64)


def _watermark(config: Any, vocabulary: int) -> Any:
    if not hasattr(config, "construct_processor"):
        raise UnsupportedError(
            f"watermarking_config={config!r}: blip2c does not do it, but takes transformers.WatermarkingConfig objects"
        )
    return config.construct_processor(vocabulary, "cpu")


def _limit(core: dict[str, Any], prompt: int) -> int:
    bounds = [core["max_length"], None if core["max_new_tokens"] is None else prompt + core["max_new_tokens"]]
    return min(int(bound) for bound in bounds if bound is not None)


def _listed(name: str, value: Any) -> list[Any]:
    """A list, LogitsProcessorList or StoppingCriteriaList without repetitions; [] for None."""
    if value is None:
        return []
    if callable(value) and not isinstance(value, Iterable):
        raise TypeError(f"{name}: expected a list of callables, found {type(value).__name__}")
    result: list[Any] = []
    for item in value:
        if not any(item is other for other in result):
            result.append(item)
    return result


def _upstream_name(item: Any, module: str) -> str:
    """The class's name if it is one of transformers' own in generation/<module>.py, else ""."""
    kind = type(item)
    return kind.__name__ if kind.__module__ == f"transformers.generation.{module}" else ""


def _checked_streamer(call: Call) -> Any:
    streamer = call["streamer"]
    if streamer is None:
        return None
    if not callable(getattr(streamer, "put", None)) or not callable(getattr(streamer, "end", None)):
        raise TypeError(f"streamer: expected put() and end(), found {type(streamer).__name__}")
    if call.core["num_beams"] > 1:
        raise ValueError("`streamer` cannot be used with beam search (yet!). Make sure that `num_beams` is set to 1.")
    return streamer


def _warn_of_replaced(processor: Any, rule: str) -> None:
    warnings.warn(
        f"A custom logits processor of type {type(processor)} has been passed to `.generate()`, but `{rule}` asks for"
        " one of this type too. The custom one takes precedence.",
        stacklevel=6,
    )


def _name(item: Any) -> str:
    return str(getattr(item, "__name__", type(item).__name__))
