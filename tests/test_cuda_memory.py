"""A device that has no memory left: a MemoryError with the sizes, nothing lost, and the model answers as before.

Each allocation in turn is the first that fails, and with it all that come after, of devices and of pinned memory.
"""

from __future__ import annotations

import gc
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2c
from cuda_callers import CallerArray, free_bytes, no_memory_after, pinned_bytes
from helpers import prompt_ids, random_checkpoint, random_pixels

SIZES = r"could not allocate \d+ bytes on (cuda:\d, which has \d+ of \d+ bytes free|the host)"
ENOUGH = 1000


def load(folder: Path, device: str) -> Any:
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=device)


@pytest.fixture(scope="module")
def folder(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("llama"), seed=4, family="llama", dtype="float16")


def held() -> tuple[int, int, int]:
    return free_bytes(0), free_bytes(1), pinned_bytes()


def ask_for_too_much(model: Any) -> None:
    """A device that has nothing left also gives back the blocks that it keeps for the next call."""
    with pytest.raises(MemoryError, match=f"KV cache.*{SIZES}"):
        model.generate(random_pixels(model.config, 1), max_new_tokens=5 * 10**8)


def test_a_model_that_does_not_fit(folder: Path, cuda: str) -> None:
    """Whichever of its weights is the first that has no place: what came before it is given back."""
    load(folder, cuda)
    gc.collect()
    before, failed = held(), set()
    for allocations in range(ENOUGH):
        with no_memory_after(allocations) as refused:
            try:
                model = load(folder, cuda)
            except MemoryError as error:
                message = str(error)
                assert re.search(SIZES, message), message
                failed.add(message.split(":")[0])
            if refused() == 0:
                break
        assert held() == before
    assert len(failed) > 20  # by their names
    assert any("language_model" in name for name in failed)
    assert model.generate(random_pixels(model.config, 1), max_new_tokens=2).size
    del model
    assert held() == before


Work = Callable[[Any, Any, np.ndarray], Any]
WORK: dict[str, Work] = {
    "encode": lambda model, pixels, ids: model._core.encode(pixels),
    "arrays on the device": lambda model, pixels, ids: np.asarray(model(pixels, ids).logits),
    "greedy search": lambda model, pixels, ids: model.generate(pixels, ids, max_new_tokens=4),
    "beams": lambda model, pixels, ids: model.generate(pixels, ids, max_new_tokens=4, num_beams=3),
    "prefix": lambda model, pixels, ids: np.array(model._core.prefill(None, *[ids[0, 5:].astype(np.int32)] * 2).ids),
}


@pytest.mark.parametrize("name", list(WORK))
def test_work_that_runs_out_of_memory(folder: Path, cuda: str, name: str) -> None:
    gc.collect()
    before = held()
    model, work, failed = load(folder, cuda), WORK[name], 0
    pixels, ids = random_pixels(model.config, 2).astype(np.float16), prompt_ids(model.config, 2, 9)
    rounded = pixels.astype(np.float32)
    want = work(model, rounded, ids)
    for allocations in range(ENOUGH):
        ask_for_too_much(model)
        given = CallerArray(pixels) if name == "arrays on the device" else rounded
        with no_memory_after(allocations) as refused:
            try:
                found = work(model, given, ids)
            except MemoryError as error:
                message = str(error)
                assert re.search(SIZES, message), message
                failed += 1
            else:  # a step that could not be recorded is done without
                assert np.array_equal(found, want)
            if refused() == 0:
                break
        assert np.array_equal(work(model, rounded, ids), want)
    assert failed > 0
    del model
    assert held() == before


def test_models_of_their_own_in_threads(folder: Path, cuda: str) -> None:
    """On two devices, while one thread runs out of memory again and again, and models come and go."""
    gc.collect()
    before = held()
    here = load(folder, "cpu")
    pixels, ids = random_pixels(here.config, 2), prompt_ids(here.config, 2, 7)
    want = here.generate(pixels, ids, max_new_tokens=3)
    kept = load(folder, "cuda:0")

    def work(number: int) -> None:
        for _ in range(2):
            model = load(folder, f"cuda:{number % 2}")
            assert str(model.device) == f"cuda:{number % 2}"
            for _ in range(2):
                assert np.array_equal(model.generate(pixels, ids, max_new_tokens=3), want)

    def fail(model: Any) -> None:
        for _ in range(6):
            ask_for_too_much(model)
            assert np.array_equal(model.generate(pixels, ids, max_new_tokens=3), want)

    with ThreadPoolExecutor(5) as pool:
        for done in [*[pool.submit(work, number) for number in range(4)], pool.submit(fail, kept)]:
            done.result()
    del kept
    assert held() == before
