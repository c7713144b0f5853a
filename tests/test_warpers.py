"""Rules and warpers, each alone and stacked, against transformers' own classes on random scores."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.generation.utils import GenerationMixin

from blip2c import _core
from blip2c.generation import GenerationConfig, core_options

VOCABULARY = 60
PROMPT = 5
EOS = [2, 7]


class Head(GenerationMixin):  # type: ignore[misc]
    """Just enough of a model for transformers to build its list of processors for the options of a call."""

    def __init__(self, encoder_decoder: bool = False) -> None:
        self.config = transformers.PretrainedConfig(is_encoder_decoder=encoder_decoder)

    def processors(self, options: dict[str, Any], mask: torch.Tensor | None) -> Any:
        config = transformers.GenerationConfig(
            **{"eos_token_id": EOS, "num_beams": 1, "top_k": 0 if options.get("do_sample") else None, **options}
        )
        config.max_length = PROMPT + options["max_new_tokens"]
        if config.min_new_tokens is not None:
            config.min_length = PROMPT + config.min_new_tokens
        eos = config.eos_token_id
        config._eos_token_tensor = None if eos is None else torch.tensor(np.atleast_1d(eos))
        return self._get_logits_processor(
            config, PROMPT, torch.full((1, 1, 1), -100), logits_processor=[], model_kwargs={"attention_mask": mask}
        )


def theirs(scores: np.ndarray, ids: np.ndarray, options: dict[str, Any], skip: np.ndarray | None) -> np.ndarray:
    mask = None
    if skip is not None:
        mask = torch.from_numpy((np.arange(ids.shape[1])[None] >= skip[:, None]).astype(np.int64))
    processors = Head().processors(options, mask)
    result: np.ndarray = processors(torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(scores.copy())).numpy()
    return result


def ours(scores: np.ndarray, ids: np.ndarray, options: dict[str, Any], skip: np.ndarray | None) -> np.ndarray:
    extra = {"top_k": 0} if options.get("do_sample") and "top_k" not in options else {}
    resolved = core_options(GenerationConfig(), {"eos_token_id": EOS, **extra, **options}, [PROMPT])
    return _core.apply_rules(scores, ids.astype(np.int32), PROMPT, skip, resolved, _core.RULES[0], None)


def random_scores(rng: np.random.Generator, vocabulary: int = VOCABULARY, rows: int = 3) -> np.ndarray:
    """Logits or log-probabilities of some spread, a few of them forbidden; sometimes with ties."""
    scores = rng.normal(size=(rows, vocabulary)) * rng.choice([0.3, 1.0, 4.0])
    if rng.random() < 0.3:
        scores[rng.random(scores.shape) < 0.3] = -np.inf
    result = torch.from_numpy(scores.astype(np.float32))
    if rng.random() < 0.4:
        result = result.log_softmax(-1)
    return result.numpy()


def biases(rng: np.random.Generator) -> dict[tuple[int, ...], float]:
    words = {tuple(int(i) for i in rng.integers(0, 12, rng.integers(1, 4))): float(rng.normal()) for _ in range(6)}
    words[(int(rng.integers(0, 12)),)] = float("-inf")
    return words


# Options by name: how to draw a value. Each is also run alone, and must change something.
DRAWS: dict[str, Any] = {
    "sequence_bias": lambda rng: biases(rng),
    "repetition_penalty": lambda rng: float(rng.uniform(0.5, 2.0)),
    "no_repeat_ngram_size": lambda rng: int(rng.integers(1, 4)),
    "bad_words_ids": lambda rng: [[int(i) for i in rng.integers(0, 12, rng.integers(1, 3))] for _ in range(4)],
    "min_new_tokens": lambda rng: int(rng.integers(1, 6)),
    "min_length": lambda rng: int(rng.integers(PROMPT + 1, PROMPT + 6)),
    "forced_eos_token_id": lambda rng: [int(rng.integers(0, VOCABULARY))],
    "remove_invalid_values": lambda rng: True,
    "exponential_decay_length_penalty": lambda rng: (int(rng.integers(0, 3)), float(rng.uniform(0.8, 1.6))),
    "suppress_tokens": lambda rng: [int(i) for i in rng.integers(0, VOCABULARY, 5)],
    "begin_suppress_tokens": lambda rng: [int(i) for i in rng.integers(0, VOCABULARY, 5)],
    "renormalize_logits": lambda rng: True,
}
WARPERS: dict[str, Any] = {
    "temperature": lambda rng: float(rng.uniform(0.2, 3.0)),
    "top_h": lambda rng: float(rng.uniform(0.05, 0.95)),
    "top_k": lambda rng: int(rng.integers(1, 70)),
    "top_p": lambda rng: float(rng.uniform(0.02, 0.98)),
    "min_p": lambda rng: float(rng.uniform(0.0, 1.0)),
    "typical_p": lambda rng: float(rng.uniform(0.02, 0.98)),
    "epsilon_cutoff": lambda rng: float(rng.uniform(1e-4, 0.2)),
    "eta_cutoff": lambda rng: float(rng.uniform(1e-4, 0.9)),
}


def random_case(rng: np.random.Generator, names: list[str]) -> tuple[np.ndarray, np.ndarray, dict[str, Any], Any]:
    made = int(rng.integers(0, 5))
    options: dict[str, Any] = {"max_new_tokens": int(rng.integers(made + 1, made + 3))}
    for name in names:
        options[name] = {**DRAWS, **WARPERS}[name](rng)
    if any(name in WARPERS for name in names):
        options.update(do_sample=True, num_beams=int(rng.choice([1, 1, 3])))
    if "forced_eos_token_id" in options and "suppress_tokens" in options:
        del options["suppress_tokens"]
    if options.get("do_sample"):
        # It makes forbidden tokens equals, and torch.sort, which is not stable, decides which equals stay.
        options.pop("remove_invalid_values", None)
    if "remove_invalid_values" in options and len(options) > 2:
        options.pop("exponential_decay_length_penalty", None)  # a multiple of the largest number: Inf, then NaN
    scores = random_scores(rng)
    if options.get("remove_invalid_values") and "repetition_penalty" not in options:
        scores[:, rng.integers(0, VOCABULARY, 3)] = [np.nan, np.inf, -np.inf]
    ids = rng.integers(0, 12, (scores.shape[0], PROMPT + made))
    skip = rng.integers(0, PROMPT, scores.shape[0]) if rng.random() < 0.5 else None
    return scores, ids, options, skip


def compare(case: tuple[np.ndarray, np.ndarray, dict[str, Any], Any]) -> bool:
    """Asserts equality; returns whether the options changed anything."""
    scores, ids, options, skip = case
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = ours(scores, ids, options, skip)
        if np.isneginf(found).all(axis=1).any():  # nothing is left to say: NaN in transformers, if it does not raise
            return True
        expected = theirs(scores, ids, options, skip)
    if options.get("renormalize_logits"):  # the logarithm of a sum, whose order torch does not fix
        np.testing.assert_array_equal(np.isneginf(found), np.isneginf(expected), err_msg=str(options))
        np.testing.assert_allclose(found, expected, rtol=3e-7, atol=3e-7, err_msg=str(options))
    else:
        np.testing.assert_array_equal(found, expected, err_msg=str(options))
    return not np.array_equal(found, scores, equal_nan=True)


@pytest.mark.parametrize("name", [*DRAWS, *WARPERS])
def test_each_alone_is_as_in_transformers(name: str) -> None:
    rng = np.random.default_rng(sum(map(ord, name)))
    changed = [compare(random_case(rng, [name])) for _ in range(60)]
    assert any(changed)


def run_stacks(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [*DRAWS, *WARPERS]
    for _ in range(count):
        compare(random_case(rng, [name for name in names if rng.random() < 0.3]))


def test_stacks_are_as_in_transformers() -> None:
    run_stacks(400, 1)


@pytest.mark.exhaustive
def test_ten_thousand_stacks_are_as_in_transformers() -> None:
    run_stacks(10_000, 2)


def test_a_decay_beyond_all_floats_leaves_a_score_of_zero() -> None:
    scores = np.zeros((1, VOCABULARY), np.float32)
    scores[0, EOS[0]] = 1.0
    ids = np.full((1, PROMPT + 4), 3)
    found = ours(scores, ids, {"exponential_decay_length_penalty": (1, 1e200), "max_new_tokens": 9}, None)
    assert found[0, EOS[1]] == 0
    assert found[0, EOS[0]] == np.finfo(np.float32).max or found[0, EOS[0]] == np.inf
