"""The small retrieval checkpoint: it finds what its report says it finds, and transformers says the same of it."""

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
from blip2c import cli
from blip2c.evaluate import evaluate_retrieval, read_captions

FOLDER = blip2c.sample_path("sample-retrieval")
SCENES = FOLDER / "scenes"


@pytest.fixture(scope="module")
def model() -> Any:
    return blip2c.load("sample-retrieval")


def scenes() -> tuple[list[str], list[str]]:
    """Pictures and captions, which all differ, of combinations that the training never drew."""
    data = read_captions(SCENES / "test.json", SCENES)
    return [d.image for d in data], [d.texts[0] for d in data]


def test_size_and_names() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 16 << 20
    assert blip2c.sample_path() == blip2c.sample_path("sample") != FOLDER
    with pytest.raises(ValueError, match=r"'sample-captions'.*sample-retrieval"):
        blip2c.sample_path("sample-captions")
    assert repr(blip2c.load("sample")).startswith("Captioner(Blip2ForConditionalGeneration('sample'")


def test_it_finds_what_the_report_says(model: Any) -> None:
    """REPORT.md has the figures of 1,000 scenes; these are the first of them, among fewer others."""
    data = read_captions(SCENES / "test.json", SCENES)
    assert len({d.texts[0] for d in data}) == len(data) >= 48
    alone, both = (evaluate_retrieval(model, data, k_test=k, progress=False) for k in (0, 128))
    for scores, least in ((alone, 0.93), (both, 0.95)):
        assert scores.text_recall[1] >= least
        assert scores.image_recall[1] >= least
        assert scores.text_recall[10] >= 0.95
        assert scores.image_recall[10] >= 0.95


def test_it_tells_what_fits(model: Any) -> None:
    """Among the wrong captions are those of scenes with the same objects in another order, colour or number."""
    names, captions = scenes()
    own = [model.match(name, text).probability for name, text in zip(names, captions, strict=True)]
    assert np.mean(np.array(own) > 0.5) >= 0.85
    wrong = captions[1:] + captions[:1]
    others = [model.match(name, text).probability for name, text in zip(names, wrong, strict=True)]
    assert np.mean(np.array(others) < 0.5) >= 0.95


def test_transformers_says_the_same(model: Any) -> None:
    """Both heads, and both libraries' processors, on texts of unequal lengths."""
    names, captions = scenes()
    names, captions = names[:12], captions[:12]
    theirs = transformers.Blip2ForImageTextRetrieval.from_pretrained(FOLDER, dtype=torch.float32).eval()
    processor = transformers.AutoProcessor.from_pretrained(FOLDER)
    pil = transformers.models.blip.image_processing_pil_blip.BlipImageProcessorPil.from_pretrained(FOLDER)
    images = [Image.open(name).convert("RGB") for name in names]
    inputs = dict(processor(images=images, text=captions, padding=True, return_tensors="pt"))
    inputs["pixel_values"] = torch.from_numpy(np.stack(pil(images)["pixel_values"]))
    assert not inputs["attention_mask"].all()
    with torch.no_grad():
        contrast = theirs(**inputs).logits_per_image.numpy()
        matched = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
    np.testing.assert_allclose(model.similarity(model.embed(names), model.embed_text(captions)), contrast, atol=1e-5)
    ours = [model.match(name, text) for name, text in zip(names, captions, strict=True)]
    np.testing.assert_allclose([m.logit for m in ours], matched[:, 1], atol=1e-4)
    np.testing.assert_allclose([m.probability for m in ours], matched.softmax(1)[:, 1], atol=1e-4)
    np.testing.assert_allclose([m.cosine for m in ours], contrast.diagonal(), atol=1e-5)


def test_commands_that_compare_take_it_by_themselves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, captions = scenes()
    assert cli.main(["match", names[0], captions[0], captions[1], "--json"]) == 0
    fits, other = (json.loads(line)["probability"] for line in capsys.readouterr().out.splitlines())
    assert fits > 0.5 > other
    index = str(tmp_path / "index")
    assert cli.main(["index", str(SCENES), "--index", index, "--no-progress"]) == 0
    capsys.readouterr()
    assert cli.main(["search", index, captions[0], "--rerank", "10", "-k", "1", "--json"]) == 0
    assert Path(json.loads(capsys.readouterr().out)["image"]).name == Path(names[0]).name
    data = str(SCENES / "test.json")
    assert cli.main(["eval", "retrieval", data, "--images", str(SCENES), "--limit", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text_recall"]["1"] >= 0.8
