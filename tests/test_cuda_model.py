"""Whole models on a CUDA device against the same models on the processor: tokens equal, numbers near.

The device is the backend compiled for the host (conftest.cuda), where device memory cannot be touched by the host: what
forgets a copy fails here. Quantised models are compared with the processor on the same rounded weights in float32,
because with many rows the processor rounds the activations too.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blip2c
from blip2c import _core
from helpers import prompt_ids, random_checkpoint, random_pixels
from running import run_python

# What the checkpoint is, and what the weights are held as.
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "opt": ({}, "auto"),
    "llama-float16": ({"family": "llama", "dtype": "float16", "seed": 6}, "auto"),
    "opt-int8": ({"dtype": "float16"}, "int8"),
    "t5-int4": ({"family": "t5"}, "int4"),
    "opt-float16": ({"dtype": "float16"}, "auto"),
    "t5": ({"family": "t5"}, "auto"),
    "t5-bfloat16": ({"family": "t5", "dtype": "bfloat16"}, "auto"),
    "mistral": ({"family": "mistral"}, "auto"),
    "qwen3": ({"family": "qwen3"}, "auto"),
}
ORDINARY = 4  # as many of them in every run
SEARCHES: list[dict[str, Any]] = [
    {},
    {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    {"do_sample": True, "num_return_sequences": 2, "top_k": 12, "seed": 5},
    {"no_repeat_ngram_size": 2, "repetition_penalty": 1.3, "min_new_tokens": 3},
]
# Of the largest number. Where many rows meet weights of 16 bits or fewer, activations are rounded to 16 bits there: for
# bfloat16 that is so much that a random model may choose another token.
TOLERANCE = {"float16": 5e-3, "bfloat16": 3e-2, "int8": 5e-3, "int4": 5e-3, "auto": 1e-3}


def assert_near(found: Any, want: Any, tolerance: float = 1e-3) -> None:
    found, want = np.asarray(found), np.asarray(want)
    assert found.shape == want.shape
    assert np.abs(found - want).max() <= tolerance * np.abs(want).max()


def on_processor(model: Any, folder: Path, tmp_path: Path, dtype: str) -> Any:
    """The same model on the processor; of a quantised one its rounded weights as float32."""
    if dtype == "auto":
        return type(model).from_pretrained(folder)
    weights = {name: np.asarray(value, np.float32) for name, value in model._core.weights().items()}
    model.config.save_pretrained(tmp_path)
    _core.write_safetensors(
        str(tmp_path / "model.safetensors"), weights, dict.fromkeys(weights, "F32"), {"format": "pt"}
    )
    return type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.exhaustive] if i >= ORDINARY else []) for i, c in enumerate(CASES)]
)
def test_a_model_says_on_a_device_what_it_says_on_the_processor(case: str, cuda: str, tmp_path: Path) -> None:
    options, dtype = CASES[case]
    folder = random_checkpoint(tmp_path / "model", **{"seed": 3, **options})
    there = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype, device=cuda)
    here = on_processor(there, folder, tmp_path / "rounded", dtype)
    tolerance = TOLERANCE[options.get("dtype", dtype)]
    assert there.device == torch.device("cuda:0")
    pixels, ids = random_pixels(there.config, 3), prompt_ids(there.config, 3, 9)
    mask = np.ones_like(ids)
    mask[1, :2] = 0
    given = {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True}
    if options.get("family") == "t5":
        given["decoder_input_ids"] = ids[:, :4]
    found, want = there(pixels, ids, **given), here(pixels, ids, **given)
    seen = mask > 0 if found.logits.shape[:2] == mask.shape else slice(None)  # what a pad gives nobody has promised
    assert_near(found.logits[seen], want.logits[seen], tolerance)
    assert_near(found.qformer_outputs.last_hidden_state, want.qformer_outputs.last_hidden_state, tolerance)
    for ours, theirs in zip(found.vision_outputs.hidden_states, want.vision_outputs.hidden_states, strict=True):
        assert_near(ours, theirs, tolerance)
    assert_near(found.vision_outputs.attentions[-1], want.vision_outputs.attentions[-1], tolerance)
    for search in SEARCHES if case != "t5-bfloat16" else ():
        a = there.generate(pixels, ids, attention_mask=mask, max_new_tokens=4, **search)
        assert np.array_equal(a, here.generate(pixels, ids, attention_mask=mask, max_new_tokens=4, **search)), search


@pytest.fixture(scope="module")
def opt(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A folder, its model on the processor and on the device."""
    folder = random_checkpoint(tmp_path_factory.mktemp("opt"), seed=4, tokenizer=True)
    load = blip2c.Blip2ForConditionalGeneration.from_pretrained
    return folder, load(folder), load(folder, device_map=cuda)


