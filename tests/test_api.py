"""The friendly spelling: captions and answers, the same bits alone and in a batch, one bad picture stops nothing."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import blip2c
from blip2c import Caption, NumericError, PictureError, UnsupportedError, api, hub
from helpers import edit_config, random_checkpoint
from running import run_python

SAMPLES = 7


def picture(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    """A coarse random picture: what is in it survives the resizing."""
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize(size, Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("api"), 5, tokenizer=True, text={"eos_token_id": 300})


@pytest.fixture(scope="module")
def model(folder: Path) -> api.Captioner:
    return blip2c.load(folder)


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [picture(seed, (40 + 9 * seed, 70 - 5 * seed)) for seed in range(SAMPLES)]


def test_a_caption_is_what_generate_says(model: Any, pictures: list[Any]) -> None:
    for image in pictures[:3]:
        for prompt in (None, "a photo of", "a"):
            for beams in (1, 3):
                inputs = model.processor(image, prompt or "", return_tensors="np")
                sequences = model.model.generate(**inputs, max_new_tokens=9, num_beams=beams)
                new = sequences[:, inputs.input_ids.shape[1] :]
                found = model.caption(image, prompt, max_new_tokens=9, num_beams=beams)
                assert isinstance(found, str)
                assert found == model.processor.batch_decode(new, skip_special_tokens=True)[0].strip()
                assert found.ids == [int(i) for i in new[0]][: len(found.ids)]


def test_one_in_one_out_lists_in_lists_out(model: Any, pictures: list[Any], tmp_path: Path) -> None:
    pictures[0].save(tmp_path / "a.png")
    want = model.caption(pictures[0], max_new_tokens=5)
    array = np.asarray(pictures[0])
    data = (tmp_path / "a.png").read_bytes()
    one = [
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        data,
        pictures[0],
        array,
        array.transpose(2, 0, 1),
        torch.tensor(array),
    ]
    for form in one:
        assert model.caption(form, max_new_tokens=5) == want
    for several in (one, tuple(one), iter(one), np.stack([array] * len(one))):
        assert list(model.caption(several, max_new_tokens=5)) == [want] * len(one)


def test_pictures_and_prompts_matter(model: Any, pictures: list[Any]) -> None:
    captions = model.caption(pictures, max_new_tokens=8)
    assert len({tuple(c.ids) for c in captions}) >= 0.9 * SAMPLES
    assert model.caption(pictures[0], "a dog", max_new_tokens=8).ids != captions[0].ids
    each = model.caption(pictures[:2], ["a dog", "two"], max_new_tokens=8)
    assert each[0].ids == model.caption(pictures[0], "a dog", max_new_tokens=8).ids
    assert each[1].ids == model.caption(pictures[1], "two", max_new_tokens=8).ids


@pytest.mark.parametrize("beams", [1, 3])
def test_a_batch_says_what_each_says_alone(model: Any, pictures: list[Any], beams: int) -> None:
    prompts = ["", "a", "Question: how many cats are there? Answer:", "two green", "a photo of", "x y z", "the"]
    alone = [model.caption(p, t, max_new_tokens=8, num_beams=beams) for p, t in zip(pictures, prompts, strict=True)]
    for batch in (1, 2, 3, SAMPLES):
        found = model.caption(pictures, prompts, max_new_tokens=8, num_beams=beams, batch_size=batch)
        assert [f.ids for f in found] == [a.ids for a in alone]
    order = [3, 0, 6, 2, 1, 5, 4]
    found = model.caption([pictures[i] for i in order], [prompts[i] for i in order], max_new_tokens=8, num_beams=beams)
    assert [f.ids for f in found] == [alone[i].ids for i in order]


@pytest.mark.parametrize("beams", [1, 3])
def test_draws_do_not_depend_on_batches(model: Any, pictures: list[Any], beams: int) -> None:
    """The same picture everywhere: only its number tells the draws apart, as in one batch of generate()."""
    options = {"do_sample": True, "temperature": 3.0, "seed": 11, "max_new_tokens": 8, "num_beams": beams}
    same = [pictures[0]] * 5
    want = [caption.ids for caption in model.caption(same, batch_size=5, **options)]
    assert len({tuple(ids) for ids in want}) > 1
    for size in (1, 2, 3):
        assert [caption.ids for caption in model.caption(same, batch_size=size, **options)] == want
    found = model.caption([b"no picture", *same[1:]], batch_size=3, errors="return", **options)
    assert [caption.ids for caption in found[1:]] == want[1:]
    image = model.processor(same, return_tensors="np")
    ids = model.model.generate(**image, **options)[:, -max(map(len, want)) :]
    assert [row[: len(said)].tolist() for row, said in zip(ids, want, strict=True)] == want
    questions = ["what?"] * 4
    answers = [[a.ids for a in model.ask(pictures[0], questions, batch_size=n, **options)] for n in (1, 3, 4)]
    assert answers[0] == answers[1] == answers[2]
    assert len({tuple(ids) for ids in answers[0]}) > 1


def test_threads_do_not_change_a_bit(model: Any, pictures: list[Any]) -> None:
    pixels = model.processor.image_processor(pictures, return_tensors="np")["pixel_values"]
    threads = blip2c.get_num_threads()
    try:
        encoded = []
        for count in (1, 2, 3):
            blip2c.set_num_threads(count)
            together = model.model._core.encode(pixels)
            apart = np.concatenate([model.model._core.encode(p[None]) for p in pixels])
            assert together.tobytes() == apart.tobytes()
            encoded.append(together.tobytes())
    finally:
        blip2c.set_num_threads(threads)
    assert len(set(encoded)) == 1


def test_ask(model: Any, pictures: list[Any]) -> None:
    question = "how many cats are there?"
    one = model.ask(pictures[0], question, max_new_tokens=6)
    assert isinstance(one, str)
    assert one.ids == model.caption(pictures[0], f"Question: {question} Answer:", max_new_tokens=6).ids
    assert (
        model.ask(pictures[0], question, "Q {}", max_new_tokens=6).ids
        == model.caption(pictures[0], f"Q {question}", max_new_tokens=6).ids
    )
    questions = [question, "what colour is it?", "why?"]
    several = model.ask(pictures[0], questions, max_new_tokens=6)
    assert [a.ids for a in several] == [model.ask(pictures[0], q, max_new_tokens=6).ids for q in questions]
    for_all = model.ask(pictures[:3], question, max_new_tokens=6)
    assert [a.ids for a in for_all] == [model.ask(p, question, max_new_tokens=6).ids for p in pictures[:3]]
    each = model.ask(pictures[:3], questions, max_new_tokens=6)
    assert [a.ids for a in each] == [
        model.ask(p, q, max_new_tokens=6).ids for p, q in zip(pictures[:3], questions, strict=True)
    ]
    for wrong in (["a", "b"], []):
        with pytest.raises(ValueError, match="questions"):
            model.ask(pictures[:3], wrong)
    with pytest.raises(ValueError, match="template"):
        model.ask(pictures[0], question, "no place")


def test_a_picture_is_encoded_once_for_many_questions(model: Any, pictures: list[Any], monkeypatch: Any) -> None:
    seen: list[int] = []
    core = model.model._core

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(core, name)

        def encode(self, pixels: np.ndarray, **options: Any) -> Any:
            seen.append(pixels.shape[0])
            return core.encode(pixels, **options)

    monkeypatch.setattr(model.model, "_core", Counting())
    model.ask(pictures[0], ["a", "b", "c", "d", "e"], max_new_tokens=2, batch_size=2)
    assert seen == [1]


def test_bad_pictures_are_row_errors(model: Any, pictures: list[Any], tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    rows = [
        pictures[0],
        tmp_path / "bad.png",
        pictures[1],
        tmp_path / "none.png",
        np.full((4, 4, 3), np.nan),
        pictures[2],
    ]
    found = model.caption(rows, max_new_tokens=5, errors="return", batch_size=2)
    assert [type(f) for f in found] == [Caption, PictureError, Caption, FileNotFoundError, PictureError, Caption]
    assert [found[i].ids for i in (0, 2, 5)] == [c.ids for c in model.caption(pictures[:3], max_new_tokens=5)]
    assert "bad.png" in str(found)
    assert "picture 0: " in str(found)
    with pytest.raises(PictureError, match=r"bad\.png"):
        model.caption(rows, max_new_tokens=5)
    assert isinstance(model.caption(tmp_path / "bad.png", errors="return"), PictureError)
    with pytest.raises(ValueError, match="errors must be"):
        model.caption(pictures[0], errors="hide")


def test_a_prompt_without_room_is_a_row_error(model: Any, pictures: list[Any]) -> None:
    found = model.caption(pictures[:3], ["a", "a dog " * 200, "b"], max_new_tokens=5, errors="return")
    assert [type(f) for f in found] == [Caption, ValueError, Caption]
    assert "160 positions" in str(found[1])
    found = model.caption(pictures[:2], ["a", "a dog and a cat"], max_new_tokens=None, max_length=9, errors="return")
    assert [type(f) for f in found] == [Caption, ValueError]
    assert "max_length is 9" in str(found[1])
    with pytest.raises(ValueError, match="<image>"):
        model.caption(pictures[0], "an <image> of")


def test_wrong_arguments_raise_for_the_whole_call(model: Any, pictures: list[Any]) -> None:
    for arguments, error, message in (
        ({"images": []}, ValueError, "images is empty"),
        ({"prompt": ["a", "b"]}, ValueError, "2 prompts for 7 pictures"),
        ({"batch_size": 0}, ValueError, "batch_size"),
        ({"num_beams": 0}, ValueError, "num_beams"),
        ({"penalty_alpha": 0.6}, UnsupportedError, "penalty_alpha"),
        ({"return_dict_in_generate": True}, UnsupportedError, "return_dict_in_generate"),
        ({"do_sample": True, "temperature": 0.0}, ValueError, "temperature"),
        ({"max_new_tokns": 3}, ValueError, "max_new_tokns"),
        ({"images": 5}, TypeError, "images: int"),
        ({"images": None}, TypeError, "images: NoneType"),
        ({"images": memoryview(b"x")}, TypeError, "images: expected a list, found memoryview"),
        ({"prompt": 5}, TypeError, "prompt: int"),
        ({"num_beams": 2, "num_return_sequences": 3}, ValueError, "num_return_sequences"),
    ):
        with pytest.raises(error, match=message):
            model.caption(**{"images": pictures, "errors": "return", **arguments})
    for questions in (None, 5, b"what?", [None], ["a", b"b"]):
        with pytest.raises(TypeError, match="question"):
            model.ask(pictures[0], questions)


def test_how_long_and_with_how_many_beams_is_the_caller_s(model: Any, pictures: list[Any]) -> None:
    drop_in, image = model.model, model.processor(pictures[0], return_tensors="np")
    config = blip2c.GenerationConfig(max_new_tokens=6, num_beams=3)
    for options in ({"max_length": 9}, {"max_length": 9, "num_beams": 3}, {"generation_config": config}):
        want = drop_in.generate(**image, **options)[0, 5:].tolist()
        assert model.caption(pictures[0], **options).ids == want, options
        assert len(want) == (4 if "max_length" in options else 6)
    rules = {"num_beams": 3, "no_repeat_ngram_size": 2}
    beams = model.caption(pictures, generation_config=blip2c.GenerationConfig(**rules))
    assert beams == model.caption(pictures, max_new_tokens=30, **rules)
    assert beams != model.caption(pictures, max_new_tokens=30, no_repeat_ngram_size=2)


def test_a_closed_picture_is_a_picture_error(model: Any) -> None:
    image = picture(1)
    image.close()
    with pytest.raises(PictureError, match="closed"):
        model.caption(image)
    with pytest.raises(PictureError, match="''"):
        model.caption("")


def test_an_empty_caption_says_why(model: Any, pictures: list[Any], folder: Path, tmp_path: Path) -> None:
    assert model.caption(pictures[0], max_new_tokens=3).reason is None
    assert model.caption(pictures[0], max_new_tokens=3).finished is False
    first = model.caption(pictures[0], max_new_tokens=1).ids[0]
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, text_config__eos_token_id=2)
    # </s> (2) is a special token: a model that says it at once has said nothing.
    silent = blip2c.load(tmp_path).caption(
        pictures[0], max_new_tokens=4, suppress_tokens=[i for i in range(320) if i != 2]
    )
    assert silent == ""
    assert silent.finished is True
    assert silent.reason == "the model ended its text with its first token"
    assert first != 2
    again = pickle.loads(pickle.dumps(silent))
    assert (again, again.ids, again.reason) == (silent, silent.ids, silent.reason)


def test_nan_in_the_weights_is_an_error_not_an_empty_caption(folder: Path, pictures: list[Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["language_projection.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(NumericError):
        blip2c.load(tmp_path).caption(pictures[0])


def test_progress_goes_to_stderr_and_only_when_asked(model: Any, pictures: list[Any], capfd: Any) -> None:
    model.caption(pictures, max_new_tokens=2, batch_size=2)
    assert capfd.readouterr() == ("", "")
    model.caption(pictures, max_new_tokens=2, batch_size=2, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "7/7" in err


def test_printing(model: Any, pictures: list[Any], folder: Path) -> None:
    assert str(folder) in repr(model)
    captions = model.caption(pictures[:2], max_new_tokens=3)
    assert str(captions) == f"picture 0: {captions[0]}\npicture 1: {captions[1]}"


def test_load_without_a_sample_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "hub.py"))
    with pytest.raises(FileNotFoundError, match="no sample checkpoint"):
        blip2c.load()
    with pytest.raises(TypeError, match="no option dtpye"):
        blip2c.load(tmp_path, dtpye="float16")


def test_importing_is_light() -> None:
    code = (
        "import sys, blip2c\n"
        "heavy = {'torch', 'transformers', 'PIL', 'tokenizers', 'huggingface_hub', 'tqdm'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert set(blip2c.__all__) <= set(dir(blip2c))\n"
        "assert not hasattr(blip2c, 'Blip2ForQuestionAnswering')\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_every_exported_name_is_there() -> None:
    for name in blip2c.__all__:
        assert getattr(blip2c, name) is not None
    with pytest.raises(AttributeError, match="no_such"):
        _ = blip2c.no_such
