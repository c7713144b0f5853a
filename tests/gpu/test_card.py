"""What only a card can show: run with BLIP2C_TEST_CARD=1 pytest tests/gpu, beside tests/test_cuda_*.py.

Sizes are those of true models, where products go through tensor cores, which the host's stand-in does not have."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

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


@pytest.fixture(scope="module")
def sample(cuda: str) -> Any:
    return blip2c.load("sample", device=cuda).model


def sample_pixels(model: Any, batch: int = 2) -> torch.Tensor:
    size = int(model.config.vision_config.image_size)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_tensors_go_in_and_come_out_where_they_lie(sample: Any, dtype: torch.dtype) -> None:
    pixels = sample_pixels(sample).to("cuda", dtype)
    want = sample.vision_model(pixels.float().cpu().numpy()).last_hidden_state
    found = sample.vision_model(pixels).last_hidden_state
    assert found.is_cuda
    np.testing.assert_array_equal(found.float().cpu().numpy(), want)
    last = pixels.contiguous(memory_format=torch.channels_last)[1:]
    np.testing.assert_array_equal(sample.vision_model(last).last_hidden_state.float().cpu().numpy(), want[1:])


def test_work_on_a_stream_of_torch_comes_first(sample: Any) -> None:
    """Pixels that a busy stream has yet to make; what it does with the result follows."""
    pixels, side = sample_pixels(sample).cuda(), torch.cuda.Stream()
    want = sample.vision_model(pixels.cpu().numpy()).last_hidden_state
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        late = torch.zeros_like(pixels)
        torch.cuda._sleep(200_000_000)
        late.copy_(pixels)
        found = sample.vision_model(late).last_hidden_state
        doubled = found * 2
    side.synchronize()
    np.testing.assert_array_equal(doubled.cpu().numpy(), 2 * want)


def test_a_tensor_outlives_the_model(cuda: str) -> None:
    model = blip2c.load("sample", device=cuda).model
    pixels = sample_pixels(model).cuda()
    found = model.vision_model(pixels).last_hidden_state
    before = found.cpu()
    del model
    gc.collect()
    torch.randn(1 << 20, device="cuda")
    assert torch.equal(found.cpu(), before)


def test_kernels_on_tensors(cuda: str) -> None:
    x, weight = torch.randn(5, 64, device="cuda"), torch.randn(48, 64, device="cuda")
    out = kernels.linear(x, weight, device=cuda)
    assert out.is_cuda
    torch.testing.assert_close(out.cpu(), (x.double() @ weight.double().T).float().cpu(), rtol=1e-4, atol=1e-4)
    if torch.cuda.device_count() > 1:
        with pytest.raises(ValueError, match="lies on cuda:1, expected cuda:0"):
            kernels.gelu(x.to("cuda:1"), device=cuda)
