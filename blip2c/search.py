"""Greedy search, sampling and beam search over a step function of your own: search without a model around it.

A step function is asked "these are the sequences so far: what comes next?" and answers with logits. It keeps no
memory between calls, so a table, a formula or a PyTorch model all do::

    import numpy as np
    from blip2c.search import beam_search, greedy_search

    table = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)

    def step(sequences):                 # int64 [n, t]
        return table[sequences[:, -1]]   # float32 [n, 8]: a Markov chain looks at the last token only

    greedy_search(step, [[3, 4]], max_new_tokens=5)
    beam_search(step, [[3, 4]], max_new_tokens=5, num_beams=3, num_return_sequences=3)

The search is the one that blip2c's models use (csrc/generate), and gives what transformers 5.23's `generate()` gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c import _core
from blip2c.generation import GenerationConfig, core_options

__all__ = ["SearchResult", "beam_search", "greedy_search", "sample_search"]

Step = Callable[[Any], NDArray[np.float32]]


@dataclass(frozen=True)
class SearchResult:
    """What a search found. Row b * num_return_sequences + j is the j-th best sequence of prompt b.

    ids: int64 [rows, T], new tokens only, the end token included, filled up with pad_token_id.
    lengths: int64 [rows], tokens of each row before the filling.
    scores: float32 [rows], sum of log-probabilities / length ** length_penalty; 0 in greedy search.
    steps: calls of the step function after the first.
    """

    ids: NDArray[np.int64]
    lengths: NDArray[np.int64]
    scores: NDArray[np.float32]
    steps: int

    @property
    def sequences(self) -> list[list[int]]:
        """The new tokens of each row without the filling."""
        return [row[:length].tolist() for row, length in zip(self.ids, self.lengths, strict=True)]


def greedy_search(step: Step, prompts: NDArray[np.int64] | Sequence[Sequence[int]], **options: Any) -> SearchResult:
    """Appends the likeliest token again and again, the first of equals.

    step(sequences) -> float32 [n, V]: logits of the token after each of n sequences. `sequences` is an int64 array
    [n, t] if all prompts are equally long, else a list of n int64 arrays [t_i]; rows that have ended are left out.
    An exception that it raises comes out as it is.

    prompts: int [B, t], or B sequences of ints, which need not be equally long: each row counts from its own prompt
    and gets what it would get alone.

    options, under transformers' names: max_new_tokens (20) or max_length, min_new_tokens or min_length,
    eos_token_id (an int, a list or None), pad_token_id, repetition_penalty, no_repeat_ngram_size, bad_words_ids,
    sequence_bias, suppress_tokens, begin_suppress_tokens, forced_bos_token_id, forced_eos_token_id,
    exponential_decay_length_penalty, remove_invalid_values, renormalize_logits. See `blip2c.generation.core_options`
    for what is refused.

    Raises ValueError and TypeError naming the option, or what is wrong with the logits; NumericError for NaN or
    infinite logits (-inf forbids a token); ValueError if every token is forbidden.
    Source: transformers 5.23 `GenerationMixin._sample` with do_sample=False.
    """
    if options.get("num_beams", 1) != 1:
        raise ValueError(f"num_beams: greedy_search has one beam, found {options['num_beams']!r}; see beam_search")
    if options.get("do_sample"):
        raise ValueError("do_sample: greedy_search does not draw; see sample_search")
    return _search(step, prompts, options)


def sample_search(step: Step, prompts: NDArray[np.int64] | Sequence[Sequence[int]], **options: Any) -> SearchResult:
    """Draws each token from softmax of the processed logits.

    step, prompts and options as in `greedy_search`. Further options: temperature (1.0), top_k (50, 0: all), top_p
    (1.0), min_p, typical_p (1.0), top_h, epsilon_cutoff, eta_cutoff, num_return_sequences (1), and seed: the same seed
    draws the same for a prompt at the same place of `prompts`, whatever else is there. Without a seed it comes from
    torch's or NumPy's generator (see `blip2c.generation.resolve`).
    Source: transformers 5.23 `GenerationMixin._sample` with do_sample=True; the draws are not torch's.
    """
    if options.get("num_beams", 1) != 1:
        raise ValueError(f"num_beams: sample_search has one beam, found {options['num_beams']!r}; see beam_search")
    return _search(step, prompts, {**options, "do_sample": True})


def beam_search(
    step: Step, prompts: NDArray[np.int64] | Sequence[Sequence[int]], *, num_beams: int, **options: Any
) -> SearchResult:
    """Keeps the num_beams likeliest sequences; returns the best that ended or reached the limit.

    step, prompts and options as in `greedy_search`; rows passed to step are the num_beams running sequences of each
    prompt that has not finished, except at the first call, which gets the prompts themselves. Further options:
    num_return_sequences (1), length_penalty (1.0), early_stopping (False, True or "never"), and do_sample with the
    options of `sample_search`: candidates are then drawn, not picked.
    Source: transformers 5.23 `GenerationMixin._beam_search`.
    """
    return _search(step, prompts, {**options, "num_beams": num_beams})


def _search(step: Step, prompts: Any, options: dict[str, Any]) -> SearchResult:
    rows = [_prompt(row, b) for b, row in enumerate(prompts)]
    if not rows:
        raise ValueError("prompts: expected at least one")
    lengths = [len(row) for row in rows]
    if all(options.get(name) is None for name in ("max_new_tokens", "max_length", "generation_config")):
        options = {**options, "max_new_tokens": 20}
    resolved = core_options(GenerationConfig(), options, lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    result = _core.search(step, np.concatenate(rows), offsets, resolved, len(set(lengths)) == 1)
    return SearchResult(**{name: result[name] for name in ("ids", "lengths", "scores", "steps")})


def _prompt(row: Any, b: int) -> NDArray[np.int32]:
    ids = np.asarray(row)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise TypeError(f"prompts: row {b}: expected a sequence of ints, found {ids.dtype} with {ids.ndim} axes")
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(np.int32).max):
        raise ValueError(f"prompts: row {b}: ids must be from 0 to 2**31 - 1")
    return ids.astype(np.int32)
