"""b2_cuda_linear against float64: every weight type, few rows and many, views, scales; what may not change a result.

With BLIP2C_TEST_CARD=1 on the card of this machine, compiled by nvcc; else by the stand-in for one.
"""

import ctypes
import os
import subprocess
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from blip2c import kernels
from cuda_build import CC, HOST, ROOT, card_library, host_library

F32 = np.float32
DTYPES = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3, "int4": 4}
ACTIVATIONS = {
    "none": lambda t: t,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    "silu": torch.nn.functional.silu,
}
H100 = {"multiprocessors": 132, "shared_per_block": 227 << 10}

# Largest |found - float64| over the sum of absolute terms. Up to 16 rows nothing is rounded; with more, x is, to the
# weight's 16 bits (float16 for whole numbers). Tensor cores cut sums off where the host rounds them.
ON_CARD = os.environ.get("BLIP2C_TEST_CARD") == "1"
EXACT = 4e-6 if ON_CARD else 1e-6
ROUNDED = {"float32": EXACT, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-11, "int4": 2.0**-11}


POINTERS = ["out", "x", "w", "scales", "column_scales", "bias", "residual"]
NUMBERS = ["rows", "n", "k", "out_ld", "x_ld", "x_offset", "w_bytes", "scale_bytes", "residual_ld", "dtype", "act",
           "residual_is_out", "arena_bytes", "multiprocessors", "shared_per_block"]  # fmt: skip


class LinearCall(ctypes.Structure):
    """As in tests/cuda_host/linear_calls.cu."""

    _fields_ = [(name, ctypes.c_void_p) for name in POINTERS] + [(name, ctypes.c_int64) for name in NUMBERS]


@pytest.fixture(scope="module")
def library() -> ctypes.CDLL:
    files = ("linear", "few_rows", "few_floats", "tiles", "float_tiles", "cublas")
    sources = [ROOT / "csrc" / "ops" / "cuda" / f"{name}.cu" for name in files]
    sources += [ROOT / "csrc" / "core" / f"{name}.c" for name in ("arena", "error", "memory")]
    build = card_library if ON_CARD else host_library
    loaded = ctypes.CDLL(str(build([*sources, HOST / "linear_calls.cu", HOST / "cublas_lt.cu"])))
    loaded.run_linear.restype = ctypes.c_char_p
    loaded.linear_scratch.restype = ctypes.c_int64
    loaded.linear_scratch.argtypes = [ctypes.c_int64, ctypes.c_int64]
    return loaded


@pytest.fixture(autouse=True)
def own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2C_CUBLASLT", "0")


@dataclass
class Weight:
    dtype: str
    values: np.ndarray
    """float64 [n, k], without column scales."""
    data: np.ndarray
    """As B2_STRIDED has it."""
    scales: np.ndarray | None = None


