"""Products of few rows with rounded weights (what decoding runs), and bfloat16 arithmetic for many rows.

Rounded weights meet activations of 16 bits. The whole numbers are known, so the reference is exact: every bit of an
int8 product follows from it, on every instruction set, whatever else is in the batch.
"""

import hashlib
import json
from functools import cache

import numpy as np
import pytest
from numpy.typing import NDArray

from blip2c import _core, kernels
from blip2c.kernels import PackedWeight
from running import run_python

F32 = np.float32
LIMIT = F32(32639)
FEW = 15
# (n, k): ragged in both, one channel, more than one step of every kernel, more channels than a panel pair.
SHAPES = [(1, 1), (17, 31), (50, 100), (33, 600), (16, 2560)]


def normal(seed: int, *shape: int) -> NDArray[F32]:
    return np.random.default_rng(seed).standard_normal(shape, dtype=F32)


@cache
def packed(n: int, k: int, dtype: str) -> PackedWeight:
    return PackedWeight(normal(n * k, n, k) * F32(k**-0.5), dtype)


def activations(k: int, rows: int = FEW) -> np.ndarray:
    """Rows of different sizes, one of zeros, one with an outlier."""
    x = normal(k, rows, k) * (F32(10.0) ** np.arange(-3, rows - 3, dtype=F32))[:, None]
    x[1] = 0
    x[2, k // 2] = 1000
    return x


def whole_numbers(x: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """X and one scale per row: float32 arithmetic, as the kernels do it."""
    y = x * columns
    most = np.abs(y).max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        inverse = np.where(most > 0, LIMIT / most, F32(0))
    return np.rint(y * inverse).astype(np.int64), (most / LIMIT)[:, 0]


def exact_sums(x: np.ndarray, weight: PackedWeight) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per group of input channels the sum of q * X, and its scales [n, groups]; the rows' scales."""
    q, scales, columns = weight.integers()
    whole, row_scales = whole_numbers(x, columns)
    size = -(-q.shape[1] // scales.shape[1] // 32) * 32
    starts = range(0, q.shape[1], size)
    sums = np.stack([whole[:, s : s + size] @ q[:, s : s + size].astype(np.int64).T for s in starts], axis=2)
    return sums, scales, row_scales


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int8_is_what_the_whole_numbers_say_to_the_bit(n: int, k: int) -> None:
    weight, x = packed(n, k, "int8"), activations(k)
    sums, scales, row_scales = exact_sums(x, weight)
    expected = sums[:, :, 0].astype(F32) * scales[:, 0] * row_scales[:, None]
    np.testing.assert_array_equal(kernels.linear(x, weight), expected)


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_int4_is_what_the_whole_numbers_say(n: int, k: int) -> None:
    weight, x = packed(n, k, "int4"), activations(k)
    sums, scales, row_scales = exact_sums(x, weight)
    terms = sums * scales.astype(np.float64)
    expected, size = terms.sum(axis=2) * row_scales[:, None], np.abs(terms).sum(axis=2) * row_scales[:, None]
    error = np.abs(kernels.linear(x, weight) - expected)
    assert np.all(error <= 1e-6 * size)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_sixteen_bits_lose_nothing_beside_the_weights(dtype: str) -> None:
    weight, x = packed(64, 2560, dtype), normal(5, 4, 2560)
    exact = x.astype(np.float64) @ weight.unpack().astype(np.float64).T
    error = kernels.linear(x, weight) - exact
    assert np.sqrt((error**2).mean()) < 1e-4 * np.sqrt((exact**2).mean())


@pytest.mark.parametrize("dtype", ["int8", "int4", "bfloat16"])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_depend_on_the_others(dtype: str, threads: int) -> None:
    n, k = 150, 300
    weight = PackedWeight(normal(1, n, k), dtype, pairs=dtype == "bfloat16")
    x, bias, residual = activations(k), normal(2, n), normal(3, FEW, n)
    before = _core.get_num_threads()
    whole = kernels.linear(x, weight, bias, activation="gelu", residual=residual)
    try:
        _core.set_num_threads(threads)
        for rows in range(1, FEW + 1):
            for first in (0, FEW - rows):
                part = slice(first, first + rows)
                found = kernels.linear(x[part], weight, bias, activation="gelu", residual=residual[part])
                np.testing.assert_array_equal(found, whole[part], err_msg=f"{rows} rows from {first}")
    finally:
        _core.set_num_threads(before)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(dtype: str, bad: float) -> None:
    weight, x = packed(50, 100, dtype), activations(100)
    expected = kernels.linear(x, weight)
    x[4, 97] = bad
    found = kernels.linear(x, weight)
    assert np.isnan(found[4]).all()
    np.testing.assert_array_equal(np.delete(found, 4, axis=0), np.delete(expected, 4, axis=0))


# ---- bfloat16 pairs ----


def rounded(x: np.ndarray) -> np.ndarray:
    """Nearest bfloat16, ties to even, as float32."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(F32)


def multiplies_bfloat16() -> bool:
    return bool(_core.cpu_info()["isa"] == "avx512_bf16")


@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_few_rows_of_pairs_are_float32_products_to_the_bit(n: int, k: int) -> None:
    weight, x = normal(n + k, n, k), activations(k)
    found = kernels.linear(x, PackedWeight(weight, "bfloat16", pairs=True))
    np.testing.assert_array_equal(found, kernels.linear(x, PackedWeight(weight, "bfloat16")))


@pytest.mark.parametrize(("m", "n", "k"), [(16, 1, 1), (17, 33, 301), (40, 50, 64), (300, 96, 1000), (1121, 20, 33)])
def test_many_rows_of_pairs(m: int, n: int, k: int) -> None:
    weight, x, bias, residual = normal(1, n, k), normal(2, m, k), normal(3, n), normal(4, m, n)
    pairs = PackedWeight(weight, "bfloat16", pairs=True)
    found = kernels.linear(x, pairs, bias, residual=residual)
    if not multiplies_bfloat16():
        plain = kernels.linear(x, PackedWeight(weight, "bfloat16"), bias, residual=residual)
        np.testing.assert_array_equal(found, plain)
        return
    a, b = rounded(x).astype(np.float64), rounded(weight).astype(np.float64)
    size = np.abs(a) @ np.abs(b.T) + np.abs(bias) + np.abs(residual)
    assert np.all(np.abs(found - (a @ b.T + bias + residual)) <= 1e-6 * size)
    if k > 1:
        assert not np.array_equal(found, kernels.linear(x, PackedWeight(weight, "bfloat16"), bias, residual=residual))


def test_many_rows_of_pairs_do_not_depend_on_tiles() -> None:
    """Small sums and subnormal ones too: what the instruction flushes, it flushes in every tile."""
    n, k, m = 100, 700, 300
    weight, x = normal(1, n, k), normal(2, m, k)
    x[::3] *= F32(1e-38)
    pairs = PackedWeight(weight, "bfloat16", pairs=True)
    whole = kernels.linear(x, pairs)
    before = _core.get_num_threads()
    try:
        for threads, rows in ((1, m), (2, 16), (2, 17), (1, 29), (2, 150)):
            _core.set_num_threads(threads)
            for first in {0, min(5, m - rows), m - rows}:
                part = slice(first, first + rows)
                np.testing.assert_array_equal(kernels.linear(x[part], pairs), whole[part], err_msg=f"{rows}, {first}")
    finally:
        _core.set_num_threads(before)


# ---- instruction sets ----

DIGESTS = """
import sys, json
import test_few_rows as t
print(json.dumps(t.digests()))
"""


def digests() -> dict[str, str]:
    """Of the products with rounded weights, by name."""
    found = {}
    for dtype in ("int8", "int4"):
        for n, k in SHAPES:
            for rows in (1, 2, 5, 6, 8, 15):
                product = kernels.linear(activations(k)[:rows], packed(n, k, dtype))
                found[f"{dtype} {rows}x{k}->{n}"] = hashlib.sha256(product.tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_vnni"])
def test_the_same_bits_on_every_instruction_set(isa: str) -> None:
    run = run_python(DIGESTS, BLIP2C_ISA=isa)
    if run.returncode != 0:
        assert f"UnsupportedError: BLIP2C_ISA={isa}" in run.stderr
        return
    assert json.loads(run.stdout) == digests()


# ---- beams ----


@pytest.mark.parametrize("case", ["no mask", "the same mask", "one mask differs", "groups of unequal size"])
def test_rows_that_share_a_prefix_get_what_each_gets_alone(case: str) -> None:
    """Their prefix is packed once for all of them: neither a mask nor another picture's prefix may slip in."""
    heads, width, rows = 3, 20, 6
    k, v, q = normal(1, 80, heads * width), normal(2, 80, heads * width), normal(3, rows, heads * width)
    starts = np.repeat(np.array([0, 37], np.int32), 3)
    if case == "groups of unequal size":
        starts = np.repeat(np.array([0, 37], np.int32), [4, 2])
    prefix, suffix = np.full(rows, 37, np.int32), np.array([1, 5, 6, 2, 3, 4], np.int32)
    slots = np.random.default_rng(4).integers(0, 80, (rows, 6)).astype(np.int32)
    mask = np.ones((rows, 43), np.uint8)
    mask[:, 3:9] = case == "no mask"
    mask[1, 20] = case != "one mask differs"

    def attend(which: slice) -> NDArray[F32]:
        part = q[which]
        return kernels.packed_attention(
            part, np.arange(len(part) + 1, dtype=np.int32), k, v, starts[which], prefix[which], heads=heads,
            k_suffix=v, v_suffix=k, suffix_slots=slots[which], suffix_lens=suffix[which], causal=True,
            key_mask=None if case == "no mask" else mask[which],
        )  # fmt: skip

    whole = attend(slice(0, rows))
    for row in range(rows):
        np.testing.assert_array_equal(whole[row], attend(slice(row, row + 1))[0])