def test_a_retrieval_model(cuda: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, retrieval=True, seed=2)
    load = blip2c.Blip2ForImageTextRetrieval.from_pretrained
    here, there = load(folder), load(folder, device=cuda)
    pixels = random_pixels(here.config, 2)
    ids = np.array([[64] * 4 + [5, 6, 7, 8], [64] * 4 + [9, 10, 0, 0]])
    mask = np.array([[1] * 8, [1] * 6 + [0, 0]])
    for matching in (True, False):
        a = there(pixels, ids, attention_mask=mask, use_image_text_matching_head=matching)
        b = here(pixels, ids, attention_mask=mask, use_image_text_matching_head=matching)
        assert_near(a.logits_per_image, b.logits_per_image)
    core = (np.array([5, 6, 7], np.int32), np.array([0, 1, 3], np.int64), None)
    images = here._core.encode_stages(pixels)["vision"]
    picture_of = np.array([0, 1], np.int32)
    assert_near(there._core.match(images, core, picture_of), here._core.match(images, core, picture_of))
    assert_near(there._core.read_texts(core)["embeds"], here._core.read_texts(core)["embeds"])


def test_pictures_of_another_size(opt: tuple[Path, Any, Any]) -> None:
    _, here, there = opt
    pixels = np.random.default_rng(0).standard_normal((2, 3, 42, 56), dtype=np.float32)
    found, want = (model._core.encode(pixels, True) for model in (there, here))
    assert_near(found, want)


def test_conversations_go_on_from_what_was_kept(opt: tuple[Path, Any, Any]) -> None:
    folder, here, there = opt
    processor = blip2c.Blip2Processor.from_pretrained(folder)
    picture = (np.random.default_rng(1).random((28, 28, 3)) * 255).astype(np.uint8)
    said = []
    for model in (here, there):
        chat = blip2c.Captioner(model, processor).chat(picture, max_new_tokens=4)
        said.append([chat.ask("a b").ids, chat.ask("c d e").ids])
    assert said[0] == said[1]


def test_one_model_for_many_threads_and_devices(opt: tuple[Path, Any, Any]) -> None:
    folder, here, there = opt
    other = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device="cuda:1")
    assert str(other.device) == "cuda:1"
    pixels, ids = random_pixels(here.config, 2), prompt_ids(here.config, 2, 7)
    want = [here.generate(pixels[:n], ids[:n], max_new_tokens=5) for n in (1, 2)]
    with ThreadPoolExecutor(4) as pool:
        jobs = [(model, n) for model in (there, other) for n in (1, 2, 1)]
        found = list(pool.map(lambda j: j[0].generate(pixels[: j[1]], ids[: j[1]], max_new_tokens=5), jobs))
    for (_, n), answer in zip(jobs, found, strict=True):
        assert np.array_equal(answer, want[n - 1])


def test_moving_and_converting(opt: tuple[Path, Any, Any], cuda: str) -> None:
    folder, here, _ = opt
    pixels, ids = random_pixels(here.config, 1), prompt_ids(here.config, 1, 7)
    want = here.generate(pixels, ids, max_new_tokens=5)
    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)
    assert str(model.cuda().device) == "cuda:0"
    assert np.array_equal(model.generate(pixels, ids, max_new_tokens=5), want)
    assert str(model.to(torch.device("cuda", 1)).device) == "cuda:1"
    assert str(model.to(1, torch.float16).device) == "cuda:1"
    weights = here.half()._core.weights()
    assert all(np.array_equal(value, weights[name]) for name, value in model._core.weights().items())
    assert str(model.cpu().device) == "cpu"
    assert all(np.array_equal(value, weights[name]) for name, value in model._core.weights().items())


