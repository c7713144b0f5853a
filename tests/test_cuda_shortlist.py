"""What a search is told of logits on a device, against the whole rows; searches that go by it, against those that see
all scores (tests/c/check_few.c)."""

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2c
import c_harness
from cuda_build import HOST, ROOT, host_library
from helpers import prompt_ids, random_checkpoint, random_pixels

F32, I32 = np.float32, np.int32
ROOM = 2048
"""Candidates that are collected before a row is crowded."""


class Shortlist(ctypes.Structure):
    """b2_shortlist of csrc/ops/ops.h."""

    _fields_ = (
        ("k", ctypes.c_int),
        ("adds_up", ctypes.c_int),
        ("listed", ctypes.c_void_p),
        ("listed_ld", ctypes.c_int64),
        ("sums", ctypes.POINTER(ctypes.c_double)),
        ("tops", ctypes.POINTER(ctypes.c_float)),
        ("crowded", ctypes.POINTER(ctypes.c_int32)),
        ("values", ctypes.POINTER(ctypes.c_float)),
        ("ids", ctypes.POINTER(ctypes.c_int32)),
        ("listed_values", ctypes.POINTER(ctypes.c_float)),
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    sources = [ROOT / "csrc" / "ops" / "cuda" / "shortlist.cu", ROOT / "csrc" / "generate" / "scores.c"]
    sources += [ROOT / "csrc" / "core" / f"{name}.c" for name in ("arena", "error", "memory")]
    loaded = ctypes.CDLL(str(host_library([*sources, HOST / "shortlist_calls.cu"])))
    loaded.run_shortlist.restype = ctypes.c_char_p
    loaded.run_shortlist.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2 + [ctypes.c_void_p, ctypes.c_int64]
    loaded.host_sum.restype = ctypes.c_double
    loaded.host_sum.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_float]
    return loaded


def shortlist(library: ctypes.CDLL, x: np.ndarray, k: int, listed: np.ndarray) -> dict[str, np.ndarray]:
    rows, width = x.shape[0], listed.shape[1]
    after, here = x.copy(), np.zeros(rows * (16 + 8 * k + 8 * width), np.uint8)
    said = Shortlist(k=k, adds_up=1, listed=listed.ctypes.data, listed_ld=width)
    message = library.run_shortlist(ctypes.addressof(said), after.ctypes.data, *x.shape, here.ctypes.data, here.nbytes)
    assert message == b"", message.decode()
    assert after.tobytes() == x.tobytes()
    shapes = {"sums": (rows,), "tops": (rows,), "crowded": (rows,), "values": (rows, k), "ids": (rows, k)}
    found = {name: np.ctypeslib.as_array(getattr(said, name), shape).copy() for name, shape in shapes.items()}
    if width:
        found["listed_values"] = np.ctypeslib.as_array(said.listed_values, (rows, width)).copy()
    return found


def check(library: ctypes.CDLL, x: np.ndarray, k: int, listed: np.ndarray) -> None:
    found = shortlist(library, x, k, listed)
    assert not found["crowded"].any()
    for i, row in enumerate(x):
        top = row.max()
        assert found["tops"][i] == top
        assert found["sums"][i] == library.host_sum(row.ctypes.data, row.size, top)
        there = [(j, id_) for j, id_ in enumerate(listed[i]) if 0 <= id_ < row.size]
        for j, id_ in there:
            assert found["listed_values"][i, j] == row[id_]
        left = np.setdiff1d(np.arange(row.size), [id_ for _, id_ in there])
        best = left[np.argsort(-row[left], kind="stable")][:k]
        ids = np.full(k, -1)
        ids[: best.size] = best
        np.testing.assert_array_equal(found["ids"][i], ids)
        np.testing.assert_array_equal(found["values"][i, : best.size], row[best])


