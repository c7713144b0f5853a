"""The pipelines that transformers 5 removed: forms of input, return values, options, errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blip2c
from blip2c import PictureError, UnsupportedError

PICTURES = blip2c.sample_path() / "pictures"
CRAB, TWO = PICTURES / "left-right.png", PICTURES / "two.png"
LEFT, RIGHT = (f"Question: what is on the {side}? Answer:" for side in ("left", "right"))


@pytest.fixture(scope="module")
def model() -> Any:
    return blip2c.load()


@pytest.fixture(scope="module")
def captions(model: Any) -> Any:
    return blip2c.pipeline("image-to-text", model=model)


@pytest.fixture(scope="module")
def answers(model: Any) -> Any:
    return blip2c.pipeline("visual-question-answering", model=model)


def test_image_to_text(model: Any, captions: Any) -> None:
    paths = [CRAB, TWO, CRAB]
    texts = [[{"generated_text": str(model.caption(path))}] for path in paths]

    def stripped(rows: Any) -> list[Any]:
        return [[{"generated_text": row[0]["generated_text"].strip()}] for row in rows]

    assert stripped([captions(str(CRAB))]) == texts[:1]
    assert stripped([captions(images=Image.open(CRAB))]) == texts[:1]
    assert stripped([captions(np.asarray(Image.open(CRAB).convert("RGB")))]) == texts[:1]
    for batch in (1, 2):
        found = captions([str(path) for path in paths], batch_size=batch)
        assert isinstance(found, list)
        assert stripped(found) == texts
    many = captions((path for path in paths * 20), batch_size=2)
    assert not isinstance(many, list)
    assert stripped(many) == texts * 20
    assert captions([]) == []
    text = captions(CRAB, prompt=LEFT, generate_kwargs={"num_beams": 3})[0]["generated_text"]
    assert text.strip() == model.ask(CRAB, "what is on the left?", num_beams=3) == "crab"
    # Not stripped, as upstream.
    ids = model.caption(CRAB, max_new_tokens=3).ids
    assert captions(CRAB, max_new_tokens=3)[0]["generated_text"] == model.processor.tokenizer.decode(ids)


def test_visual_question_answering(answers: Any) -> None:
    assert answers(CRAB, LEFT) == answers(image=str(CRAB), question=LEFT, top_k=1) == [{"answer": "crab"}]
    assert answers({"image": CRAB, "question": RIGHT}) == [{"answer": "bell"}]
    pairs = [{"image": CRAB, "question": question} for question in (LEFT, RIGHT)]
    assert answers(pairs) == answers(CRAB, [LEFT, RIGHT]) == [[{"answer": "crab"}], [{"answer": "bell"}]]
    assert list(answers(iter(pairs))) == answers(pairs)
    each = [answers(TWO, question) for question in (LEFT, RIGHT)]
    assert answers([CRAB, TWO], LEFT) == [[{"answer": "crab"}], each[0]]
    both = [[{"answer": "crab"}], each[0], [{"answer": "bell"}], each[1]]
    assert answers([CRAB, TWO], [LEFT, RIGHT], batch_size=4) == both


def test_pipelines_are_made_of_what_there_is(model: Any) -> None:
    made = blip2c.pipeline("image-to-text", blip2c.sample_path(), device=-1, framework="pt", max_new_tokens=2)
    assert made(CRAB)[0]["generated_text"].strip() == model.caption(CRAB, max_new_tokens=2)
    again = blip2c.pipeline("vqa", model=model.model, processor=model.processor)
    assert again(CRAB, LEFT) == [{"answer": "crab"}]
    assert repr(again).startswith("pipeline('visual-question-answering'")
    asked = blip2c.pipeline(model=model, prompt=LEFT)
    assert asked(CRAB)[0]["generated_text"].strip() == "crab"


def test_wrong_arguments(model: Any, captions: Any, answers: Any, tmp_path: Path) -> None:
    for call, error, words in (
        (lambda: blip2c.pipeline("text-generation"), KeyError, "Unknown task text-generation"),
        (lambda: blip2c.pipeline(model=3), TypeError, "model: expected a path, .*found int"),
        (lambda: blip2c.pipeline(model=model.model), TypeError, "processor: expected"),
        (lambda: blip2c.pipeline(model=model, dtype="int8"), TypeError, "dtype: for loading a model"),
        (lambda: blip2c.pipeline(model=model, device="mps"), UnsupportedError, "mps"),
        (lambda: blip2c.pipeline(model=model, framework="tf"), UnsupportedError, "framework='tf'"),
        (lambda: blip2c.pipeline(model=model, top=3), TypeError, "pipeline has no argument top"),
        (lambda: blip2c.pipeline("vqa", model=model, prompt="a"), TypeError, "no argument prompt"),
        (lambda: captions(), ValueError, "without an inputs argument"),
        (lambda: captions(5), TypeError, "expected a picture or an iterable, found int"),
        (lambda: captions(CRAB, prompt=["a"]), ValueError, "expected a single string"),
        (lambda: captions(CRAB, max_new_tokens=2, generate_kwargs={"max_new_tokens": 3}), ValueError, "both"),
        (lambda: captions(CRAB, beams=3), TypeError, "image-to-text has no argument beams"),
        (lambda: captions(CRAB, generate_kwargs={"beams": 3}), ValueError, "beams"),
        (lambda: captions(CRAB, batch_size=0), ValueError, "batch_size"),
        (lambda: captions("https://example.org/a.png", timeout=3), PictureError, "not fetched from addresses"),
        (lambda: captions([CRAB, tmp_path / "none.png"]), FileNotFoundError, "none.png"),
        (lambda: answers(CRAB), ValueError, "question must be given"),
        (lambda: answers([CRAB]), ValueError, "expected .*image.*question"),
        (lambda: answers({"image": CRAB, "question": 3}), TypeError, "a question must be a string"),
        (lambda: answers(CRAB, LEFT, truncation=True), UnsupportedError, "truncation=True"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert answers(CRAB, LEFT) == [{"answer": "crab"}]