def test_a_packed_checkpoint(opt: tuple[Path, Any, Any], cuda: str, tmp_path: Path) -> None:
    folder, _, _ = opt
    packed = blip2c.quantize(folder, tmp_path / "packed", "int8")
    load = blip2c.Blip2ForConditionalGeneration.from_pretrained
    here, there = load(packed)._core.weights(), load(packed, device=cuda)
    assert there.is_quantized
    assert all(np.array_equal(value, here[name]) for name, value in there._core.weights().items())
    with pytest.raises(blip2c.UnsupportedError, match="on the processor"):
        there.save_pretrained(tmp_path / "again")


def test_what_is_not_finite_is_named(cuda: str, tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, seed=5)
    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)
    weights = model._core.weights()
    name = "language_model.model.decoder.layers.1.fc1.bias"
    weights[name] = weights[name].copy()
    weights[name][0] = np.inf
    _core.write_safetensors(str(folder / "model.safetensors"), weights, dict.fromkeys(weights, "F32"), {"format": "pt"})
    there = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)
    pixels, ids = random_pixels(there.config, 1), prompt_ids(there.config, 1, 7)
    with pytest.raises(blip2c.NumericError, match="language_model layer 1: NaN or Inf in row"):
        there.generate(pixels, ids, max_new_tokens=5)
    assert np.isfinite(there._core.encode(pixels)).all()  # what was noted is forgotten


def test_out_of_memory_is_an_error_that_the_model_survives(cuda: str, tmp_path: Path) -> None:
    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(
        random_checkpoint(tmp_path, family="llama"), device=cuda
    )
    pixels, ids = random_pixels(model.config, 1), prompt_ids(model.config, 1, 7)
    want = model.generate(pixels, ids, max_new_tokens=5)
    with pytest.raises(MemoryError, match=r"KV cache.*could not allocate \d+ bytes on cuda:0, which has \d+ of \d+"):
        model.generate(pixels, ids, max_new_tokens=5 * 10**8)
    assert np.array_equal(model.generate(pixels, ids, max_new_tokens=5), want)


def test_all_memory_is_given_back(opt: tuple[Path, Any, Any]) -> None:
    folder, here, _ = opt
    before = _core.cuda_devices()[1]["free"]
    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device="cuda:1")
    model.generate(random_pixels(here.config, 2), prompt_ids(here.config, 2, 7), max_new_tokens=4)
    assert _core.cuda_devices()[1]["free"] < before
    del model
    gc.collect()
    assert _core.cuda_devices()[1]["free"] == before


class OnACard:
    """Pixels as a library of arrays on a card has them."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0

    def __dlpack__(self, *, dl_device: tuple[int, int], copy: bool) -> Any:
        assert copy
        assert dl_device == (1, 0)
        return self.array.copy().__dlpack__()


def test_arrays_on_a_card_come_to_a_model_on_the_processor(opt: tuple[Path, Any, Any]) -> None:
    _, here, _ = opt
    pixels, ids = random_pixels(here.config, 1), prompt_ids(here.config, 1, 7)
    want = here.generate(pixels, ids, max_new_tokens=4)
    assert np.array_equal(here.generate(OnACard(pixels), ids, max_new_tokens=4), want)


@pytest.mark.parametrize(
    ("device", "error", "words"),
    [("cuda:7", ValueError, "cuda:7, there are 2 CUDA devices"), ("cuda:x", ValueError, "cuda:x"),
     (-3, ValueError, "-3"), ("xpu", NotImplementedError, "xpu"), ({"a": 0, "b": 1}, NotImplementedError, "one place")],
)  # fmt: skip
def test_devices_that_are_not_there(opt: tuple[Path, Any, Any], device: Any, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        blip2c.Blip2ForConditionalGeneration.from_pretrained(opt[0], device=device)


SCRIPT = """
import blip2c
from blip2c import _core
from blip2c.cli import describe
assert describe(None)["cuda"]["devices"] == []
try:
    blip2c.load(device="cuda")
except blip2c.UnsupportedError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("library", "words"), [("/none/_cuda.so", "/none/_cuda.so"), (_core.__file__, "no library of")]
)
def test_without_a_library_the_reason_is_said(library: str, words: str) -> None:
    done = run_python(SCRIPT, BLIP2C_CUDA_LIBRARY=library)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert done.stdout.startswith("cuda: ")
