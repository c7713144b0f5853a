"""Searches on a device that run ahead (BLIP2C_STEPS_AHEAD): the same tokens and bits of scores as step by step, and the
tokens of the processor, in fewer waits.

The host chooses again by the shortlists of the log, so that a wrong forecast costs time and no token; what shows one is
that more graphs are launched than runs are needed.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2c
from blip2c import _core
from cuda_build import ROOT, backend_sources, host_library
from helpers import prompt_ids, random_checkpoint, random_pixels
from running import run_python
from test_cuda_encode import GRAPHS, WAITS, counts, on_the_host
from test_cuda_shortlist import random_search
from test_generate import core_inputs, core_options
from test_kernels import interrupted

NEW = 13
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.5},
    {"num_beams": 4, "num_return_sequences": 2, "early_stopping": True},
    {"num_beams": 2, "num_return_sequences": 2, "early_stopping": "never", "length_penalty": 2.0},
]


def load(folder: Path, device: str) -> Any:
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=device)


@pytest.fixture(scope="module")
def pairs(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Any, Any]]:
    """Of each family the model on the processor and on the device."""
    folders = {
        family: random_checkpoint(tmp_path_factory.mktemp(family), seed=8, family=family)
        for family in ("opt", "llama", "t5")
    }
    return {family: (load(folder, "cpu"), load(folder, cuda)) for family, folder in folders.items()}


def ask(model: Any, rows: int, **options: Any) -> dict[str, np.ndarray]:
    """The second row has a pad in front."""
    ids = prompt_ids(model.config, rows, 8)
    mask = np.ones_like(ids)
    mask[1:2, 0] = 0
    given = {"max_new_tokens": NEW, "return_dict_in_generate": True, **options}
    found = model.generate(random_pixels(model.config, rows), ids, attention_mask=mask, **given)
    names = ("sequences", "sequences_scores", "beam_indices")
    return {name: np.asarray(found[name]) for name in names if found.get(name) is not None}


def assert_same(
    monkeypatch: pytest.MonkeyPatch, pair: tuple[Any, Any], runs: list[int], rows: int, **options: Any
) -> None:
    """The same arrays as step by step; the same tokens as on the processor."""
    here, there = pair
    monkeypatch.setenv("BLIP2C_STEPS_AHEAD", "0")
    want = ask(there, rows, **options)
    assert np.array_equal(want["sequences"], ask(here, rows, **options)["sequences"]), options
    for run in runs:
        monkeypatch.setenv("BLIP2C_STEPS_AHEAD", str(run))
        for name, values in ask(there, rows, **options).items():
            assert np.array_equal(values, want[name]), (run, name, options)


@pytest.mark.parametrize("family", ["opt", "llama", "t5"])
@pytest.mark.parametrize("beams", [0, 1])
def test_runs_of_every_length_say_the_same(
    family: str, beams: int, pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [3, 8] if beams or family != "opt" else [1, 2, 3, 4, 5, 6, 7, 8]
    assert_same(monkeypatch, pairs[family], runs, 2, **BEAMS[beams])


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(s, marks=pytest.mark.exhaustive) for s in range(3, 150))])
def test_random_options_say_the_same(
    seed: int, pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(seed)
    pair = pairs[["opt", "llama", "t5"][seed % 3]]
    options = random_search(rng, pair[0].config.text_config.vocab_size) | {"max_new_tokens": int(rng.integers(6, 12))}
    assert_same(monkeypatch, pair, [1 + seed % 8], 1 + seed % 3, **options)


def rules_about(said: list[int]) -> list[dict[str, Any]]:
    """Options under which these new tokens are not said again."""
    words = [[said[3]], [said[5], said[6]], [*said[7:9], said[9]]]
    return [
        {},
        {"repetition_penalty": 2.5},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": words},
        {"suppress_tokens": said[2:4]},
        {"sequence_bias": {tuple(word): -4.0 for word in words} | {(said[8],): 1.5}},
        {"eos_token_id": [said[3], said[6]], "min_new_tokens": 7},
        {"eos_token_id": [said[3], 40], "exponential_decay_length_penalty": (1, 0.5)},
    ]


@on_the_host
@pytest.mark.parametrize("rules", range(8))
@pytest.mark.parametrize("beams", [0, 1, *(pytest.param(b, marks=pytest.mark.exhaustive) for b in (2, 3))])
def test_what_is_forecast_comes_true(
    beams: int, rules: int, pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch encodes, one is for each four steps, once the shape has been recorded."""
    here, there = pairs["opt"]
    said = ask(here, 1, **BEAMS[beams])["sequences"]
    length = said.shape[1] - NEW
    options = BEAMS[beams] | rules_about(said[0, length:].tolist())[rules]
    monkeypatch.setenv("BLIP2C_STEPS_AHEAD", "4")
    for _ in range(2):
        before = counts()
        found = ask(there, 1, **options)["sequences"]
        asked = counts() - before
    assert rules == 0 or not np.array_equal(found, said)
    longest = NEW if beams else found.shape[1] - length
    assert 0 < asked[GRAPHS] <= 1 + math.ceil((longest - 1) / 4), options