def padded(values: np.ndarray, fill: float = 0) -> np.ndarray:
    n, k = values.shape
    out = np.full((n, -(-k // 32) * 32), fill, values.dtype)
    out[:, :k] = values
    return out


def make_weight(rng: np.random.Generator, dtype: str, n: int, k: int) -> Weight:
    if dtype == "int8":
        q = padded(rng.integers(-127, 128, (n, k)).astype(np.int8))
        scales = rng.uniform(0.5, 2.0, n).astype(F32) * F32(0.01)
        return Weight(dtype, q[:, :k] * scales[:, None].astype(np.float64), q, scales)
    if dtype == "int4":
        q = padded(rng.integers(0, 16, (n, k)).astype(np.uint8), 8)
        groups = q.shape[1] // 32
        scales = (rng.uniform(0.5, 2.0, (n, groups)) * 0.1 * rng.choice([-1, 1], (n, groups))).astype(np.float16)
        values = (q.astype(np.float64) - 8) * np.repeat(scales.astype(np.float64), 32, 1)
        return Weight(dtype, values[:, :k], q[:, ::2] | q[:, 1::2] << 4, scales)
    w = torch.from_numpy(rng.standard_normal((n, k)).astype(F32) * F32(k**-0.5)).to(getattr(torch, dtype))
    bits = w.view(torch.int32 if dtype == "float32" else torch.int16).numpy()
    return Weight(dtype, w.double().numpy(), padded(bits))


def representable(x: np.ndarray, dtype: str) -> np.ndarray:
    """x as many rows see it: then nothing is rounded and a single missing term shows."""
    if dtype == "float32":
        return x
    return torch.from_numpy(x).to(torch.bfloat16 if dtype == "bfloat16" else torch.float16).float().numpy()


@dataclass
class Case:
    rows: int
    n: int
    k: int
    dtype: str = "float16"
    activation: str = "none"
    bias: bool = True
    residual: str = "apart"
    """"none", "apart" or "out"."""
    views: bool = False
    """Rows further apart than they are long, x at an address that is no multiple of 16."""
    column_scales: bool = False
    seed: int = 0
    device: dict[str, int] = field(default_factory=lambda: dict(H100))
    arena: int = 8 << 20


def arrays_of(case: Case) -> dict[str, Any]:
    rng = np.random.default_rng(case.seed)
    arrays: dict[str, Any] = {"w": make_weight(rng, case.dtype, case.n, case.k)}
    arrays["x"] = representable(rng.standard_normal((case.rows, case.k)).astype(F32), case.dtype)
    if case.column_scales:
        arrays["column_scales"] = (2.0 ** rng.integers(-6, 7, case.k)).astype(F32)
    arrays["bias"] = rng.standard_normal(case.n).astype(F32) if case.bias else None
    arrays["residual"] = rng.standard_normal((case.rows, case.n)).astype(F32) if case.residual != "none" else None
    return arrays


def view(array: np.ndarray, wider: int) -> np.ndarray:
    out = np.full((array.shape[0], array.shape[1] + wider), np.nan, F32)
    out[:, : array.shape[1]] = array
    return out


def address(array: np.ndarray | None) -> int | None:
    return None if array is None else array.ctypes.data


def run(library: ctypes.CDLL, case: Case, arrays: dict[str, Any]) -> tuple[np.ndarray, int, str]:
    """out, bytes of scratch, the library that was used. RuntimeError with the message."""
    w, wider = arrays["w"], 3 if case.views else 0
    x, out = view(arrays["x"], wider), np.full((case.rows, case.n + wider), np.nan, F32)
    bias, residual, columns = arrays["bias"], arrays["residual"], arrays.get("column_scales")
    apart = view(residual, wider) if case.residual == "apart" else None
    if case.residual == "out":
        out[:, : case.n] = residual
    call = LinearCall(
        out=address(out), x=address(x), w=address(w.data), scales=address(w.scales), column_scales=address(columns),
        bias=address(bias), residual=address(apart), rows=case.rows, n=case.n, k=case.k, out_ld=out.shape[1],
        x_ld=x.shape[1], x_offset=1 if case.views else 0, w_bytes=w.data.nbytes,
        scale_bytes=0 if w.scales is None else w.scales.nbytes, residual_ld=case.n + wider, dtype=DTYPES[case.dtype],
        act=list(ACTIVATIONS).index(case.activation), residual_is_out=case.residual == "out", arena_bytes=case.arena,
        **case.device,
    )  # fmt: skip
    peak, name = ctypes.c_int64(), ctypes.create_string_buffer(512)
    error = library.run_linear(ctypes.byref(call), ctypes.byref(peak), name).decode()
    if error:
        raise RuntimeError(error)
    assert np.isnan(out[:, case.n :]).all(), "it wrote beside the view"
    return out[:, : case.n], peak.value, name.value.decode()


def reference(case: Case, arrays: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """In float64: the value, and the sum of absolute terms."""
    x, w = arrays["x"].astype(np.float64), arrays["w"].values
    if case.column_scales:
        x = x * arrays["column_scales"]
    value, scale = x @ w.T, np.abs(x) @ np.abs(w.T)
    if case.bias:
        value, scale = value + arrays["bias"], scale + np.abs(arrays["bias"])
    value, scale = ACTIVATIONS[case.activation](torch.from_numpy(value)).numpy(), 1.2 * scale
    if case.residual != "none":
        value, scale = value + arrays["residual"], scale + np.abs(arrays["residual"])
    return value, scale


def check(
    library: ctypes.CDLL, case: Case, tolerance: float = EXACT, arrays: dict[str, Any] | None = None
) -> np.ndarray:
    arrays = arrays or arrays_of(case)
    out, peak, _ = run(library, case, arrays)
    value, scale = reference(case, arrays)
    error = float((np.abs(out - value) / scale).max())
    assert error <= tolerance, f"{case}: {error:.2e} of the sum of absolute terms"
    assert peak <= case.arena
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "n", "k"), [(1, 1, 1), (1, 40, 96), (3, 17, 70), (8, 33, 300), (9, 16, 64), (16, 50, 129)]
)
def test_few_rows(library: ctypes.CDLL, dtype: str, rows: int, n: int, k: int) -> None:
    check(library, Case(rows, n, k, dtype, column_scales=dtype.startswith("int")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "n", "k"), [(17, 1, 33), (40, 130, 96), (33, 129, 70), (70, 40, 200)])
def test_many_rows(library: ctypes.CDLL, dtype: str, rows: int, n: int, k: int) -> None:
    check(library, Case(rows, n, k, dtype, column_scales=dtype.startswith("int")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [5, 20])
def test_views_and_a_residual_in_place(library: ctypes.CDLL, dtype: str, rows: int) -> None:
    check(library, Case(rows, 21, 75, dtype, views=True))
    check(library, Case(rows, 21, 75, dtype, residual="out", views=True))
    check(library, Case(rows, 21, 75, dtype, residual="none", bias=False))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(library: ctypes.CDLL, activation: str) -> None:
    for rows in (2, 18):
        check(library, Case(rows, 19, 40, activation=activation))
        check(library, Case(rows, 19, 40, "float32", activation=activation))


# ---- what may not change a result ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_are_the_same_however_many_there_are(library: ctypes.CDLL, dtype: str) -> None:
    """Also on cards where x does not fit into shared memory whole: then chunks are added by a second kernel."""
    case = Case(16, 18, 2 * 2560 + 70, dtype)
    arrays = arrays_of(case)
    together = check(library, case, arrays=arrays)
    for rows, device in ((1, H100), (7, {"multiprocessors": 2, "shared_per_block": 99 << 10}), (9, H100)):
        part = {**arrays, "x": arrays["x"][:rows], "residual": arrays["residual"][:rows]}
        some, _, _ = run(library, replace(case, rows=rows, device=device), part)
        np.testing.assert_array_equal(some, together[:rows], err_msg=f"{rows} rows, {device}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_where_parts_do_not_fit_fewer_rows_are_taken_at_once(library: ctypes.CDLL, dtype: str) -> None:
    case = Case(16, 18, 2 * 2560 + 70, dtype)
    expected, whole, _ = run(library, case, arrays_of(case))
    out, peak, _ = run(library, replace(case, arena=1500), arrays_of(case))
    np.testing.assert_array_equal(out, expected)
    assert peak <= 1500 < whole
    check(library, Case(20, 40, 300, dtype, arena=20 * (320 * 2 + 4) + 128))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_many_rows_share_out_columns_where_the_card_would_be_idle(library: ctypes.CDLL, dtype: str) -> None:
    case = Case(33, 40, 700, dtype, activation="gelu")
    _, split, _ = run(library, case, arrays_of(case))
    little = replace(case, arena=33 * (704 * 2 + 4) + 512)
    _, whole, _ = run(library, little, arrays_of(case))
    assert split > whole
    check(library, case)
    check(library, little)


@pytest.mark.parametrize(("rows", "n"), [(150, 20), (20, 300), (300, 40)])
def test_tiles_of_every_size(library: ctypes.CDLL, rows: int, n: int) -> None:
    for dtype, multiprocessors in (("float32", 1), ("float32", 4), ("int4", 1), ("float16", 1)):
        check(library, Case(rows, n, 72, dtype, device={**H100, "multiprocessors": multiprocessors}))
    check(library, Case(150, 128 * 33 + 1, 32, "int8", bias=False, residual="none"))


def test_rows_beyond_a_group(library: ctypes.CDLL) -> None:
    check(library, Case(4096 + 20, 3, 40, residual="out"))


@pytest.mark.parametrize("rows", [20, 90])
def test_many_rows_of_float32_have_the_cpus_bits(library: ctypes.CDLL, rows: int) -> None:
    case = Case(rows, 50, 333, "float32")
    arrays = arrays_of(case)
    out, _, _ = run(library, case, arrays)
    w = np.ascontiguousarray(arrays["w"].values.astype(F32))
    expected = kernels.linear(arrays["x"], w, arrays["bias"], residual=arrays["residual"], method="packed")
    np.testing.assert_array_equal(out, expected)


# ---- activations that 16 bits do not hold ----


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding(library: ctypes.CDLL, dtype: str) -> None:
    rng = np.random.default_rng(1)
    for rows, tolerance in ((6, EXACT), (30, EXACT + ROUNDED[dtype])):
        case = Case(rows, 30, 200, dtype, column_scales=dtype.startswith("int"))
        arrays = arrays_of(case)
        arrays["x"] = rng.standard_normal((rows, 200)).astype(F32)
        if case.column_scales:
            arrays["column_scales"] = rng.uniform(0.1, 9.0, 200).astype(F32)
        check(library, case, tolerance, arrays)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [4, 24])
@pytest.mark.parametrize("power", [-140, -100, -20, 16, 60, 115])
def test_activations_of_any_size(library: ctypes.CDLL, dtype: str, rows: int, power: int) -> None:
    """T5's feed-forward leaves float16; each row has its own scale."""
    case = Case(rows, 20, 64, dtype, bias=False, residual="none")
    arrays = arrays_of(case)
    arrays["x"] = arrays["x"] * (2.0 ** np.where(np.arange(rows) % 2, 0, power)).astype(F32)[:, None]
    out, _, _ = run(library, case, arrays)
    value, scale = reference(case, arrays)
    smallest = 2.0**-133 if dtype == "bfloat16" else 2.0**-149
    assert (np.abs(out - value) <= EXACT * scale + 64 * smallest).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [3, 19])
def test_what_is_no_number_stays_in_its_row(library: ctypes.CDLL, dtype: str, rows: int) -> None:
    case = Case(rows, 20, 64, dtype)
    arrays = arrays_of(case)
    expected, _, _ = run(library, case, arrays)
    arrays["x"] = arrays["x"].copy()
    arrays["x"][0, 5], arrays["x"][2, 7] = np.nan, np.inf
    out, _, _ = run(library, case, arrays)
    bad = [0, 2]
    assert not np.isfinite(out[bad]).any()
    np.testing.assert_array_equal(np.delete(out, bad, 0), np.delete(expected, bad, 0))


# ---- scratch ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 5200), (16, 5200), (33, 700), (17, 8)])
def test_the_plan_covers_what_is_taken(library: ctypes.CDLL, dtype: str, rows: int, width: int) -> None:
    planned = library.linear_scratch(rows, width)
    for n, k in ((16, width), (min(width, 300), 40)):
        case = Case(rows, n, k, dtype, residual="out", arena=planned, device={**H100, "shared_per_block": 99 << 10})
        _, peak, _ = run(library, case, arrays_of(case))
        assert peak <= planned


# ---- the library ----


def stand_in(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BLIP2C_CUBLASLT", library._name)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("residual", ["none", "apart", "out"])
@pytest.mark.parametrize("views", [False, True])
def test_products_by_cublaslt(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dtype: str, residual: str, views: bool
) -> None:
    stand_in(library, monkeypatch)
    case = Case(20, 33, 72, dtype, "gelu", bias=residual != "none", residual=residual, views=views)
    arrays = arrays_of(case)
    arrays["x"] = arrays["x"] * F32(2.0**20) if dtype == "float16" else arrays["x"]
    before = library.cublas_standin_products()
    check(library, case, arrays=arrays)
    _, peak, name = run(library, case, arrays)
    assert name == "cuBLASLt 130000"
    assert library.cublas_standin_products() == before + 2
    assert peak >= 1 << 20, "the algorithm's work space"
    assert library.cublas_standin_alive() == 0


def test_what_cublaslt_does_not_know_own_kernels_compute(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(library, monkeypatch)
    before = library.cublas_standin_products()
    for case in (Case(20, 33, 70, "float32"), Case(20, 13, 72), Case(20, 33, 72, "int8"), Case(20, 33, 72, "int4")):
        check(library, case)
    check(library, Case(20, 40, 72, residual="out", arena=20 * (96 * 2 + 4) + 256))
    assert library.cublas_standin_products() == before
    assert library.cublas_standin_alive() == 0


def described(library: ctypes.CDLL) -> str:
    text = ctypes.create_string_buffer(256)
    library.describe_products(text, ctypes.c_int64(len(text)))
    return text.value.decode()


def test_without_cublaslt_it_says_why(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(20, 8, 40)
    _, _, name = run(library, case, arrays_of(case))
    assert name == described(library) == "own kernels (BLIP2C_CUBLASLT=0)"
    monkeypatch.delenv("BLIP2C_CUBLASLT")
    _, _, name = run(library, case, arrays_of(case))
    assert name == described(library)
    assert name.startswith("cuBLASLt ") if ON_CARD else name == "own kernels (no cuBLASLt was found)"
    stand_in(library, monkeypatch)
    assert described(library) == "cuBLASLt 130000"


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_whichever_library_there_is(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """On a card: NVIDIA's, if it is installed."""
    monkeypatch.delenv("BLIP2C_CUBLASLT")
    for rows, n, k in ((17, 33, 70), (64, 40, 256)):
        check(library, Case(rows, n, k, dtype, "gelu"))
        check(library, Case(rows, n, k, dtype, residual="out", views=True))


def test_a_library_that_was_named_must_be_one(
    library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = Case(20, 8, 40)
    monkeypatch.setenv("BLIP2C_CUBLASLT", str(tmp_path / "missing.so"))
    with pytest.raises(RuntimeError, match=r"BLIP2C_CUBLASLT=.*missing.so: .*cannot open"):
        run(library, case, arrays_of(case))
    source, poor = tmp_path / "poor.c", tmp_path / "poor.so"
    source.write_text("int cublasLtGetVersion(void) { return 1; }\n")
    subprocess.run([*CC, "-shared", "-fPIC", "-o", poor, source], check=True)
    monkeypatch.setenv("BLIP2C_CUBLASLT", str(poor))
    with pytest.raises(RuntimeError, match=r"poor.so: it has no function cublasLtCreate"):
        run(library, case, arrays_of(case))
    assert described(library).endswith("poor.so: it has no function cublasLtCreate")
    check(library, Case(16, 8, 40))  # few rows need no library


def test_weights_that_it_does_not_take(library: ctypes.CDLL) -> None:
    case = Case(2, 8, 40)
    with pytest.raises(RuntimeError, match="more than this device's kernels take"):
        run(library, replace(case, device={**H100, "shared_per_block": 48 << 10}), arrays_of(case))
