"""Weights rounded to int8 and int4, and their products with many rows.

The integers of a rounded weight can be read, and how rows are rounded is a formula, so every bit of a product has a
reference: exact integer sums within a group of input channels, one chain of fused multiply-adds over the groups.
"""

import hashlib
import json
import math
import signal
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

from blip2c import _core, kernels
from blip2c.kernels import PackedWeight
from running import run_python

F32 = np.float32
Array = np.ndarray[Any, Any]
BOTH = pytest.mark.parametrize("dtype", ["int8", "int4"])
# (m, n, k): one group and less, ragged in everything, several blocks of k, more rows than one tile of work takes.
SHAPES = [(16, 1, 1), (16, 16, 32), (17, 17, 65), (33, 70, 100), (300, 40, 352), (25, 34, 4100), (1160, 20, 70)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch is filled with NaN before each call, as outputs always are."""
    monkeypatch.setenv("BLIP2C_POISON", "1")
    before = _core.get_num_threads()
    _core.set_num_threads(2)
    yield
    _core.set_num_threads(before)


def normal(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=F32)


@cache
def packed(n: int, k: int, dtype: str) -> PackedWeight:
    """Columns and rows of different sizes, one of each all zeros."""
    w = normal(n * k, n, k) * np.geomspace(0.01, 3.0, k, dtype=F32) * np.geomspace(1.0, 0.1, n, dtype=F32)[:, None]
    w[n // 2] = 0
    w[:, k // 3] = 0
    w[0, 0] = 1
    return PackedWeight(w, dtype)


def activations(m: int, k: int) -> Array:
    """Rows of different sizes, one of zeros, one with an outlier, one with a negative zero."""
    x = normal(k, m, k) * np.geomspace(1e-3, 1e3, m, dtype=F32)[:, None]
    x[1] = 0
    x[2, k // 2] = 1e5
    x[3, 0] = -0.0
    return x


# ---- packing ----


def steps(weight: PackedWeight) -> Array:
    """Of every element the distance between two neighbouring values, float64 [n, k]."""
    q, scales, columns = weight.integers()
    each = np.repeat(scales, 32 if scales.shape[1] > 1 or q.shape[1] <= 32 else q.shape[1], axis=1)[:, : q.shape[1]]
    return each.astype(np.float64) * columns


@BOTH
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 32), (17, 33), (40, 300), (100, 64)])
def test_integers_unpacking_and_embeddings_agree(dtype: str, n: int, k: int) -> None:
    weight = packed(n, k, dtype)
    back, q = weight.unpack(), weight.integers()[0]
    assert np.abs(q.astype(int)).max() <= (127 if dtype == "int8" else 8)
    np.testing.assert_allclose(back, steps(weight) * q, rtol=1e-6)
    ids = np.arange(n, dtype=np.int32)[::-1].copy()
    np.testing.assert_array_equal(kernels.embedding(weight, ids), back[ids])
    base = normal(1, n, k)
    np.testing.assert_array_equal(kernels.embedding(weight, ids, base), base + back[ids])


def test_embeddings_of_bfloat16_pairs() -> None:
    w = normal(2, 37, 75)
    pairs = PackedWeight(w, "bfloat16", pairs=True)
    np.testing.assert_array_equal(pairs.unpack(), PackedWeight(w, "bfloat16").unpack())
    rows = kernels.embedding(pairs, np.array([36, 0, 16], np.int32))
    np.testing.assert_array_equal(rows.view(np.uint32) >> 16, pairs.unpack()[[36, 0, 16]])


def test_int8_is_the_nearest_of_its_scale() -> None:
    w = normal(3, 50, 200) * np.geomspace(1e-3, 10, 200, dtype=F32)
    weight = PackedWeight(w, "int8")
    q, scales, columns = weight.integers()
    np.testing.assert_allclose(columns, np.sqrt((w.astype(np.float64) ** 2).mean(axis=0)), rtol=1e-6)
    np.testing.assert_allclose(scales[:, 0], np.abs(w / columns).max(axis=1) / 127, rtol=1e-6)
    assert np.all(np.abs(weight.unpack() - w) <= 0.5001 * steps(weight))
    assert (np.abs(q).max(axis=1) == 127).all()


def test_int4_is_better_than_either_plain_rounding() -> None:
    """Largest element to 7, or to -8: the usual two. And near the best that a dense search over scales finds."""
    w = normal(4, 64, 512)
    weight = PackedWeight(w, "int4")
    q, _, columns = weight.integers()
    unit = (w / columns).reshape(64, -1, 32).astype(np.float64)
    largest = np.take_along_axis(unit, np.abs(unit).argmax(axis=2)[..., None], axis=2)

    def error(scale: Array) -> Array:
        whole = np.clip(np.rint(unit / scale), -8, 7)
        best = (unit * whole).sum(axis=2, keepdims=True) / (whole**2).sum(axis=2, keepdims=True)
        return np.asarray(((unit - best * whole) ** 2).sum(axis=2))

    found = (((weight.unpack() - w) / columns).reshape(unit.shape).astype(np.float64) ** 2).sum()
    assert (q == -8).mean() > 0.005  # the deepest value is in use
    assert found < 0.95 * error(np.abs(largest) / 7).sum()
    assert found < 0.95 * error(largest / -8).sum()
    targets = np.concatenate([np.linspace(-10, -4, 60), np.linspace(4, 10, 60)])
    dense = np.min([error(largest / t) for t in targets], axis=0).sum()
    assert found < 1.01 * dense


@BOTH
@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_what_is_stored_in_halves_is_rounded_as_its_values(dtype: str, stored: str) -> None:
    halves = PackedWeight(normal(5, 33, 100), stored).unpack()
    values, _ = _core._convert(halves, "float32")
    a, b = (_core._weight_parts(PackedWeight(w, dtype)._capsule) for w in (halves, values))
    for one, other in zip(a[2:], b[2:], strict=True):
        np.testing.assert_array_equal(one, other)


@BOTH
def test_bytes_do_not_depend_on_threads(dtype: str) -> None:
    w, found = normal(6, 300, 700), []
    for threads in (1, 3):
        _core.set_num_threads(threads)
        found.append(_core._weight_parts(PackedWeight(w, dtype)._capsule))
    for one, other in zip(found[0][2:], found[1][2:], strict=True):
        assert one.tobytes() == other.tobytes()


@BOTH
def test_padding_is_the_zero_of_the_format(dtype: str) -> None:
    data = _core._weight_parts(PackedWeight(np.ones((1, 1), F32), dtype)._capsule)[2]
    values, counts = np.unique(data, return_counts=True)
    zero = 128 if dtype == "int8" else 0x88
    assert dict(zip(values.tolist(), counts.tolist(), strict=True))[zero] == len(data) - 1


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(dtype: str, bad: float) -> None:
    w = normal(7, 20, 70)
    w[19, 69] = w[3, 0] = bad
    with pytest.raises(_core.NumericError, match=rf"weight: 2 values .*rounded to {dtype[0].upper()}{dtype[3]}"):
        PackedWeight(w, dtype)


@BOTH
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e30, 1e38])
def test_huge_and_tiny_weights(dtype: str, size: float) -> None:
    w = normal(8, 20, 64).clip(-3, 3) * F32(size)
    back = PackedWeight(w, dtype).unpack()
    assert np.isfinite(back).all()
    if size > 1e-37:
        w64 = w.astype(np.float64)
        assert np.linalg.norm(back - w64) < (0.01 if dtype == "int8" else 0.1) * np.linalg.norm(w64)


def test_only_rounded_weights_have_integers() -> None:
    with pytest.raises(ValueError, match="expected a weight of int8 or int4, found float16"):
        PackedWeight(np.ones((2, 3), F32), "float16").integers()
    with pytest.raises(ValueError, match="pairs: expected dtype bfloat16, found float32"):
        PackedWeight(np.ones((2, 3), F32), pairs=True)


@BOTH
def test_packing_answers_signals(dtype: str) -> None:
    w = np.ones((8192, 8192), F32)

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.03)
    try:
        with pytest.raises(KeyboardInterrupt):
            PackedWeight(w, dtype)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


# ---- products ----


def rounded(x: Array, columns: Array, group: int) -> tuple[Array, Array]:
    """Integers [m, groups, group] and scales [m, groups]: float32 arithmetic, as the kernels do it."""
    m, k = x.shape
    t = np.zeros((m, -(-k // group) * group), F32)
    t[:, :k] = x * columns
    t = t.reshape(m, -1, group)
    largest = np.abs(t).max(axis=2)
    empty = largest < F32(1e-30)
    with np.errstate(divide="ignore"):
        inverse = np.where(empty, F32(0), F32(127) / largest)
    return np.rint(t * inverse[..., None]).astype(np.int64), np.where(empty, F32(0), largest * F32(1 / 127))


def fused(a: Array, b: Array, c: Array) -> Array:
    return (a.astype(np.longdouble) * b + c).astype(F32)


def product(x: Array, weight: PackedWeight, dtype: str) -> Array:
    q, scales, columns = weight.integers()
    group = 64 if dtype == "int8" else 32
    a, t = rounded(x, columns, group)
    padded = np.zeros((q.shape[0], a.shape[1] * group), np.int64)
    padded[:, : q.shape[1]] = q
    c = np.zeros((len(x), len(q)), F32)
    for g in range(a.shape[1]):
        sums = (a[:, g] @ padded[:, g * group : (g + 1) * group].T).astype(F32)
        c = fused(sums * scales[:, g] if dtype == "int4" else sums, t[:, g, None], c)
    return c * scales[:, 0] if dtype == "int8" else c


@BOTH
@pytest.mark.parametrize(("m", "n", "k"), SHAPES)
def test_products_are_what_the_integers_say_to_the_bit(dtype: str, m: int, n: int, k: int) -> None:
    weight, x = packed(n, k, dtype), activations(m, k)
    np.testing.assert_array_equal(kernels.linear(x, weight), product(x, weight, dtype))


@BOTH
def test_largest_sums_do_not_overflow(dtype: str) -> None:
    """Every value at its limit, and of one sign: where 8 or 16 bits would saturate."""
    for sign in (1, -1):
        w, x = np.full((40, 2048), F32(sign)), np.full((20, 2048), F32(2))
        np.testing.assert_allclose(kernels.linear(x, PackedWeight(w, dtype)), 4096.0 * sign, rtol=2e-3)


@BOTH
def test_rounding_x_costs_at_most_half_a_step_per_channel(dtype: str) -> None:
    weight, x = packed(70, 1000, dtype), activations(40, 1000)
    back, columns = weight.unpack().astype(np.float64), weight.integers()[2]
    group = 64 if dtype == "int8" else 32
    t = np.repeat(rounded(x, columns, group)[1], group, axis=1)[:, :1000].astype(np.float64)
    bound = 0.5 * t @ np.abs(back / columns).T
    exact = x.astype(np.float64) @ back.T
    scale = np.abs(x).astype(np.float64) @ np.abs(back).T
    assert np.all(np.abs(kernels.linear(x, weight) - exact) <= bound + 1e-6 * scale)


@BOTH
def test_planted_outliers_cost_nothing(dtype: str) -> None:
    """Channels of x a hundred times as large, their weights a hundred times smaller: the same function."""
    x, w = normal(9, 64, 768), normal(10, 96, 768)
    planted = np.ones(768, F32)
    planted[[5, 100, 101, 640]] = 100
    exact = x.astype(np.float64) @ w.T
    errors = [
        np.linalg.norm(kernels.linear(x * by, PackedWeight(w / by, dtype)) - exact) / np.linalg.norm(exact)
        for by in (np.ones(768, F32), planted)
    ]
    assert errors[0] < (0.013 if dtype == "int8" else 0.09)
    assert errors[1] < 1.01 * errors[0]
    plain = [PackedWeight(w / by, dtype).integers()[0] for by in (np.ones(768, F32), planted)]
    assert (plain[0] != plain[1]).mean() < 1e-4


@BOTH
def test_rows_threads_and_columns_do_not_show(dtype: str) -> None:
    n, k = 150, 300
    weight, x, bias, residual = packed(n, k, dtype), activations(300, k), normal(11, n), normal(12, 300, n)
    options = {"bias": bias, "activation": "gelu"}
    whole = kernels.linear(x, weight, residual=residual, **options)
    for threads in (1, 3):
        _core.set_num_threads(threads)
        for rows in (16, 17, 33, 100, 299):
            for first in (0, 300 - rows):
                part = slice(first, first + rows)
                found = kernels.linear(x[part], weight, residual=residual[part], **options)
                np.testing.assert_array_equal(found, whole[part], err_msg=f"{rows} rows from {first}")
    w = normal(13, n, k)
    w[:33] = w[0]  # the same row at the beginning and at the end of a panel, in a pair of panels and alone
    columns = kernels.linear(x, PackedWeight(w, dtype))
    np.testing.assert_array_equal(columns[:, :33], np.repeat(columns[:, :1], 33, axis=1))


@BOTH
@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
def test_bias_activation_and_residual_follow(dtype: str, activation: str) -> None:
    weight, x, bias, residual = packed(70, 100, dtype), activations(33, 100), normal(14, 70), normal(15, 33, 70)
    plain = kernels.linear(x, weight).astype(np.float64) + bias
    act = {"none": lambda t: t, "relu": lambda t: max(t, 0), "gelu": lambda t: t / 2 * (1 + math.erf(t / 2**0.5))}
    expected = np.vectorize(act[activation], otypes=[float])(plain) + residual
    found = kernels.linear(x, weight, bias, activation, residual)
    assert np.all(np.abs(found - expected) <= 3e-7 * (np.abs(plain) + np.abs(residual) + np.abs(bias) + 1))


@BOTH
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_becomes_nan_and_no_other(dtype: str, bad: float) -> None:
    weight, x = packed(50, 100, dtype), activations(20, 100)
    expected = kernels.linear(x, weight)
    x[4, 97] = bad
    found = kernels.linear(x, weight)
    assert np.isnan(found[4]).all()
    np.testing.assert_array_equal(np.delete(found, 4, axis=0), np.delete(expected, 4, axis=0))


@BOTH
def test_nothing_is_allocated_while_it_runs(dtype: str) -> None:
    weight, x = packed(33, 100, dtype), activations(40, 100)
    before = _core._allocation_count()
    kernels.linear(x, weight)
    assert _core._allocation_count() - before == 1  # the arena


# ---- instruction sets ----

DIGESTS = """
import json
import test_rounded_weights as t
print(json.dumps(t.digests()))
"""


def digests() -> dict[str, str]:
    """Of weights and products, by name."""
    found = {}
    for dtype in ("int8", "int4"):
        for m, n, k in SHAPES:
            weight = packed(n, k, dtype)
            for name, a in (("", weight.unpack()), ("x", kernels.linear(activations(m, k), weight))):
                found[f"{dtype} {m}x{k}->{n} {name}"] = hashlib.sha256(a.tobytes()).hexdigest()
    return found


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512", "avx512_vnni"])
def test_the_same_bits_on_every_instruction_set(isa: str) -> None:
    run = run_python(DIGESTS, BLIP2C_ISA=isa)
    if run.returncode != 0:
        assert f"UnsupportedError: BLIP2C_ISA={isa}" in run.stderr
        return
    assert json.loads(run.stdout) == digests()
