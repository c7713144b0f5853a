"""The sample checkpoint: transformers loads it too and says the same tokens; its pictures have their captions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import blip2c

FOLDER = blip2c.sample_path()
TEXTS: dict[str, dict[str, str]] = json.loads((FOLDER / "pictures" / "captions.json").read_text())
QUESTIONS = ("what color is the background?", "is there a dog?", "what is on the left?", "how many keys are there?")


@pytest.fixture(scope="module")
def model() -> Any:
    return blip2c.load()


@pytest.fixture(scope="module")
def reference() -> Any:
    return transformers.Blip2ForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


def pictures() -> list[Image.Image]:
    """The package's pictures, and some of other kinds."""
    rng = np.random.default_rng(0)
    found = [Image.open(FOLDER / "pictures" / name).convert("RGB") for name in TEXTS]
    found.append(Image.new("RGB", (300, 200), (200, 30, 30)))
    found.append(Image.fromarray(rng.integers(0, 256, (64, 96, 3), dtype=np.uint8)))
    ramp = np.linspace(0, 255, 150, dtype=np.uint8)
    found.append(Image.fromarray(np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], ramp[::-1, None]), axis=-1)))
    return found


def test_size_and_files() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 16 << 20
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["num_query_tokens"] == 32
    assert config["qformer_config"]["num_hidden_layers"] >= 4
    assert config["qformer_config"]["cross_attention_frequency"] == 2


@pytest.mark.parametrize("name", list(TEXTS))
def test_its_pictures_have_their_captions(model: Any, name: str) -> None:
    path, text = FOLDER / "pictures" / name, TEXTS[name]
    assert model.caption(path) == text["caption"]
    assert model.caption(path, num_beams=5) == text["caption"]
    assert model.ask(path, text["question"]) == text["answer"]


@pytest.mark.parametrize("beams", [1, 5])
def test_transformers_says_the_same_tokens(model: Any, reference: Any, beams: int) -> None:
    """Processor and model of either library, pictures alone and with questions."""
    theirs = transformers.AutoProcessor.from_pretrained(FOLDER)
    pil = transformers.models.blip.image_processing_pil_blip.BlipImageProcessorPil.from_pretrained(FOLDER)
    images = pictures()
    for prompts in (None, [f"Question: {QUESTIONS[i % 4]} Answer:" for i in range(len(images))]):
        text = {} if prompts is None else {"text": prompts, "padding": True}
        ours_in = model.processor(images=images, return_tensors="np", **text)
        theirs_in = dict(theirs(images=images, return_tensors="pt", **text))
        theirs_in["pixel_values"] = torch.from_numpy(np.stack(pil(images)["pixel_values"]))
        np.testing.assert_array_equal(ours_in["pixel_values"], theirs_in["pixel_values"].numpy())
        for key in set(theirs_in) - {"pixel_values"}:
            np.testing.assert_array_equal(ours_in[key], theirs_in[key].numpy())
        ours = model.model.generate(**ours_in, num_beams=beams)
        with torch.no_grad():
            expected = reference.generate(**theirs_in, num_beams=beams)
        np.testing.assert_array_equal(ours, expected.numpy())
        decoded = theirs.batch_decode(expected, skip_special_tokens=True)
        assert model.processor.batch_decode(ours, skip_special_tokens=True) == decoded


def test_a_picture_alone_and_in_a_batch(model: Any) -> None:
    images = pictures()
    together = model.caption(images, num_beams=3, batch_size=len(images), progress=False)
    assert [model.caption(image, num_beams=3) for image in images] == list(together)


def test_saved_again_it_is_the_same(model: Any, tmp_path: Path) -> None:
    model.model.save_pretrained(tmp_path)
    model.processor.save_pretrained(tmp_path)
    again = blip2c.load(tmp_path)
    path = FOLDER / "pictures" / next(iter(TEXTS))
    assert again.caption(path) == model.caption(path)
    reloaded = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert reloaded.num_parameters() == model.model.num_parameters()
