"""Attention on a device against float64, over the whole contract: what a query sees, how its keys lie, and what may not
change a result."""

import ctypes
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

from cuda_build import HOST, ROOT, host_library

F32, I32 = np.float32, np.int32
MULTIPROCESSORS = 132
# Largest |found - float64| over the sum of |weight * value|.
EXACT = 2e-6
ROUNDED = {"float16": 2e-3, "bfloat16": 1.6e-2}
OPERANDS = {"float32": 0, "float16": 1, "bfloat16": 2}
POINTERS = ("out", "q", "k", "v", "k_suffix", "v_suffix", "q_offsets", "prefix_starts", "prefix_lens", "suffix_slots",
            "suffix_lens", "key_mask", "distance_bias")  # fmt: skip
NUMBERS = ("out_floats", "q_rows", "k_rows", "suffix_rows", "out_ld", "q_ld", "kv_ld", "rows", "suffix_ld",
           "key_mask_ld", "causal", "heads", "kv_heads", "head_dim", "distance_limit", "window", "operands",
           "keys", "wants_weights", "multiprocessors", "capturing")  # fmt: skip


class AttentionCall(ctypes.Structure):
    """As in tests/cuda_host/attention_calls.cu."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in POINTERS]
        + [(name, ctypes.c_int64) for name in NUMBERS]
        + [("scale", ctypes.c_float)]
    )


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    sources = sorted((ROOT / "csrc" / "ops" / "cuda").glob("attention*.cu"))
    sources += [ROOT / "csrc" / "core" / f"{name}.c" for name in ("arena", "error", "memory")]
    loaded = ctypes.CDLL(str(host_library([*sources, HOST / "attention_calls.cu"])))
    loaded.run_attention.restype = ctypes.c_char_p
    return loaded


@dataclass
class Row:
    queries: int
    prefix: int
    suffix: int = 0

    @property
    def keys(self) -> int:
        return self.prefix + self.suffix


@dataclass
class Case:
    rows: list[Row]
    width: int
    heads: int = 2
    kv_heads: int = 2
    causal: bool = False
    window: int = 0
    masked: str = ""
    """"", "some" or "all" (every key of the first row)."""
    distances: int = 0
    apart: int = 0
    """Floats between two rows."""
    scale: float = 0.0
    operands: str = "float32"
    keys: str = "float32"
    """What keys and values are kept in."""
    multiprocessors: int = MULTIPROCESSORS
    capturing: bool = False
    seed: int = 0
    suffixes: bool = field(init=False)

    def __post_init__(self) -> None:
        self.suffixes = any(row.suffix for row in self.rows)
        self.scale = self.scale or 0.7 * self.width**-0.5


@dataclass
class Arrays:
    """By row of the batch; keys and values are prefix and suffix together."""

    q: list[np.ndarray]
    k: list[np.ndarray]
    v: list[np.ndarray]
    shown: list[np.ndarray]
    bias: np.ndarray | None


def arrays_of(case: Case) -> Arrays:
    rng = np.random.default_rng(case.seed)

    def normal(rows: int, heads: int, kept: str = "float32") -> np.ndarray:
        values = torch.from_numpy(rng.standard_normal((rows, heads * case.width)).astype(F32))
        return values.to(getattr(torch, kept)).float().numpy()

    q = [normal(row.queries, case.heads) for row in case.rows]
    k = [normal(row.keys, case.kv_heads, case.keys) for row in case.rows]
    v = [normal(row.keys, case.kv_heads, case.keys) for row in case.rows]
    shown = [rng.random(row.keys) < 0.6 if case.masked else np.ones(row.keys, bool) for row in case.rows]
    if case.masked == "all":
        shown[0][:] = False
    bias = rng.standard_normal((case.heads, 2 * case.distances - 1)).astype(F32) if case.distances else None
    return Arrays(q, k, v, shown, bias)


def seen_by(case: Case, arrays: Arrays, b: int) -> np.ndarray:
    """[T, keys]"""
    row = case.rows[b]
    here, keys = np.arange(row.queries)[:, None] + row.keys - row.queries, np.arange(row.keys)
    seen = np.broadcast_to(arrays.shown[b], (row.queries, row.keys)).copy()
    if case.causal:
        seen &= keys <= here
    if case.window:
        seen &= keys > here - case.window
    return seen


def weights_64(case: Case, arrays: Arrays, b: int) -> np.ndarray:
    """[H, T, keys]"""
    row, group = case.rows[b], case.heads // case.kv_heads
    q = arrays.q[b].astype(np.float64).reshape(row.queries, case.heads, case.width)
    k = arrays.k[b].astype(np.float64).reshape(row.keys, case.kv_heads, case.width).repeat(group, 1)
    scores = case.scale * np.einsum("qhd,khd->hqk", q, k)
    if arrays.bias is not None:
        last = case.distances - 1
        distance = np.arange(row.keys) - (np.arange(row.queries)[:, None] + row.keys - row.queries)
        scores += arrays.bias[:, np.clip(distance, -last, last) + last]
    scores = np.where(seen_by(case, arrays, b), scores, -np.inf)
    most = scores.max(-1, keepdims=True, initial=-np.inf)
    p = np.exp(scores - np.where(most == -np.inf, 0.0, most))
    return p / np.maximum(p.sum(-1, keepdims=True), 1e-300)


def expected(case: Case, arrays: Arrays) -> tuple[np.ndarray, np.ndarray]:
    """(output [N, H*Dh], what its errors are measured against)"""
    group, out, size = case.heads // case.kv_heads, [], []
    for b, row in enumerate(case.rows):
        p = weights_64(case, arrays, b)
        v = arrays.v[b].astype(np.float64).reshape(row.keys, case.kv_heads, case.width).repeat(group, 1)
        out.append(np.einsum("hqk,khd->qhd", p, v).reshape(row.queries, case.heads * case.width))
        size.append(np.einsum("hqk,khd->qhd", p, np.abs(v)).reshape(row.queries, case.heads * case.width))
    return np.concatenate(out), np.concatenate(size) + 1e-30


def apart(rows: np.ndarray, gap: int) -> np.ndarray:
    out = np.full((max(len(rows), 1), rows.shape[1] + gap), np.nan, F32)
    out[: len(rows), : rows.shape[1]] = rows
    return out


def kept(rows: np.ndarray, case: Case) -> np.ndarray:
    """As caches hold them."""
    values = torch.from_numpy(apart(rows, case.apart)).to(getattr(torch, case.keys))
    return (values if case.keys == "float32" else values.view(torch.int16)).numpy()


class Placed:
    """Keys and values of all rows as caches hold them: prefixes one after another, suffixes through shuffled slots;
    whatever no query may see is NaN."""

    def __init__(self, case: Case, arrays: Arrays) -> None:
        rng = np.random.default_rng(case.seed + 1)
        wide = case.kv_heads * case.width
        self.prefix_lens = np.array([row.prefix for row in case.rows], I32)
        self.starts = (np.cumsum(self.prefix_lens) - self.prefix_lens).astype(I32)
        self.suffix_lens = np.array([row.suffix for row in case.rows], I32)
        self.suffix_ld = int(self.suffix_lens.max()) + 1
        places = rng.permutation(len(case.rows) * self.suffix_ld + 3)
        self.slots = np.full((len(case.rows), self.suffix_ld), -(10**6), I32)
        self.k, self.v = (np.full((self.prefix_lens.sum() + 1, wide), np.nan, F32) for _ in range(2))
        self.k_suffix, self.v_suffix = (np.full((len(places), wide), np.nan, F32) for _ in range(2))
        self.mask = np.zeros((len(case.rows), max(row.keys for row in case.rows) + 2), np.uint8)
        for b, row in enumerate(case.rows):
            self.mask[b, : row.keys] = arrays.shown[b]
            slots = places[b * self.suffix_ld :][: row.suffix]
            self.slots[b, : row.suffix] = slots
            prefix = slice(self.starts[b], self.starts[b] + row.prefix)
            for to, suffix, values in ((self.k, self.k_suffix, arrays.k[b]), (self.v, self.v_suffix, arrays.v[b])):
                values = np.where(arrays.shown[b][:, None], values, np.nan)
                to[prefix], suffix[slots] = values[: row.prefix], values[row.prefix :]


def run(library: ctypes.CDLL, case: Case, arrays: Arrays, weights: bool = False) -> tuple[np.ndarray, int]:
    """(output [N, H*Dh] or all weights [...], bytes of scratch)"""
    placed, count = Placed(case, arrays), sum(row.queries for row in case.rows)
    out = np.full((max(count, 1), case.heads * case.width + case.apart), np.nan, F32)
    if weights:
        out = np.full(sum(case.heads * row.queries * row.keys for row in case.rows) + 1, np.nan, F32)
    held = {
        "out": out,
        "q": apart(np.concatenate(arrays.q), case.apart),
        "k": kept(placed.k, case),
        "v": kept(placed.v, case),
        "q_offsets": np.cumsum([0] + [row.queries for row in case.rows]).astype(I32),
        "prefix_starts": placed.starts,
        "prefix_lens": placed.prefix_lens,
        "k_suffix": kept(placed.k_suffix, case) if case.suffixes else None,
        "v_suffix": kept(placed.v_suffix, case) if case.suffixes else None,
        "suffix_slots": placed.slots if case.suffixes else None,
        "suffix_lens": placed.suffix_lens if case.suffixes else None,
        "key_mask": placed.mask if case.masked else None,
        "distance_bias": arrays.bias,
    }
    numbers = {
        "out_floats": out.size, "q_rows": count, "k_rows": len(placed.k), "suffix_rows": len(placed.k_suffix),
        "out_ld": case.heads * case.width + case.apart, "q_ld": case.heads * case.width + case.apart,
        "kv_ld": case.kv_heads * case.width + case.apart, "rows": len(case.rows), "suffix_ld": placed.suffix_ld,
        "key_mask_ld": placed.mask.shape[1], "causal": case.causal, "heads": case.heads, "kv_heads": case.kv_heads,
        "head_dim": case.width, "distance_limit": case.distances, "window": case.window,
        "operands": OPERANDS[case.operands], "keys": OPERANDS[case.keys], "wants_weights": weights,
        "multiprocessors": case.multiprocessors, "capturing": case.capturing,
    }  # fmt: skip
    pointers = {name: None if array is None else array.ctypes.data for name, array in held.items()}
    peak = ctypes.c_int64()
    message = library.run_attention(
        ctypes.byref(AttentionCall(**pointers, **numbers, scale=case.scale)), ctypes.byref(peak)
    )
    assert message == b"", message.decode()
    if weights:
        assert np.isnan(out[-1])
        return out[:-1], peak.value
    assert np.isnan(out[count:]).all()
    assert np.isnan(out[:, case.heads * case.width :]).all()
    return out[:count, : case.heads * case.width], peak.value


def check(library: ctypes.CDLL, case: Case) -> np.ndarray:
    arrays = arrays_of(case)
    found, _ = run(library, case, arrays)
    value, size = expected(case, arrays)
    worst = (np.abs(found - value) / size).max(initial=0.0)
    assert worst <= ROUNDED.get(case.operands, EXACT), (case, worst)
    blind = np.concatenate([~seen_by(case, arrays, b).any(1) for b in range(len(case.rows))])
    assert not found[blind].any()
    return found


def same_bits(x: np.ndarray, y: np.ndarray) -> bool:
    return x.shape == y.shape and x.tobytes() == y.tobytes()


def random_case(seed: int) -> Case:
    rng = np.random.default_rng(1000 + seed)
    causal = bool(rng.random() < 0.5)
    suffixes = rng.random() < 0.5
    rows = []
    for _ in range(rng.integers(1, 4)):
        prefix, suffix = int(rng.integers(0, 75)), int(rng.integers(0, 40)) if suffixes else 0
        queries = int(rng.choice([0, 1, 1, 2, 7, 8, 9, 15, 17, 33, 40]))
        rows.append(Row(min(queries, prefix + suffix) if causal else queries, prefix, suffix))
    kv_heads = int(rng.choice([1, 2]))
    width = int(rng.choice([1, 3, 4, 7, 20, 32, 33, 64, 80, 88, 96, 100, 127, 128]))
    return Case(
        rows,
        width,
        heads=kv_heads * int(rng.choice([1, 1, 2, 3])),
        kv_heads=kv_heads,
        causal=causal,
        window=int(rng.choice([0, 0, 1, 5, 40])),
        masked=str(rng.choice(["", "", "some", "all"])),
        distances=int(rng.choice([0, 0, 1, 9, 60])),
        apart=int(rng.choice([0, 4, 5])),
        keys=str(rng.choice(["float32", "float16", "bfloat16"])),
        seed=seed,
    )


@pytest.mark.parametrize("seed", range(30))
def test_random_cases(library: ctypes.CDLL, seed: int) -> None:
    check(library, random_case(seed))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(30, 600))
def test_many_random_cases(library: ctypes.CDLL, seed: int) -> None:
    check(library, random_case(seed))


@pytest.mark.parametrize(
    "case",
    [
        Case([Row(65, 65)], 88, causal=True),
        Case([Row(1, 513)], 80),
        Case([Row(1, 700, 500)], 12, causal=True, window=600),
        Case([Row(3, 1100), Row(1, 30)], 8, masked="some"),
        Case([Row(40, 0), Row(1, 0)], 8),
        Case([Row(1, 40)], 16, heads=8, kv_heads=1, scale=-0.3),
        Case([Row(9, 20), Row(1, 150, 20)], 129, heads=4, causal=True, window=13),
        Case([Row(2, 9)], 1024, heads=1, kv_heads=1, distances=4),
        Case([Row(3, 140, 9), Row(1, 0, 2)], 130, heads=4, causal=True, keys="float16", apart=3),
        Case([Row(2, 20, 8), Row(1, 7)], 200, masked="all", distances=6, keys="bfloat16"),
    ],
    ids=str,
)
def test_edges(library: ctypes.CDLL, case: Case) -> None:
    check(library, case)


@pytest.mark.parametrize("operands", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "width", "heads", "kv_heads"),
    [
        ([Row(17, 65)], 88, 2, 2),
        ([Row(30, 129), Row(1, 40), Row(9, 0), Row(97, 33)], 64, 1, 1),
        ([Row(20, 31), Row(0, 7)], 128, 2, 1),
        ([Row(12, 40)], 4, 2, 2),
        ([Row(12, 40)], 72, 1, 1),
    ],
)
def test_rounded_operands(
    library: ctypes.CDLL, rows: list[Row], width: int, heads: int, kv_heads: int, operands: str
) -> None:
    """They are rounded, and by no more than that."""
    case = Case(rows, width, heads, kv_heads, operands=operands, apart=4)
    found = check(library, case)
    exact = check(library, replace(case, operands="float32"))
    assert not same_bits(found, exact)


def test_rounding_needs_leave(library: ctypes.CDLL) -> None:
    """Masks, windows, biases and widths that are not whole vectors go through the exact kernels."""
    rows = [Row(20, 40)]
    options: dict[str, Any]
    for options in (
        {"masked": "some"},
        {"window": 9},
        {"distances": 5},
        {"causal": True},
        {"scale": -0.4},
        {"apart": 1},
    ):
        case = Case(rows, 24, **options)
        assert same_bits(check(library, replace(case, operands="float16")), check(library, case)), options


@pytest.mark.parametrize("operands", ["float32", "float16"])
def test_a_row_is_the_same_in_any_batch(library: ctypes.CDLL, operands: str) -> None:
    rows = [Row(1, 600, 3), Row(20, 50, 4), Row(0, 3, 0), Row(8, 70, 0), Row(1, 9, 1), Row(100, 110, 0)]
    if operands != "float32":
        rows = [Row(row.queries, row.keys) for row in rows]
    case = Case(rows, 20, causal=operands == "float32", operands=operands)
    arrays = arrays_of(case)
    whole, _ = run(library, case, arrays)
    first = 0
    for b, row in enumerate(rows):
        alone = Case([row], 20, causal=case.causal, operands=operands, seed=5)
        part = Arrays([arrays.q[b]], [arrays.k[b]], [arrays.v[b]], [arrays.shown[b]], None)
        for blocks in (1, 10**4):
            found, _ = run(library, replace(alone, multiprocessors=blocks), part)
            assert same_bits(found, whole[first : first + row.queries]), (row, blocks)
        first += row.queries


def test_segments_that_have_blocks_of_their_own_change_no_bit(library: ctypes.CDLL) -> None:
    case = Case([Row(1, 1000, 700), Row(2, 30, 5)], 20, causal=True, window=1400)
    arrays = arrays_of(case)
    apart_, scratch = run(library, case, arrays)
    together, none = run(library, replace(case, multiprocessors=1), arrays)
    recorded, more = run(library, replace(case, capturing=True), arrays)
    assert none == 0
    assert more >= scratch > 0
    assert same_bits(apart_, together)
    assert same_bits(apart_, recorded)


@pytest.mark.parametrize("queries", [1, 20])
def test_later_keys_contribute_nothing(library: ctypes.CDLL, queries: int) -> None:
    """Whatever they hold."""
    case = Case([Row(queries, 60)], 16, causal=True)
    arrays = arrays_of(case)
    before, _ = run(library, case, arrays)
    arrays.k[0][-5:], arrays.v[0][-5:] = np.nan, -np.inf
    after, _ = run(library, case, arrays)
    unaware = max(queries - 5, 0)
    assert same_bits(after[:unaware], before[:unaware])
    assert np.isnan(after[-1]).all()


@pytest.mark.parametrize("seed", range(8))
def test_weights(library: ctypes.CDLL, seed: int) -> None:
    case = random_case(seed)
    arrays = arrays_of(case)
    found, _ = run(library, case, arrays, weights=True)
    value = np.concatenate([weights_64(case, arrays, b).ravel() for b in range(len(case.rows))])
    np.testing.assert_allclose(found, value, rtol=2e-5, atol=2e-7)
    assert not found[value == 0.0].any()
