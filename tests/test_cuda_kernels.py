"""Every CUDA kernel: the cases of kernel_cases.py, the processor's answers, and what only devices have.

Scratch and outputs are NaN before each call. Where kernels read four columns at a time there are cases that cannot."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from blip2c import NumericError, _core, index_files, kernels
from kernel_cases import (
    CASES,
    F32,
    TOLERANCE,
    Case,
    add_rows_case,
    arguments,
    embedding_case,
    log_softmax_case,
    norm_case,
    normal,
    rms_norm_case,
    rope_case,
    top_k_case,
)

# Sums are made by many threads, in another order than the processor's, and CUDA's exp, erf and sin are within 2 ulp.
LOOSER = 4
# With more rows than these x is rounded to the weight's 16 bits.
EXACT_ROWS = 16
ROUNDED = {np.dtype(np.float16): 2.0**-11, np.dtype(np.uint16): 2.0**-8}


def on_devices(case: Case) -> bool:
    """Products have one method there."""
    keywords = getattr(case.run, "keywords", {})
    return keywords.get("method", "packed") == "packed"


def tolerance(case: Case, arrays: dict[str, Any]) -> float:
    rounded = ROUNDED.get(arrays["weight"].dtype, 0.0) if case.tolerance == "linear" else 0.0
    if rounded and arrays["x"].size // arrays["x"].shape[-1] > EXACT_ROWS:
        return rounded
    return LOOSER * TOLERANCE[case.tolerance]


MORE = [
    *(norm_case(3, d) for d in (8, 128, 1024, 1408, 4096, 4100, 4500)),
    norm_case(2, 2560, affine=False),
    *(rms_norm_case(3, d) for d in (64, 4096, 5000)),
    *(log_softmax_case(3, v, 4.0) for v in (4, 64, 1000, 4099)),
    *(top_k_case(2, v, k) for v, k in [(5, 1), (31, 31), (300, 299), (6000, 5000), (40000, 100)]),
    *(embedding_case(40, d, 9, dtype, True, add) for d in (32, 40, 33) for dtype in ("float16", "bfloat16")
      for add in (False, True)),
    embedding_case(9, 64, 5, "float32", False, True),
    rope_case(3, 8, 64, 64),
    *(add_rows_case(1, 3, d) for d in (1, 64, 2000)),
]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2C_POISON", "1")


@pytest.mark.parametrize("case", [c for c in CASES if on_devices(c)] + MORE, ids=lambda case: case.name)
def test_equals_float64(case: Case, cuda: str) -> None:
    arrays = arguments(case)
    found = case.run(**arrays, device=cuda)
    expected, scale = case.reference(**arrays)
    assert found.shape == expected.shape
    error = np.abs(found - expected) / np.maximum(scale, np.finfo(F32).tiny)
    assert not error.size or error.max() <= tolerance(case, arrays), error.max()


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.name)
def test_a_row_is_the_same_alone(case: Case, cuda: str) -> None:
    if not case.rows:
        return
    arrays = arguments(case)
    together = case.run(**arrays, device=cuda)
    last = {name: value[-1:] if name in case.rows else value for name, value in arrays.items()}
    assert (case.run(**last, device=cuda)[-1] == together[-1]).all()


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("width", [32, 70, 256])
@pytest.mark.parametrize("added", [False, True])
def test_rows_of_rounded_tables_are_the_processors(dtype: str, width: int, added: bool, cuda: str) -> None:
    rng = np.random.default_rng(width)
    table, ids = normal(rng, 50, width), rng.integers(0, 50, 20).astype(np.int32)
    to = normal(rng, 20, width) if added else None
    here = kernels.embedding(kernels.PackedWeight(table, dtype), ids, to)
    there = kernels.embedding(kernels.PackedWeight(table, dtype, device=cuda), ids, to, cuda)
    # A product and the sum after it may be rounded once on a card.
    np.testing.assert_allclose(there, here, rtol=1e-6 if added else 0, atol=1e-6 if added else 0)


def test_negative_ids_leave_a_row_alone(cuda: str) -> None:
    rng = np.random.default_rng(0)
    table, to = normal(rng, 4, 9), normal(rng, 3, 9)
    found = kernels.embedding(table, np.array([2, -1, 0], np.int32), to, cuda)
    np.testing.assert_array_equal(found, kernels.embedding(table, np.array([2, -1, 0], np.int32), to))
    np.testing.assert_array_equal(found[1], to[1])


@pytest.mark.parametrize("width", [3, 64])
def test_the_last_of_equal_rows_stays(width: int, cuda: str) -> None:
    rng = np.random.default_rng(1)
    out, x = normal(rng, 6, width), normal(rng, 700, width)
    to = rng.integers(0, 5, 700).astype(np.int32)
    of = rng.permutation(700).astype(np.int32)
    for _ in range(2):  # blocks run in both orders
        np.testing.assert_array_equal(kernels.copy_rows(out, x, to, of, cuda), kernels.copy_rows(out, x, to, of))
    np.testing.assert_array_equal(kernels.copy_rows(out, x, None, of[:6], cuda), x[of[:6]])


def test_top_k_of_what_is_no_number(cuda: str) -> None:
    x = np.array([[np.nan, 1, -np.inf, np.nan, 1, np.inf, -0.0, 0.0], [np.nan] * 8], F32)
    for k in (1, 3, 8):
        here, there = kernels.top_k(x, k), kernels.top_k(x, k, cuda)
        np.testing.assert_array_equal(there[1], here[1])
        np.testing.assert_array_equal(there[0], here[0])


def test_log_softmax_of_extremes(cuda: str) -> None:
    x = np.array(
        [[0, np.nan, 1, 2], [0, np.inf, 1, 2], [-np.inf] * 4, [0, -np.inf, 1, 3e38], [-1e30, 1e4, 1e4, 0]], F32
    )
    np.testing.assert_allclose(kernels.log_softmax(x, cuda), kernels.log_softmax(x), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_first_bad_row(bad: float, cuda: str) -> None:
    x = normal(np.random.default_rng(2), 40, 300)
    assert kernels.first_bad_row(x, cuda) == -1
    x[31, 299] = x[17, 5] = bad
    assert kernels.first_bad_row(x, cuda) == 17


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(
    ("texts", "pictures", "queries", "width"), [(1, 40, 32, 256), (9, 25, 17, 70), (3, 5, 4, 1100), (8, 3, 1, 5)]
)
def test_picture_scores(texts: int, pictures: int, queries: int, width: int, dtype: str, cuda: str) -> None:
    rng = np.random.default_rng(texts)
    vectors, words = normal(rng, pictures, queries, width), normal(rng, texts, width)
    records = index_files.pack_records(vectors, dtype)
    held = index_files.unpack_records(records, queries, width, dtype).astype(np.float64)
    found = _core._picture_scores(words, records, queries, dtype, cuda)
    np.testing.assert_allclose(found, np.einsum("tp,nqp->tnq", words, held).max(2), rtol=0, atol=1e-6 * width)
    alone = _core._picture_scores(words[-1:].copy(), records[1:].copy(), queries, dtype, cuda)
    assert (alone[0] == found[-1, 1:]).all()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
def test_packed_weights_live_on_a_device(dtype: str, cuda: str) -> None:
    rng = np.random.default_rng(4)
    weight, x = normal(rng, 21, 70), normal(rng, 2, 70)
    there, here = kernels.PackedWeight(weight, dtype, device=cuda), kernels.PackedWeight(weight, dtype)
    np.testing.assert_array_equal(there.unpack(), here.unpack())
    np.testing.assert_allclose(
        kernels.linear(x, there, device=cuda), x @ kernels.embedding(here, np.arange(21, dtype=np.int32)).T, atol=1e-4
    )


WEIGHT = np.ones((3, 4), F32)
REFUSED: list[tuple[Callable[[str], Any], type[Exception], str]] = [
    (lambda d: kernels.layer_norm(WEIGHT, device="gpu"), ValueError, "device: expected cpu, cuda or cuda:0.*found gpu"),
    (lambda d: kernels.layer_norm(WEIGHT, device="cuda:9"), ValueError, "cuda:9"),
    (lambda d: kernels.linear(WEIGHT, WEIGHT, device=d, method="rows"), ValueError, "method: expected packed on cuda"),
    (lambda d: kernels.linear(WEIGHT, kernels.PackedWeight(WEIGHT, device=d)), ValueError, "lies on a device"),
    (lambda d: kernels.PackedWeight(WEIGHT, "int8", device=d).integers(), ValueError, "on a device"),
    (lambda d: kernels.PackedWeight(WEIGHT * F32(1e30), "float16", device=d), NumericError, "too large for F16"),
    (lambda d: kernels.top_k(WEIGHT, 5, d), ValueError, "top_k: k = 5 of 4"),
    (lambda d: kernels.embedding(WEIGHT, np.array([3], np.int32), device=d), IndexError, "id 3"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(call: Callable[[str], Any], error: type[Exception], words: str, cuda: str) -> None:
    with pytest.raises(error, match=words):
        call(cuda)
    np.testing.assert_array_equal(kernels.add_rows(WEIGHT, WEIGHT, cuda), WEIGHT * 2)
