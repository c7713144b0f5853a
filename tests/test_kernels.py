"""Every kernel against float64, and against itself: other threads, other batches, other chunks, other instruction sets.

The cases are those of kernel_cases.py; the tests here each ask something else of every one. The whole file runs once
more for each instruction set, in a child process with BLIP2C_ISA set.
"""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip2c import _core, kernels
from kernel_cases import (
    ACTIVATIONS_64,
    CASES,
    F32,
    STORAGE,
    TOLERANCE,
    Case,
    arguments,
    attention_64,
    normal,
    widened,
)
from running import run_python

CHILD = "BLIP2C_KERNELS_CHILD"


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scratch is filled with NaN before each call, as outputs always are. Two threads, whatever the machine has."""
    monkeypatch.setenv("BLIP2C_POISON", "1")
    before = _core.get_num_threads()
    _core.set_num_threads(2)
    yield
    _core.set_num_threads(before)


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.tobytes() == b.tobytes()


# ---- asked of every case ----


@every_case
def test_equals_float64(case: Case) -> None:
    arrays = arguments(case)
    found = case.run(**arrays)
    value, scale = case.reference(**arrays)
    assert found.dtype == F32
    assert found.shape == value.shape
    assert np.isfinite(found).all()
    assert (np.abs(found - value) <= TOLERANCE[case.tolerance] * np.asarray(scale)).all()


@every_case
def test_threads_do_not_show(case: Case) -> None:
    arrays = arguments(case)
    results = []
    for threads in (1, 2, 3, 4):
        _core.set_num_threads(threads)
        results.append(case.run(**arrays))
    assert all(same_bits(results[0], other) for other in results[1:])


@every_case
def test_rows_do_not_see_each_other(case: Case) -> None:
    arrays = arguments(case)
    whole = case.run(**arrays)
    count = len(whole)
    item = case.run.keywords.get("item_rows", 0) if isinstance(case.run, partial) else 0
    for size in (1, 2, 5, 7, 16, 33, 257):
        size *= item or 1
        if size >= count or not case.rows:
            continue
        for start in {0, item or 1, count - size}:
            part = {name: a[start : start + size] if name in case.rows else a for name, a in arrays.items()}
            assert same_bits(case.run(**part), whole[start : start + size]), (size, start)


@every_case
def test_strided_and_read_only_inputs(case: Case) -> None:
    arrays = arguments(case)
    strange = {}
    for name, a in arrays.items():
        wide = np.repeat(a, 2, axis=-1)[..., ::2]
        wide.flags.writeable = False
        strange[name] = wide
    before = {name: a.copy() for name, a in arrays.items()}
    assert same_bits(case.run(**strange), case.run(**arrays))
    assert all(same_bits(before[name], arrays[name]) for name in arrays)


@every_case
def test_nothing_is_allocated_while_it_runs(case: Case) -> None:
    """One block: the arena that the caller reserves beforehand; three more where a weight is packed on the way."""
    arrays = arguments(case)
    case.run(**arrays)
    before = _core._allocation_count()
    case.run(**arrays)
    packs = case.name.startswith("embedding") or case.tolerance == "linear"
    packs = packs and "packed" in case.name
    blocks = 0 if case.tolerance == "activation" else 3 if packs else 1
    assert _core._allocation_count() - before == blocks


@every_case
def test_wrong_arrays_are_named(case: Case) -> None:
    arrays = arguments(case)
    for name, a in arrays.items():
        named = "weight" if name == "table" and "packed" in case.name else name
        with pytest.raises(TypeError, match=f"{named}: .*float64"):
            case.run(**(arrays | {name: a.astype(np.float64)}))
        if case.name.startswith(("top_k", "embedding")):
            continue
        with pytest.raises(TypeError, match=f"{name}: .*list"):
            case.run(**(arrays | {name: a.tolist()}))


# ---- linear and weights ----


@pytest.mark.parametrize("dtype", STORAGE)
def test_rounded_weights_stay_near(dtype: str) -> None:
    rng = np.random.default_rng(1)
    x, w = normal(rng, 3, 400), normal(rng, 50, 400)
    error = np.abs(kernels.linear(x, w, dtype=dtype) - x.astype(np.float64) @ w.T.astype(np.float64))
    assert (error <= (STORAGE[dtype] + TOLERANCE["linear"]) * (np.abs(x) @ np.abs(w.T))).all()


def test_all_own_ways_agree() -> None:
    rng = np.random.default_rng(2)
    w = normal(rng, 70, 600)
    for m in (1, 5, 14, 40, 300):
        x = normal(rng, m, 600)
        assert same_bits(kernels.linear(x, w), kernels.linear(x, w, method="rows"))


def test_axes_in_front_are_kept() -> None:
    rng = np.random.default_rng(3)
    x, w = normal(rng, 2, 3, 20), normal(rng, 5, 20)
    assert same_bits(kernels.linear(x, w).reshape(6, 5), kernels.linear(x.reshape(6, 20), w))
    assert kernels.linear(x[:0], w).shape == (0, 3, 5)


def test_float16_conversion_is_numpys() -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16).reshape(256, 256)
    found, overflows = _core._convert(halves, "float32")
    nan = np.isnan(halves)
    assert overflows == 0
    assert same_bits(found[~nan], halves.astype(F32)[~nan])
    assert np.isnan(found[nan]).all()
    back, _ = _core._convert(found, "float16")
    assert same_bits(back[~nan], halves[~nan])
    assert np.isnan(back[nan]).all()
    # around every boundary between two halves, subnormals and the overflow limit included
    ordered = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float64)
    ordered[-1] = 65536.0
    middle = (ordered[1:] + ordered[:-1]).astype(F32) / F32(2)
    values = np.concatenate([middle, -middle])
    values = np.concatenate([values, np.nextafter(values, F32(0)), np.nextafter(values, F32(np.inf))])[None]
    found, overflows = _core._convert(values, "float16")
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    assert same_bits(found, expected)
    assert overflows == np.isinf(expected).sum() > 0


def test_bfloat16_conversion_is_torchs() -> None:
    bits = np.random.default_rng(4).integers(0, 2**32, 200_000, dtype=np.uint32)
    values = np.concatenate([bits, [0x7F800001, 0xFF800001, 0x7F7FFFFF, 0x7F7F8000, 1, 0x8000, 0x18000]])
    values = values.astype(np.uint32).view(F32)[None]
    found, overflows = _core._convert(values, "bfloat16")
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    nan = np.isnan(values)
    assert same_bits(found[~nan], expected[~nan])
    assert (((found[nan] & 0x7F80) == 0x7F80) & ((found[nan] & 0x7F) != 0)).all()
    assert overflows == (np.isinf(widened(found)) & np.isfinite(values)).sum() > 0


@pytest.mark.parametrize("stored", STORAGE)
@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (17, 65), (300, 1100)])
def test_packing_and_back(stored: str, shape: tuple[int, int]) -> None:
    source = kernels.PackedWeight(normal(np.random.default_rng(5), *shape), stored).unpack()
    assert same_bits(kernels.PackedWeight(source).unpack(), source)
    for dtype in STORAGE:
        assert same_bits(kernels.PackedWeight(source, dtype).unpack(), _core._convert(source, dtype)[0])


def test_too_large_for_float16() -> None:
    w = np.ones((3, 4), F32)
    w[1, 2] = 65520.0
    with pytest.raises(_core.NumericError, match="weight: 1 values of F32 are too large for F16"):
        kernels.PackedWeight(w, "float16")
    w[1, 2] = np.inf  # is infinite as stored: nothing is lost
    assert np.isinf(kernels.PackedWeight(w, "float16").unpack()).sum() == 1


# ---- rows ----


def test_extremes_of_activations() -> None:
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, -3e38, 100.0, -100.0, 5e-7], F32)
    for name in kernels.ACTIVATIONS:
        found = kernels.activation(x, name)
        expected = ACTIVATIONS_64[name](torch.from_numpy(x)).numpy()
        kept = np.isfinite(expected)
        assert np.isnan(found[4])
        assert np.allclose(found[kept], expected[kept], rtol=1e-6, atol=1e-37), name


def test_log_softmax_of_extremes() -> None:
    x = np.array([[-np.inf, 0.0, 3.0], [1e38, -1e38, 0.0], [np.nan, 1.0, 2.0], [-np.inf] * 3, [500.0] * 3], F32)
    expected = torch.log_softmax(torch.from_numpy(x), -1).numpy()
    np.testing.assert_allclose(kernels.log_softmax(x), expected, rtol=1e-6)


def test_top_k_nan_never_wins() -> None:
    x = normal(np.random.default_rng(6), 4, 100)
    x[:, ::3] = np.nan
    values, ids = kernels.top_k(x, 66)
    assert np.isfinite(values).all()
    assert same_bits(values, np.take_along_axis(x, ids.astype(np.int64), -1))
    assert (np.diff(values, axis=-1) <= 0).all()
    values, ids = kernels.top_k(x, 70)
    assert np.isnan(values[:, 66:]).all()
    assert (ids[:, 66:] == [0, 3, 6, 9]).all()
    x[1] = np.array([np.inf, -np.inf] * 50)
    assert (kernels.top_k(x, 3)[1][1] == [0, 2, 4]).all()


def test_first_bad_row() -> None:
    x = np.zeros((3000, 77), F32)
    assert kernels.first_bad_row(x) == -1
    x[2999, 76] = np.nan
    assert kernels.first_bad_row(x) == 2999
    x[40, 0] = -np.inf
    assert kernels.first_bad_row(x) == 40
    assert kernels.first_bad_row(np.full((2, 3), 3e38, F32)) == -1
    assert kernels.first_bad_row(x[:0]) == -1


def test_copy_rows() -> None:
    rng = np.random.default_rng(7)
    out, x = normal(rng, 9, 5), normal(rng, 4, 5)
    to, of = np.array([8, 0, 3], np.int32), np.array([1, 1, 2], np.int32)
    expected = out.copy()
    expected[to] = x[of]
    assert same_bits(kernels.copy_rows(out, x, to, of), expected)
    expected = out.copy()
    expected[:4] = x
    assert same_bits(kernels.copy_rows(out, x), expected)
    assert same_bits(kernels.copy_rows(out, x, x_rows=of)[:3], x[of])


def test_negative_ids_leave_a_row_alone() -> None:
    rng = np.random.default_rng(8)
    table, base = normal(rng, 4, 5), normal(rng, 3, 5)
    found = kernels.embedding(table, np.array([2, -1, 0], np.int32), base)
    assert same_bits(found, base + np.stack([table[2], np.zeros(5, F32), table[0]]))


# ---- attention ----

WIDTHS = [(1, 1, 1), (2, 1, 7), (4, 4, 64), (3, 3, 80), (4, 2, 88), (2, 2, 96)]


@pytest.mark.parametrize(("heads", "kv_heads", "width"), WIDTHS)
def test_decoding_has_the_bits_of_the_whole_pass(heads: int, kv_heads: int, width: int) -> None:
    """Each position alone, its keys cut anywhere into prefix and scattered slots, and in chunks."""
    rng = np.random.default_rng(width)
    batch, length = 3, 37
    q = normal(rng, batch, length, heads * width)
    k, v = normal(rng, batch, length, kv_heads * width), normal(rng, batch, length, kv_heads * width)
    whole = kernels.attention(q, k, v, heads, kv_heads, causal=True)
    for cut, position in [(1, 1), (5, 5), (5, 20), (16, 17), (20, 36), (32, 36), (36, 36)]:
        slots = rng.permutation(batch * length).astype(np.int32).reshape(batch, length)[:, : position + 1 - cut]
        k_slots, v_slots = (np.full((batch * length, kv_heads * width), np.nan, F32) for _ in range(2))
        k_slots[slots], v_slots[slots] = k[:, cut : position + 1], v[:, cut : position + 1]
        found = kernels.decode_attention(
            q[:, position], k[:, :cut], v[:, :cut], k_slots, v_slots, slots, heads, kv_heads
        )
        assert same_bits(found, whole[:, position]), (cut, position)
    for first, end in [(0, 10), (10, 11), (11, 37)]:
        chunk = kernels.attention(q[:, first:end], k[:, :end], v[:, :end], heads, kv_heads, causal=True)
        assert same_bits(chunk, whole[:, first:end])
    near = kernels.attention(q, k, v, heads, kv_heads, causal=True, window=21)
    for first, end in [(0, 10), (10, 11), (11, 36), (36, 37)]:
        chunk = kernels.attention(q[:, first:end], k[:, :end], v[:, :end], heads, kv_heads, causal=True, window=21)
        assert same_bits(chunk, near[:, first:end])


def test_distances_count_from_the_rows_own_last_position() -> None:
    """A decoded token, its keys in slots, sees the distances of the whole pass: the same bits."""
    rng = np.random.default_rng(15)
    q, k, v = (normal(rng, 2, 25, 3 * 24) for _ in range(3))
    bias = normal(rng, 3, 2 * 12 - 1)
    whole = kernels.attention(q, k, v, 3, causal=True, distance_bias=bias)
    for position in (4, 13, 24):
        slots = rng.permutation(50).astype(np.int32).reshape(2, 25)[:, : position - 3]
        k_slots, v_slots = np.full((50, 72), np.nan, F32), np.full((50, 72), np.nan, F32)
        k_slots[slots], v_slots[slots] = k[:, 4 : position + 1], v[:, 4 : position + 1]
        found = kernels.packed_attention(
            np.ascontiguousarray(q[:, position]), np.arange(3, dtype=np.int32), k.reshape(50, 72), v.reshape(50, 72),
            np.array([0, 25], np.int32), np.array([4, 4], np.int32), heads=3, k_suffix=k_slots, v_suffix=v_slots,
            suffix_slots=slots, suffix_lens=np.full(2, position - 3, np.int32), distance_bias=bias, causal=True,
        )  # fmt: skip
        assert same_bits(found, whole[:, position])


@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_contribute_nothing(causal: bool) -> None:
    """Whatever they hold, NaN included, and the bits are those of the row without them."""
    rng = np.random.default_rng(9)
    q, k, v = (normal(rng, 2, 30, 3 * 20) for _ in range(3))
    mask = np.ones((2, 30), bool)
    mask[0, :7] = False
    mask[1, [3, 4, 11, 29]] = False
    k[~mask], v[~mask] = np.nan, np.inf
    found = kernels.attention(q, k, v, 3, causal=causal, key_mask=mask)
    assert np.isfinite(found).all()
    alone = kernels.attention(q[:1, 7:], k[:1, 7:], v[:1, 7:], 3, causal=causal)
    assert same_bits(found[0, 7:], alone[0])
    if causal:
        assert not found[0, :7].any()
    else:
        alone = kernels.attention(q[1:], k[1:][:, mask[1]], v[1:][:, mask[1]], 3)
        assert same_bits(found[1], alone[0])


def test_later_keys_contribute_nothing() -> None:
    rng = np.random.default_rng(10)
    q, k, v = (normal(rng, 1, 40, 16) for _ in range(3))
    before = kernels.attention(q, k, v, 2, causal=True)
    k[:, 33:], v[:, 33:] = np.nan, -np.inf
    assert same_bits(kernels.attention(q, k, v, 2, causal=True)[:, :33], before[:, :33])


def test_rows_of_unequal_length() -> None:
    rng = np.random.default_rng(11)
    lengths, offsets = np.array([3, 0, 20, 1], np.int32), np.array([0, 3, 3, 23, 24], np.int32)
    q, k, v = (normal(rng, 24, 40) for _ in range(3))
    found = kernels.packed_attention(q, offsets, k, v, offsets[:-1], lengths, heads=4, causal=True)
    for b in range(4):
        row = slice(offsets[b], offsets[b + 1])
        assert same_bits(found[row], kernels.attention(q[None, row], k[None, row], v[None, row], 4, causal=True)[0])


def test_no_keys_give_zeros() -> None:
    q, none = np.ones((2, 3, 8), F32), np.ones((2, 0, 8), F32)
    assert not kernels.attention(q, none, none, 2).any()


def test_large_scores() -> None:
    rng = np.random.default_rng(12)
    q, k, v = (normal(rng, 1, 50, 32, scale=40.0) for _ in range(3))
    value, scale = attention_64(q, k, v, 2, 2, False, 1.0)
    # a score of 5e4 has an absolute error of some 1e-2: what counts is that the winner takes it all
    assert np.abs(kernels.attention(q, k, v, 2, scale=1.0) - value).max() <= 0.05 * scale.max()


@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True}, {"causal": True, "window": 4}, {"bias": True, "causal": True}, {"bias": True, "mask": True}],
    ids=str,
)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_attention_weights_are_those_of_attention(kv_heads: int, options: dict[str, Any]) -> None:
    """They sum to one over the keys that are seen, and make attention's output of the values."""
    rng = np.random.default_rng(kv_heads)
    options = dict(options)
    bias = normal(rng, 4, 2 * 6 - 1) if options.pop("bias", False) else None
    mask = rng.random((2, 19)) > 0.3 if options.pop("mask", False) else None
    q, k, v = normal(rng, 2, 11, 4 * 13), normal(rng, 2, 19, kv_heads * 13), normal(rng, 2, 19, kv_heads * 13)
    given = {"kv_heads": kv_heads, "key_mask": mask, "distance_bias": bias, **options}
    weights = kernels.attention(q, k, v, 4, weights=True, **given)
    assert weights.shape == (2, 4, 11, 19)
    np.testing.assert_allclose(weights.sum(axis=-1), 1.0, rtol=1e-5)
    if mask is not None:
        assert not weights[~np.broadcast_to(mask[:, None, None], weights.shape)].any()
    values = np.repeat(v.reshape(2, 19, kv_heads, 13), 4 // kv_heads, axis=2)
    np.testing.assert_allclose(
        np.einsum("bhqk,bkhd->bqhd", weights, values).reshape(2, 11, 52),
        kernels.attention(q, k, v, 4, **given),
        rtol=1e-4,
        atol=1e-5,
    )


def test_attention_weights_of_ragged_rows_with_suffixes() -> None:
    rng = np.random.default_rng(2)
    q, k, v = normal(rng, 5, 16), normal(rng, 9, 16), normal(rng, 9, 16)
    slots = np.array([[3, 0, 2], [1, 0, 0]], np.int32)
    rows = (q, np.array([0, 2, 5], np.int32), k, v, np.array([0, 4], np.int32), np.array([4, 5], np.int32))
    given = {
        "heads": 2, "k_suffix": normal(rng, 4, 16), "v_suffix": normal(rng, 4, 16), "suffix_slots": slots,
        "suffix_lens": np.array([3, 1], np.int32), "causal": True,
    }  # fmt: skip
    weights, out = kernels.packed_attention(*rows, weights=True, **given), kernels.packed_attention(*rows, **given)
    begin = 0
    for b, (first, last, keys) in enumerate([(0, 2, 7), (2, 5, 6)]):
        size = 2 * (last - first) * keys
        own = weights[begin : begin + size].reshape(2, last - first, keys)
        values = np.concatenate([v[rows[4][b] :][: rows[5][b]], given["v_suffix"][slots[b]][: given["suffix_lens"][b]]])
        want = np.einsum("hqk,khd->qhd", own, values.reshape(keys, 2, 8)).reshape(last - first, 16)
        np.testing.assert_allclose(want, out[first:last], rtol=1e-4, atol=1e-5)
        begin += size
    assert begin == weights.size


def test_cross_attention_is_the_qformers() -> None:
    rng = np.random.default_rng(13)
    hidden, image = normal(rng, 2, 32, 48), normal(rng, 2, 17, 70)
    projections = [(normal(rng, 48, n, scale=n**-0.5), normal(rng, 48)) for n in (48, 70, 70)]
    found = kernels.cross_attention(hidden, image, *projections, heads=3)
    q, k, v = (
        torch.nn.functional.linear(torch.from_numpy(x), *map(torch.from_numpy, p)).view(2, -1, 3, 16).transpose(1, 2)
        for x, p in zip((hidden, image, image), projections, strict=True)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 32, 48)
    np.testing.assert_allclose(found, expected.numpy(), atol=3e-6)


# ---- refusals ----

X, W, V = np.ones((2, 4), F32), np.ones((3, 4), F32), np.ones(3, F32)
T = np.ones((1, 2, 6), F32)
REFUSED = [
    (lambda: kernels.linear(X, np.ones((3, 5), F32)), ValueError, r"x \[2, 4\] does not fit weight .*\[3, 5\]"),
    (lambda: kernels.linear(X, W, np.ones(4, F32)), ValueError, r"bias: expected F32 \[3\], found F32 \[4"),
    (lambda: kernels.linear(X, W, residual=X), ValueError, r"residual: expected shape \[2, 3\], found \[2, 4\]"),
    (lambda: kernels.linear(X, W, activation="swish"), ValueError, "activation: expected one of .* found 'swish'"),
    (lambda: kernels.linear(X, W, dtype="int3"), ValueError, "dtype: expected .* found int3"),
    (lambda: kernels.linear(X, W, method="magic"), ValueError, "method: .*'magic'"),
    (lambda: kernels.linear(X, W, method="openblas", item_rows=3), ValueError, "2 rows are no multiple of 3"),
    (lambda: kernels.linear(X, W.astype(np.float16), method="openblas"), TypeError, "weight: .*float16"),
    (lambda: kernels.linear(X, V), ValueError, "weight: expected 2 axes, found 1"),
    (lambda: kernels.linear(np.array(1.0, F32), W), ValueError, "x: expected at least 1 axis"),
    (lambda: kernels.PackedWeight(np.ones((0, 4), F32)), ValueError, "weight: .*elements"),
    (lambda: kernels.layer_norm(X, V), ValueError, r"gamma: expected F32 \[4\], found F32 \[3"),
    (lambda: kernels.rms_norm(X, V), ValueError, r"gamma: expected F32 \[4\], found F32 \[3"),
    (lambda: kernels.gate(X, W), ValueError, r"up: expected shape \[2, 4\], found \[3, 4\]"),
    (lambda: kernels.gate(X, X, "swish"), ValueError, "activation: expected one of .* found 'swish'"),
    (lambda: kernels.attention(T, T, T, 2, distance_bias=W), ValueError, r"distance_bias: expected shape \[2, an odd"),
    (lambda: kernels.attention(T, T, T, 3, distance_bias=W), ValueError, r"distance_bias: .*found \[3, 4\]"),
    (lambda: kernels.top_k(X, 5), ValueError, "k = 5 of 4"),
    (lambda: kernels.top_k(X, 0), ValueError, "k = 0 of 4"),
    (lambda: kernels.embedding(W, np.array([1, 3], np.int32)), IndexError, "id 3 at position 1 .* 3 rows"),
    (lambda: kernels.embedding(W, np.array([-1], np.int32)), IndexError, "found -1"),
    (lambda: kernels.embedding(W, np.array([1]), X), TypeError, "ids: .*int32.*int64"),
    (lambda: kernels.embedding(W, np.array([1], np.int32), X), ValueError, "added_to: expected 1 rows, found 2"),
    (lambda: kernels.patches(np.ones((1, 3, 8, 8), F32), 9), ValueError, "8 x 8, patch 9"),
    (lambda: kernels.patches(np.ones((1, 3, 8, 8), F32), 0), ValueError, "patch 0"),
    (lambda: kernels.add_rows(X, W), ValueError, "2 rows are no multiple of 3"),
    (lambda: kernels.copy_rows(X, W, np.array([0, 2, 1], np.int32)), IndexError, "row 2 of out, which has 2"),
    (lambda: kernels.copy_rows(X, W), IndexError, "3 rows of out, which has 2"),
    (lambda: kernels.attention(T, T, T, 4), ValueError, "heads: expected a divisor of 6, found 4"),
    (lambda: kernels.attention(T, T, T, 6, 4), ValueError, "6 heads over 4 key heads"),
    (lambda: kernels.attention(T, T[:, :1], T[:, :1], 2, causal=True), ValueError, "2 queries, prefix 0 . 1"),
    (lambda: kernels.attention(T, T, T, 2, key_mask=np.ones((1, 3), bool)), ValueError, "key_mask: shape"),
    (lambda: kernels.attention(T, T, T[:, :1], 2), ValueError, "v: shape"),
    (lambda: kernels.attention(T, T, T, 2, window=-1), ValueError, "window of -1 keys"),
    (lambda: kernels.rope(X, np.zeros(2, np.int32), V, 4), ValueError, r"rope: 6 of 4 elements"),
    (lambda: kernels.rope(X, np.zeros(2, np.int32), V[:1], 3), ValueError, r"rope: 2 of 3 .*\[2, 4\]"),
    (lambda: kernels.rope(X, np.zeros(1, np.int32), V[:1], 2), ValueError, "positions: expected 2 rows, found 1"),
    (
        lambda: kernels.decode_attention(T[0], np.ones((2, 1, 6), F32), np.ones((2, 1, 6), F32), T[0], T[0],
                                         np.array([[0], [2]], np.int32), 2),
        IndexError, "row 1: suffix slot 2 of 2",
    ),
    (
        lambda: kernels.packed_attention(T[0], np.array([0, 2], np.int32), T[0], T[0], np.array([1], np.int32),
                                         np.array([2], np.int32), heads=2),
        ValueError, r"prefix 1 \+ 2 of 2",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


def test_out_of_memory_is_an_exception() -> None:
    x, w = np.ones((5, 300), F32), kernels.PackedWeight(np.ones((40, 300), F32))
    expected = kernels.linear(x, w)
    _core._fail_allocation_after(1)
    with pytest.raises(MemoryError, match="scratch arena"):
        kernels.linear(x, w)
    assert same_bits(kernels.linear(x, w), expected)


# ---- company ----


def test_many_threads_at_once() -> None:
    """Callers of one pool do not disturb each other, nor does resizing it between their calls."""
    rng = np.random.default_rng(14)
    x, w = normal(rng, 40, 300), kernels.PackedWeight(normal(rng, 200, 300))
    q = normal(rng, 2, 40, 4 * 32)
    expected = kernels.linear(x, w), kernels.attention(q, q, q, 4)
    wrong = []

    def work() -> None:
        for _ in range(30):
            found = kernels.linear(x, w), kernels.attention(q, q, q, 4)
            wrong.extend(i for i in range(2) if not same_bits(found[i], expected[i]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for threads_now in itertools.islice(itertools.cycle((1, 4, 2, 3)), 40):
        _core.set_num_threads(threads_now)
        time.sleep(0.002)
    for thread in threads:
        thread.join()
    assert wrong == []


def interrupted(work: Callable[[], Any], after: float) -> float:
    """Seconds between a signal whose handler raises and the exception."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, stop)
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        return time.perf_counter() - start - after
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_signals_are_answered_within_100_ms() -> None:
    x, w = np.ones((4000, 8192), F32), kernels.PackedWeight(np.ones((2048, 8192), F32), "float16")
    q = np.ones((1, 6000, 16 * 88), F32)
    assert min(interrupted(lambda: kernels.linear(x, w), 0.1) for _ in range(3)) < 0.1
    assert min(interrupted(lambda: kernels.attention(q, q, q, 16), 0.1) for _ in range(3)) < 0.1
    long, looked = q[:, :4000, :176], lambda: kernels.attention(long, long, long, 2, weights=True)
    assert min(interrupted(looked, 0.1) for _ in range(3)) < 0.1
    assert kernels.linear(x[:1], w)[0, 0] == 8192.0


# ---- instruction sets ----

if CHILD not in os.environ:

    @pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
    def test_every_instruction_set(isa: str) -> None:
        """This file once more under each; one that the processor lacks must be refused, not replaced."""
        here = Path(__file__)
        environment = os.environ | {"BLIP2C_ISA": isa, CHILD: "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        if isa != "generic" and not _core.cpu_info()[isa]:
            run = run_python("import blip2c", BLIP2C_ISA=isa)
            assert run.returncode != 0
            assert f"BLIP2C_ISA={isa}" in run.stderr
            return
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(here)]
        run = subprocess.run(command, env=environment, cwd=here.parent.parent, capture_output=True, text=True)
        assert run.returncode == 0, run.stdout[-4000:]
else:

    def test_the_instruction_set_is_the_one_asked_for() -> None:
        assert _core.cpu_info()["isa"] == os.environ["BLIP2C_ISA"]


def test_top_k_of_too_many_takes_no_memory() -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="k = 10000000 of 4 values"):
            kernels.top_k(np.zeros((1, 4), np.float32), 10_000_000)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("queries", "keys"), [(2, 2**20), (2**31 - 1, 2), (2**31 - 1, 2**31 - 1)])
def test_weights_of_too_many_rows_take_no_memory(queries: int, keys: int) -> None:
    offsets, lengths, starts = (np.array(x, np.int32) for x in ([0, queries], [keys], [0]))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"attention: (row 0: .* prefix|q_offsets run)"):
            kernels.packed_attention(T[0], offsets, T[0], T[0], starts, lengths, heads=2, weights=True)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_queries_of_no_row_are_refused() -> None:
    x, none = np.ones((3, 4), np.float32), np.zeros(0, np.int32)
    with pytest.raises(ValueError, match="q_offsets run from 0 to 0, expected 0 to 3"):
        kernels.packed_attention(x, np.zeros(1, np.int32), x, x, none, none, heads=1)
