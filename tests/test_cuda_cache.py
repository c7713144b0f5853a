"""Keys and values on a CUDA device: 16 bits where the weights have 16 or fewer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2c
from blip2c import _core
from helpers import prompt_ids, random_checkpoint, random_pixels


def load(folder: Path, device: str, dtype: str = "auto") -> Any:
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=device, dtype=dtype)


def prefix_bytes(model: Any) -> int:
    """Of the beginning of a prompt, kept."""
    ids = np.arange(5, 12, dtype=np.int32)
    return int(model._core.prefill(None, ids, ids).nbytes)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1), ("float16", 2), ("bfloat16", 2), ("int8", 2)])
def test_what_is_kept_takes_half_the_memory(cuda: str, tmp_path: Path, dtype: str, share: int) -> None:
    folder = random_checkpoint(tmp_path, seed=3)
    assert prefix_bytes(load(folder, "cpu", dtype)) == share * prefix_bytes(load(folder, cuda, dtype))


@pytest.mark.parametrize(
    ("family", "text"),
    [("opt", {}), ("llama", {}), ("t5", {}), ("qwen3", {"head_dim": 136})],
    ids=["opt", "llama", "t5", "wide heads"],
)
def test_beams_read_it_and_prefixes_are_gone_on_from(
    cuda: str, tmp_path: Path, family: str, text: dict[str, Any]
) -> None:
    folder = random_checkpoint(tmp_path, seed=3, family=family, text=text, dtype="float16")
    here, there = load(folder, "cpu"), load(folder, cuda)
    pixels, ids = random_pixels(here.config, 2), prompt_ids(here.config, 2, 9)
    for search in ({}, {"num_beams": 3}):
        want = here.generate(pixels, ids, max_new_tokens=6, **search)
        assert np.array_equal(there.generate(pixels, ids, max_new_tokens=6, **search), want), search
    if family == "t5":
        return
    whole = np.arange(5, 25, dtype=np.int32)
    one = there._core.prefill(None, whole, whole)
    first = there._core.prefill(None, whole[:9], whole[:9])
    two = there._core.prefill(None, whole[9:], whole[9:], first.head(9))
    new, offsets = np.array([7, 8], np.int32), np.array([0, 2], np.int64)
    options = {"max_new_tokens": 5}
    plan = there._call(options, [22]).core
    said = [
        there._core.generate(None, new, offsets, None, new, plan, prefixes=[prefix])["ids"].tolist()
        for prefix in (one, two)
    ]
    assert said[0] == said[1]


def test_keys_beyond_the_range_of_float16_are_an_error_and_no_wrong_answer(cuda: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, seed=3, dtype="float16")
    weights = dict(blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)._core.weights())
    name = "language_model.model.decoder.layers.1.self_attn.k_proj.bias"
    weights[name] = np.full_like(weights[name], -70000, np.float32)
    dtypes = {key: "F32" if value.dtype == np.float32 else "F16" for key, value in weights.items()}
    _core.write_safetensors(str(folder / "model.safetensors"), weights, dtypes, {"format": "pt"})
    here, there = load(folder, "cpu"), load(folder, cuda)
    pixels, ids = random_pixels(here.config, 1), prompt_ids(here.config, 1, 9)
    here.generate(pixels, ids, max_new_tokens=3)
    with pytest.raises(blip2c.NumericError, match="language_model layer 1: NaN or Inf in row"):
        there.generate(pixels, ids, max_new_tokens=3)
