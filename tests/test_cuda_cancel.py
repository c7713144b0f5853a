"""Ctrl-C and cancel_calls() in what takes long on a device: answered within 100 ms, and the model goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2c
from blip2c import _core
from helpers import random_checkpoint
from test_kernels import interrupted

LAYERS, LENGTH = 60, 80  # no operation takes long by itself
LONG = {"num_hidden_layers": LAYERS, "max_position_embeddings": 2048}
Work = Callable[[Any, int], Any]


def ids_of(length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(5, 300, length).astype(np.int32)


def generate(model: Any, length: int, new: int = 1) -> Any:
    ids, options = ids_of(length), {**model._call({"max_new_tokens": new}, [length]).core, "eos_ids": []}
    return model._core.generate(None, ids, np.array([0, length], np.int64), None, ids, options)["ids"]


def prefill(model: Any, length: int) -> Any:
    ids = ids_of(length)
    return model._core.prefill(None, ids, ids).ids


def forward(model: Any, length: int) -> Any:
    return model._core.forward(None, ids_of(length), np.array([0, length], np.int64))["logits"]


@pytest.fixture(scope="module")
def model(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = random_checkpoint(tmp_path_factory.mktemp("long"), seed=8, text=LONG)
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)


@pytest.mark.parametrize("work", [generate, prefill, forward])
def test_a_long_prompt_is_cancelled(model: Any, work: Work) -> None:
    want = work(model, 3)
    assert min(interrupted(lambda: work(model, LENGTH), 0.1) for _ in range(3)) < 0.1
    assert np.array_equal(work(model, 3), want)


def test_a_long_prompt_of_an_encoder_is_cancelled(cuda: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, seed=8, family="t5", text={"num_layers": LAYERS})
    core = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)._core

    def work(length: int) -> Any:
        ids, one = ids_of(length), np.zeros(1, np.int32)
        offsets, last = np.array([0, length], np.int64), np.array([0, 1], np.int64)
        return core.forward(None, ids, offsets, decoder_ids=one, decoder_offsets=last)["logits"]

    want = work(3)
    assert min(interrupted(lambda: work(LENGTH), 0.1) for _ in range(3)) < 0.1
    assert np.array_equal(work(3), want)


def test_a_long_answer_is_cancelled(model: Any) -> None:
    """In steps that are recorded, too."""
    want = generate(model, 5, 4)
    assert min(interrupted(lambda: generate(model, 5, 1000), 0.5) for _ in range(3)) < 0.1
    assert np.array_equal(generate(model, 5, 4), want)


def test_a_thread_s_calls_are_ended_from_another(model: Any) -> None:
    want, ended = prefill(model, 3), list[tuple[type[BaseException], float]]()
    began = threading.Event()

    def work() -> None:
        try:
            began.set()
            prefill(model, LENGTH)
        except BaseException as error:
            ended.append((type(error), time.perf_counter()))

    worker = threading.Thread(target=work)
    worker.start()
    began.wait(10)
    time.sleep(0.1)
    assert worker.is_alive()
    asked = time.perf_counter()
    _core.cancel_calls(worker.ident)
    worker.join(10)
    assert [kind for kind, _ in ended] == [KeyboardInterrupt]
    assert ended[0][1] - asked < 0.2
    assert np.array_equal(prefill(model, 3), want)
