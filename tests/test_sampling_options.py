"""Sampling through options: draws have the distribution of transformers' processed probabilities, they follow from the
seed, and a row's do not depend on its company."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import blip2c
from blip2c.generation import GenerationConfig, core_options
from blip2c.search import greedy_search, sample_search
from helpers import prompt_ids, random_checkpoint, random_pixels, reference_model
from test_warpers import Head

VOCABULARY = 24
LOGITS = np.random.default_rng(5).normal(size=VOCABULARY).astype(np.float32) * 2


def step(ids: np.ndarray) -> np.ndarray:
    return np.tile(LOGITS, (ids.shape[0], 1))


def probabilities(**options: Any) -> np.ndarray:
    """What transformers would draw from."""
    options = {"do_sample": True, "max_new_tokens": 3, **options}
    scores = Head().processors(options, None)(torch.zeros(1, 5, dtype=torch.long), torch.from_numpy(LOGITS[None]))
    return scores.softmax(-1)[0].double().numpy()


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    """In standard deviations from what is expected of so many cells; forbidden tokens must not occur at all."""
    assert counts[expected == 0].sum() == 0
    cells = expected > 0
    wanted = expected[cells] * counts.sum()
    statistic = float(((counts[cells] - wanted) ** 2 / wanted).sum())
    freedom = int(cells.sum()) - 1
    return (statistic - freedom) / (2 * max(freedom, 1)) ** 0.5


SETS: list[dict[str, Any]] = [
    {"top_k": 0},
    {"top_k": 6, "temperature": 1.7},
    {"top_k": 0, "top_p": 0.8, "temperature": 0.9},
    {"top_k": 0, "min_p": 0.05, "repetition_penalty": 1.2},
    {"top_k": 0, "typical_p": 0.7},
]


@pytest.mark.parametrize("options", SETS)
def test_draws_follow_the_probabilities_of_transformers(options: dict[str, Any]) -> None:
    for seed in (1, 2):
        result = sample_search(step, [[0] * 5], max_new_tokens=1, num_return_sequences=20_000, seed=seed, **options)
        counts = np.bincount(result.ids[:, 0], minlength=VOCABULARY)
        assert abs(chi_square(counts, probabilities(**options))) < 4
    wrong = probabilities(**{**options, "temperature": 0.8 * options.get("temperature", 1.0)})
    assert ((wrong > 0) != (counts > 0)).any() or chi_square(counts, wrong) > 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("sampling")
    random_checkpoint(folder, seed=11, gain=1.6)
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)


def inputs(model: Any, batch: int) -> dict[str, Any]:
    return {
        "pixel_values": random_pixels(model.config, batch, seed=1),
        "input_ids": prompt_ids(model.config, batch, 3, seed=2),
    }


@pytest.mark.parametrize("beams", [1, 3])
def test_a_row_draws_the_same_in_any_company(model: Any, beams: int) -> None:
    """The first rows of a batch of four are those of a batch of two; other seeds draw otherwise."""
    options = {"max_new_tokens": 10, "do_sample": True, "num_beams": beams, "seed": 5, "eos_token_id": None}
    four, two = inputs(model, 4), {name: value[:2] for name, value in inputs(model, 4).items()}
    many = model.generate(**four, **options)
    assert model.generate(**two, **options).tolist() == many[:2].tolist()
    assert model.generate(**four, **{**options, "seed": 6}).tolist() != many.tolist()
    assert len({tuple(row[8:]) for row in many.tolist()}) == 4
    assert model.generate(**four, **options).tolist() == many.tolist()


def test_seeds_come_from_torch_where_it_is_loaded(model: Any) -> None:
    batch, options = inputs(model, 1), {"max_new_tokens": 10, "do_sample": True}
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(model.generate(**batch, **options).tolist())
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.generate(**batch, **options).tolist() != drawn[2]
    transformers.set_seed(1)
    assert model.generate(**batch, **options).tolist() == drawn[0]


def test_seeds_come_from_numpy_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch", None)
    seeds = []
    for seed in (1, 1, 2):
        np.random.seed(seed)
        seeds.append(core_options(GenerationConfig(), {"do_sample": True, "max_new_tokens": 2}, [3])["seed"])
    assert seeds[0] == seeds[1] != seeds[2]


def test_sampling_with_one_choice_is_greedy_as_in_transformers(tmp_path: Path) -> None:
    """top_k=1 leaves nothing to draw: the same tokens as transformers, through all that sampling does."""
    random_checkpoint(tmp_path, seed=12, gain=1.6)
    ours = blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    theirs = reference_model(tmp_path)
    batch = {name: torch.from_numpy(value) for name, value in inputs(ours, 2).items()}
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "top_k": 1, "repetition_penalty": 1.4}
    options |= {"num_return_sequences": 2, "eos_token_id": [9, 2], "return_dict_in_generate": True}
    options |= {"output_scores": True, "output_logits": True}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mine, yours = ours.generate(**batch, **options), theirs.generate(**batch, **options)
    assert mine.sequences.tolist() == yours.sequences.tolist()
    for name in ("scores", "logits"):
        for a, b in zip(mine[name], yours[name], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-3)


def test_what_does_not_draw_says_so() -> None:
    with pytest.raises(ValueError, match="do_sample: greedy_search does not draw"):
        greedy_search(step, [[1]], do_sample=True)
    with pytest.raises(ValueError, match="num_beams: sample_search has one beam"):
        sample_search(step, [[1]], num_beams=2)