@pytest.mark.parametrize(
    ("cols", "k", "listed", "levels"),
    [
        (2, 1, 0, 0),
        (9, 8, 3, 0),
        (40, 11, 39, 0),
        (511, 7, 20, 5),
        (1024, 64, 5, 0),
        (1041, 16, 0, 3),
        (5000, 64, 700, 0),
        (50272, 11, 60, 0),
        (50272, 1, 0, 4000),
    ],
)
def test_it_is_what_the_rows_hold(library: ctypes.CDLL, cols: int, k: int, listed: int, levels: int) -> None:
    rng = np.random.default_rng(cols)
    x = (rng.standard_normal((3, cols)) * 5).astype(F32)
    if levels:
        x = (rng.integers(0, levels, (3, cols)) - levels // 2).astype(F32)
    ids = rng.integers(-3, cols + 2, (3, listed)).astype(I32)
    if listed == cols - 1:
        ids[0] = np.arange(listed)
        ids[1] = 5
    check(library, x, k, ids)


def test_large_and_negative_numbers(library: ctypes.CDLL) -> None:
    x = np.linspace(-1e30, -1e-30, 3000, dtype=F32)[None]
    check(library, np.concatenate([x, -x, np.where(np.arange(3000) % 7 == 0, F32(-0.0), x)]), 20, np.zeros((3, 1), I32))


def test_a_crowded_row_says_so(library: ctypes.CDLL) -> None:
    x = np.zeros((2, 2 * ROOM), F32)
    x[1, ROOM:] = -1.0
    x[1, 5] = 1.0
    found = shortlist(library, x, 2, np.zeros((2, 0), I32))
    assert found["crowded"].tolist() == [1, 0]
    assert found["ids"][1].tolist() == [5, 0]


SEARCH = ["core/pool.c", "core/cancel.c", "core/error.c", "core/memory.c"] + [
    f"generate/{name}.c"
    for name in ("ahead", "beam", "draw", "few", "generate", "rules", "scores", "search", "single", "topk", "warpers")
]


def check_searches(folder: Path, first: int, count: int) -> None:
    program = folder / "check_few"
    c_harness.build(program, "check_few.c", SEARCH, None)
    whole, all_rows = map(int, c_harness.run(program, first, count).split())
    assert 0 < whole < all_rows


def test_searches_by_shortlists_find_the_same(tmp_path: Path) -> None:
    check_searches(tmp_path, 0, 1000)


@pytest.mark.exhaustive
def test_many_searches_by_shortlists_find_the_same(tmp_path: Path) -> None:
    check_searches(tmp_path, 1000, 100000)


@pytest.fixture(scope="module")
def model(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = random_checkpoint(tmp_path_factory.mktemp("opt"), seed=8)
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)


def random_search(rng: np.random.Generator, vocabulary: int) -> dict[str, Any]:
    def some(most: int) -> list[int]:
        return rng.integers(3, vocabulary, rng.integers(1, most)).tolist()

    beams = int(rng.choice([1, 2, 3, 5]))
    options: dict[str, Any] = {"max_new_tokens": int(rng.integers(2, 7)), "num_beams": beams}
    if beams > 1:
        options["num_return_sequences"] = int(rng.integers(1, beams + 1))
        options["length_penalty"] = float(rng.choice([-1.0, 0.0, 1.0, 2.0]))
        options["early_stopping"] = [False, True, "never"][rng.integers(3)]
    further: dict[str, Any] = {
        "repetition_penalty": float(rng.choice([0.8, 1.5])),
        "no_repeat_ngram_size": int(rng.integers(1, 4)),
        "min_new_tokens": int(rng.integers(1, 4)),
        "suppress_tokens": some(30),
        "begin_suppress_tokens": some(4),
        "bad_words_ids": [some(3) for _ in range(2)],
        "sequence_bias": {tuple(some(3)): float(rng.normal() * 3) for _ in range(2)},
        "eos_token_id": some(4),
    }
    chosen = {name: value for name, value in further.items() if rng.random() < 0.4}
    return options | chosen


def check_options(model: Any, seed: int) -> None:
    """Recorded logits bring whole rows to the host."""
    rng = np.random.default_rng(seed)
    pixels, ids = random_pixels(model.config, 3), prompt_ids(model.config, 3, 8)
    options = random_search(rng, model.config.text_config.vocab_size)
    given = {"return_dict_in_generate": True, **options}
    found = model.generate(pixels, ids, **given)
    want = model.generate(pixels, ids, output_logits=True, **given)
    assert np.array_equal(found.sequences, want.sequences), options
    if options["num_beams"] > 1:
        assert np.array_equal(found.sequences_scores, want.sequences_scores), options


@pytest.mark.parametrize("seed", range(4))
def test_a_model_says_the_same_with_whole_rows(model: Any, seed: int) -> None:
    check_options(model, seed)


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(4, 200))
def test_a_model_says_the_same_with_whole_rows_for_many_options(model: Any, seed: int) -> None:
    check_options(model, seed)
