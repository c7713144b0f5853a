"""Encoding pictures on a CUDA device: recorded as a graph, and cancelled in the middle."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2c
from blip2c import _core, flow
from helpers import random_checkpoint, random_instruct_config, random_pixels
from test_kernels import interrupted

LAUNCHES, GRAPHS, TO_HOST, TO_DEVICE, WAITS = range(5)
on_the_host = pytest.mark.skipif(os.environ.get("BLIP2C_TEST_CARD") == "1", reason="a card does not count")


def counts() -> np.ndarray:
    """What has been asked of the stand-in so far: tests/cuda_host/cuda_runtime.h, cuda_host_counted."""
    library = ctypes.CDLL(os.environ["BLIP2C_CUDA_LIBRARY"])
    library.cuda_host_count.restype = ctypes.c_ulonglong
    return np.array([library.cuda_host_count(what) for what in range(5)], np.int64)


def load(folder: Path, device: str) -> Any:
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=device)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("opt"), seed=8, dtype="float16")


def pictures(batch: int, height: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((batch, 3, height, 28), dtype=np.float32)


def test_recorded_encoding_gives_the_same_bits(folder: Path, cuda: str) -> None:
    """Shapes alternate and pictures change; each is encoded operation by operation by a model that has seen nothing."""
    core, shapes = load(folder, cuda)._core, [(1, 28), (2, 28), (1, 42)]
    before: dict[tuple[int, int], np.ndarray] = {}
    for seed in range(4):
        for batch, height in shapes:
            pixels = pictures(batch, height, seed)
            found = core.encode(pixels, True)
            if seed > 0:  # recorded, repeated
                want = load(folder, cuda)._core.encode(pixels, True)
                np.testing.assert_array_equal(found, want)
            assert seed == 0 or not np.array_equal(found, before[batch, height])
            before[batch, height] = found


@on_the_host
def test_a_repeated_encoding_is_one_launch(folder: Path, cuda: str) -> None:
    core, asked = load(folder, cuda)._core, []
    for seed in range(4):
        start = counts()
        core.encode(pictures(2, 28, seed))
        asked.append(counts() - start)
    first, recorded, repeated, again = asked
    assert first[GRAPHS] == 0
    assert first[LAUNCHES] > 30
    for counted in (recorded, repeated, again):
        assert (counted[LAUNCHES], counted[GRAPHS]) == (0, 1)
    pixels = pictures(2, 28, 0).nbytes
    assert pixels < again[TO_DEVICE] < pixels + 64, "the pixels and nothing besides"


def test_texts_beside_the_pictures_are_read_anew(cuda: str, tmp_path: Path) -> None:
    config = random_instruct_config()
    folder = random_checkpoint(tmp_path, instruct=True, seed=3)
    here, there = load_instruct(folder, "cpu"), load_instruct(folder, cuda)
    pixels = random_pixels(config, 1)
    for seed in range(4):
        words = np.random.default_rng(seed).integers(1, 50, 3 + seed % 2).astype(np.int32)
        text = (words, np.array([0, len(words)], np.int64), None)
        found, want = (model._core.encode(pixels, text=text) for model in (there, here))
        assert np.abs(found - want).max() <= 1e-3 * np.abs(want).max()


def load_instruct(folder: Path, device: str) -> Any:
    return blip2c.InstructBlipForConditionalGeneration.from_pretrained(folder, device=device)


def test_what_is_not_finite_is_named_by_a_recorded_encoding_too(folder: Path, cuda: str) -> None:
    core = load(folder, cuda)._core
    pixels = pictures(1, 28, 0)
    broken = pixels.copy()
    broken[0, 0, 3, 3] = np.nan
    want = core.encode(pixels)
    for _ in range(3):
        with pytest.raises(blip2c.NumericError, match="vision embeddings: NaN or Inf in row 1"):
            core.encode(broken)
        np.testing.assert_array_equal(core.encode(pixels), want)


def test_a_long_encoding_is_cancelled(cuda: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, seed=8, vision={"num_hidden_layers": 40})
    core = load(folder, cuda)._core
    pixels = pictures(8, 28, 0)
    want = core.encode(pixels[:1])
    assert min(interrupted(lambda: core.encode(pixels), 0.1) for _ in range(3)) < 0.1
    np.testing.assert_array_equal(core.encode(pixels[:1]), want)


@on_the_host
def test_features_that_stay_are_recorded_and_never_come_to_the_host(folder: Path, cuda: str) -> None:
    """Each result lies elsewhere, as all of them are kept."""
    core, kept = load(folder, cuda)._core, []
    for seed in range(4):
        start = counts()
        kept.append(core.encode(pictures(1, 28, seed), on_device=True))
        asked = counts() - start
    assert asked[GRAPHS] == 1
    assert asked[TO_HOST] < 64, "whether all was finite"
    for seed, found in enumerate(kept):
        np.testing.assert_array_equal(np.asarray(found), core.encode(pictures(1, 28, seed)))


def test_captions_of_many_pictures_leave_their_features_on_the_device(
    cuda: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = random_checkpoint(tmp_path, seed=8, dtype="float16", tokenizer=True), []

    class Watched(flow.State):
        def __init__(self, prompts: Any, encoded: Any, name: str) -> None:
            seen.append(type(encoded))
            super().__init__(prompts, encoded, name)

    processor = blip2c.Blip2Processor.from_pretrained(folder)
    here, there = (blip2c.Captioner(load(folder, device), processor) for device in ("cpu", cuda))
    images = list((np.random.default_rng(0).random((3, 28, 28, 3)) * 255).astype(np.uint8))
    want = [caption.ids for caption in here.caption(images, max_new_tokens=3)]
    monkeypatch.setattr(flow, "State", Watched)
    assert [caption.ids for caption in there.caption(images, max_new_tokens=3)] == want
    assert seen == [_core.DeviceArray] * 3
