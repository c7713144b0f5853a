"""What only a card can show: run with BLIP2C_TEST_CARD=1 pytest tests/gpu, beside tests/test_cuda_*.py.

Sizes are those of true models, where products go through tensor cores, which the host's stand-in does not have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import blip2c
from blip2c import _core, kernels

F32 = np.float32
# Largest |found - float64| over the sum of absolute terms: x is rounded to the weight's 16 bits where rows are many.
ROUNDED = {"float32": 2e-6, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-11, "int4": 2.0**-11}
EXACT = 2e-6


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(F32)


def test_it_is_a_card(cuda: str) -> None:
    assert "stand-in" not in _core.cuda_devices()[0]["name"]


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("rows", [1, 3, 16, 17, 64, 257, 2056])
@pytest.mark.parametrize(("n", "k"), [(1408, 6144), (2560, 2560), (4224, 1408), (1000, 588)])
def test_products_of_true_size(rows: int, n: int, k: int, dtype: str, cuda: str) -> None:
    rng = np.random.default_rng(rows + n)
    x, weight = normal(rng, rows, k), normal(rng, n, k)
    packed = kernels.PackedWeight(weight, dtype, device=cuda)
    found = kernels.linear(x, packed, device=cuda).astype(np.float64)
    held = kernels.embedding(kernels.PackedWeight(weight, dtype), np.arange(n, dtype=np.int32)).astype(np.float64)
    exact, scale = x.astype(np.float64) @ held.T, np.abs(x).astype(np.float64) @ np.abs(held).T
    assert (np.abs(found - exact) <= (ROUNDED[dtype] if rows > 16 else EXACT) * scale).all()


@pytest.mark.parametrize(("batch", "queries", "keys", "heads", "width", "causal"), [
    (8, 257, 257, 16, 88, False), (8, 32, 257, 12, 64, False), (4, 40, 40, 32, 80, True), (16, 1, 300, 32, 80, True),
])  # fmt: skip
def test_attention_of_true_size(
    batch: int, queries: int, keys: int, heads: int, width: int, causal: bool, cuda: str
) -> None:
    rng = np.random.default_rng(keys)
    q, k, v = (normal(rng, batch, t, heads * width) for t in (queries, keys, keys))
    there, here = (kernels.attention(q, k, v, heads, causal=causal, device=device) for device in (cuda, "cpu"))
    np.testing.assert_allclose(there, here, rtol=0, atol=2e-3 * np.abs(v).max())


def test_memory_comes_back(cuda: str) -> None:
    model = blip2c.load("sample", device=cuda)
    picture = next((Path(blip2c.__file__).parent / "sample" / "pictures").glob("*.png"))
    model.caption(picture)
    before = _core.cuda_devices()[0]["free"]
    for _ in range(20):
        model.caption(picture)
    assert _core.cuda_devices()[0]["free"] >= before


def test_beside_torch(cuda: str) -> None:
    """Work of torch on the same card, on its own streams, does not disturb ours nor ours its."""
    rng = np.random.default_rng(5)
    x, weight = normal(rng, 64, 2560), kernels.PackedWeight(normal(rng, 2560, 2560), "float16", device=cuda)
    alone = kernels.linear(x, weight, device=cuda)
    theirs = torch.ones(4096, 4096, device="cuda")
    for _ in range(10):
        theirs = theirs @ theirs * (1.0 / 4096)
        np.testing.assert_array_equal(kernels.linear(x, weight, device=cuda), alone)
    assert torch.equal(theirs, torch.ones_like(theirs))