@on_the_host
def test_fewer_waits(pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, there = pairs["opt"]
    waits = {}
    for run in ("0", "4", "8"):
        monkeypatch.setenv("BLIP2C_STEPS_AHEAD", run)
        ask(there, 1)
        before = counts()
        ask(there, 1)
        waits[run] = (counts() - before)[WAITS]
    assert waits["0"] > waits["4"] + 2 * (NEW - 1) - 8
    assert waits["4"] > waits["8"]


@pytest.mark.parametrize("beams", [1, 3])
def test_rows_end_at_different_steps_within_a_run(
    beams: int, pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """End tokens are what the rows say at their second, fifth and seventh step."""
    here, _ = pairs["opt"]
    sequences = ask(here, 3)["sequences"]
    prompt, said = sequences[:, :-NEW], sequences[:, -NEW:]
    ends = [int(said[0, 1]), int(said[1, 4]), int(said[2, 6])]
    found = ask(here, 3, eos_token_id=ends, num_beams=beams)["sequences"][:, prompt.shape[1] :]
    assert beams > 1 or len(set(np.isin(found, ends).argmax(axis=1))) > 1
    assert_same(monkeypatch, pairs["opt"], [4, 7], 3, eos_token_id=ends, num_beams=beams)


WRONG = {
    "return is_one_of(c.suppress_ids, c.suppress_count, id) ? -INFINITY : score;": "return first;",
    "float ruled(const b2_choice &c, const history &h, float score, int32_t id)\n{": "\\g<0>\n    float first = score;",
    "bool settled = best[0] != 0 && value_of(best[0]) > -INFINITY;": "bool settled = best[0] != 0;",
    "settled = best[c + 1] != 0 && value_of(best[c]) > value_of(best[c + 1]);": "settled = best[c + 1] != 0;",
}
SCRIPT = """
import json, os, sys
import blip2c
from cuda_build import ROOT, backend_sources, host_library
from helpers import prompt_ids, random_pixels
model = blip2c.Blip2ForConditionalGeneration.from_pretrained(sys.argv[1], device="cuda")
given = random_pixels(model.config, 2), prompt_ids(model.config, 2, 8)
for options in json.loads(sys.argv[2]):
    said = []
    for run in ("0", "4"):
        os.environ["BLIP2C_STEPS_AHEAD"] = run
        said.append(model.generate(*given, max_new_tokens=8, **options).tolist())
    assert said[0] == said[1], (options, said)
"""


@on_the_host
def test_a_wrong_forecast_costs_no_token(cuda: str, tmp_path: Path) -> None:
    """The backend without rules, and sure of itself where scores are equal or all tokens forbidden."""
    source = ROOT / "csrc" / "ops" / "cuda" / "choose.cu"
    text = source.read_text()
    for right, wrong in WRONG.items():
        text, count = re.subn(re.escape(right), wrong, text)
        assert count == 1, right
    (tmp_path / "choose.cu").write_text(text)
    library = host_library([tmp_path / "choose.cu", *(path for path in backend_sources() if path != source)])
    rules: list[dict[str, Any]] = [{"no_repeat_ngram_size": 1}, {"num_beams": 2, "repetition_penalty": 2.5}]
    ties: list[dict[str, Any]] = [{}, {"num_beams": 2}]
    for folder, options in (
        (random_checkpoint(tmp_path / "opt", seed=8), rules),
        (make_twins(tmp_path / "twins"), ties),
    ):
        done = run_python(SCRIPT, folder, json.dumps(options), BLIP2C_CUDA_LIBRARY=str(library))
        assert done.returncode == 0, done.stderr


def make_twins(folder: Path) -> Path:
    """Every token of this model has another with the same logit in the upper half of the vocabulary."""
    random_checkpoint(folder, seed=2, family="llama", tied=False)
    weights = load(folder, "cpu")._core.weights()
    head = weights["language_model.lm_head.weight"].copy()
    half = len(head) // 2
    head[half : 2 * half] = head[:half]
    weights["language_model.lm_head.weight"] = head
    _core.write_safetensors(str(folder / "model.safetensors"), weights, dict.fromkeys(weights, "F32"), {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def twins(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = make_twins(tmp_path_factory.mktemp("twins"))
    return load(folder, "cpu"), load(folder, cuda)


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_equal_scores(beams: int, twins: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_same(monkeypatch, twins, [1, 4], 2, num_beams=beams)


def test_what_nobody_asked_for_may_be_infinite(cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that has ended goes on in a run, and reads its end token, whose embedding is Inf."""
    folder = random_checkpoint(tmp_path, seed=3, family="llama", tied=False)
    here = load(folder, "cpu")
    said = ask(here, 2)["sequences"][:, -NEW:]
    end = int(next(token for token in said[0, 3:] if token not in said[1] and token not in said[0, :3]))
    weights = here._core.weights()
    name = "language_model.model.embed_tokens.weight"
    weights[name] = weights[name].copy()
    weights[name][end] = np.inf
    _core.write_safetensors(str(folder / "model.safetensors"), weights, dict.fromkeys(weights, "F32"), {"format": "pt"})
    assert_same(monkeypatch, (load(folder, "cpu"), load(folder, cuda)), [1, 4, 8], 2, eos_token_id=end)


def test_items_that_enter_later(pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """More prompts than places: steps run ahead once the last has entered."""
    here, there = pairs["opt"]
    options = core_options(num_beams=9, max_new_tokens=4, eos_ids=[5, 6, 7, 8])
    inputs = core_inputs(here, 9, 3)
    monkeypatch.setenv("BLIP2C_STEPS_AHEAD", "3")
    want, found = (model._core.generate(*inputs, options) for model in (here, there))
    assert np.array_equal(found["ids"], want["ids"])
    assert np.array_equal(found["lengths"], want["lengths"])


@pytest.mark.parametrize("beams", [1, 4])
def test_no_allocation_per_step(beams: int, pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, there = pairs["opt"]
    monkeypatch.setenv("BLIP2C_STEPS_AHEAD", "4")
    options = core_options(num_beams=beams, max_new_tokens=10, repetition_penalty=1.3)
    result = there._core.generate(*core_inputs(there, 2, 3), options)
    assert result["steps"] == 9
    assert result["step_allocations"] == 0


def test_cancelled_in_a_run(pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """As time has it: a run is no longer than the time between two looks at the flag."""
    _, there = pairs["opt"]
    monkeypatch.delenv("BLIP2C_STEPS_AHEAD", raising=False)
    want = ask(there, 1)
    most = there.config.text_config.max_position_embeddings - 20
    interrupted(lambda: ask(there, 1, max_new_tokens=most, eos_token_id=None), 0.2)
    assert np.array_equal(ask(there, 1)["sequences"], want["sequences"])


@pytest.mark.parametrize("setting", ["17", "-1", "x", "4 "])
def test_a_setting_that_is_none(
    setting: str, pairs: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLIP2C_STEPS_AHEAD", setting)
    with pytest.raises(ValueError, match=f"BLIP2C_STEPS_AHEAD: expected a number from 0 to 16, found '{setting}'"):
        ask(pairs["opt"][1], 1)
