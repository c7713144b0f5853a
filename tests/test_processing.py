"""The image processor bit for bit and the processor token for token against transformers; pictures of every kind."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import shutil
import struct
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import blip2c
from blip2c import BatchFeature, Blip2Processor, BlipImageProcessor, PictureError, UnsupportedError
from blip2c.images import load_image
from blip2c.tokenizer import Blip2Tokenizer
from helpers import random_config, random_processor, small_tokenizer
from running import run_python

MODES = ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1", "YCbCr", "HSV", "LAB"]
SIZES = [(1, 1), (1, 40), (33, 2), (28, 28), (37, 51), (224, 224), (300, 199), (640, 480)]


def noise(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture of noise, so that every filter tap and rounding counts."""
    rng = np.random.default_rng(seed + 1000 * width + height)
    if mode in ("RGBA", "LA"):
        shape = (height, width, len(mode))
        return Image.fromarray(rng.integers(0, 256, shape, np.uint8), mode=None)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)


def same_pixels(images: Any, call: dict[str, Any] | None = None, **options: Any) -> np.ndarray:
    """Both processors' pixel_values, equal in dtype, shape and bits."""
    ours = BlipImageProcessor(**options)(images, return_tensors="np", **(call or {}))
    theirs = BlipImageProcessorPil(**options)(images, return_tensors="np", **(call or {}))
    a, b = ours["pixel_values"], theirs["pixel_values"]
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert a.tobytes() == b.tobytes()
    return a


# -- the image processor -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_size_gives_the_same_bits(mode: str) -> None:
    for width, height in SIZES:
        same_pixels(noise(width, height, mode), size={"height": 56, "width": 56})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"size": {"height": 224, "width": 224}},
        {"size": {"height": 30, "width": 47}},
        {"size": 24},
        {"size": [20, 31]},
        {"size": {"shortest_edge": 30}},
        {"size": {"shortest_edge": 30, "longest_edge": 40}},
        {"size": {"shortest_edge": 30, "longest_edge": 4000}},
        {"size": {"max_height": 30, "max_width": 50}},
        {"size": 24, "default_to_square": False},
        {"resample": 0},
        {"resample": 1},
        {"resample": 2},
        {"resample": 4},
        {"resample": 5},
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"do_rescale": False, "do_normalize": False},
        {"do_resize": False, "do_rescale": False, "do_normalize": False},
        {"rescale_factor": 1 / 127.5},
        {"image_mean": 0.5, "image_std": 0.25},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7]},
        {"do_convert_rgb": False},
        {"do_center_crop": False, "crop_size": 224, "do_pad": False},
    ],
    ids=str,
)
def test_every_option_gives_the_same_bits(options: dict[str, Any]) -> None:
    for width, height in [(51, 37), (37, 51), (64, 64)]:
        same_pixels(noise(width, height), **options)
        same_pixels(noise(width, height), call=options)


def test_sizes_that_keep_the_aspect_round_as_there() -> None:
    rng = np.random.default_rng(8)
    for _ in range(60):
        width, height, edge, longest = (int(v) for v in rng.integers(5, 90, 4))
        image = noise(width, height)
        for size in ({"shortest_edge": edge}, {"max_height": edge, "max_width": longest}):
            same_pixels(image, size=size)
        same_pixels(image, size={"shortest_edge": min(edge, longest), "longest_edge": max(edge, longest)})


def test_a_palette_with_transparency_is_laid_on_white() -> None:
    image = noise(20, 20, "P")
    image.info["transparency"] = image.getpixel((0, 0))
    plain = noise(20, 20, "P")
    assert not np.array_equal(same_pixels(image, do_resize=False), same_pixels(plain, do_resize=False))


def test_random_pictures_and_options_give_the_same_bits() -> None:
    rng = np.random.default_rng(5)
    for trial in range(60):
        width, height = (int(v) for v in rng.integers(1, 200, 2))
        options = {
            "size": {"height": int(rng.integers(1, 90)), "width": int(rng.integers(1, 90))},
            "resample": int(rng.integers(0, 6)),
            "do_rescale": bool(rng.integers(0, 2)),
            "do_normalize": bool(rng.integers(0, 2)),
        }
        same_pixels(noise(width, height, MODES[trial % len(MODES)], trial), **options)


@pytest.mark.parametrize("kind", ["uint8", "float32", "float64", "whole", "int64"])
@pytest.mark.parametrize(
    "shape", [(40, 30, 3), (3, 40, 30), (1, 40, 30), (40, 30, 1), (40, 30, 4), (4, 40, 30), (3, 40, 3)]
)
def test_arrays_give_the_same_bits(kind: str, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    array = {
        "uint8": lambda: rng.integers(0, 256, shape).astype(np.uint8),
        "float32": lambda: rng.random(shape).astype(np.float32),
        "float64": lambda: rng.random(shape),
        "whole": lambda: rng.integers(0, 256, shape).astype(np.float32),
        "int64": lambda: rng.integers(0, 256, shape),
    }[kind]()
    if kind == "whole" and 4 in shape:
        with pytest.raises(PictureError, match=r"0\.\.1"):
            BlipImageProcessor()(array)
        return
    same_pixels(array, size={"height": 20, "width": 25})
    same_pixels(np.asfortranarray(array), size={"height": 20, "width": 25})
    same_pixels(array, size={"height": 20, "width": 25}, do_rescale=False)
    same_pixels(torch.from_numpy(array), size={"height": 20, "width": 25})


def test_ambiguous_arrays_follow_input_data_format() -> None:
    array = np.random.default_rng(2).integers(0, 256, (3, 40, 3)).astype(np.uint8)
    first = same_pixels(array, call={"input_data_format": "channels_first"}, size=16)
    last = same_pixels(array, call={"input_data_format": "channels_last"}, size=16)
    assert not np.array_equal(first, last)


def test_batches_and_nested_lists_are_flattened_as_there() -> None:
    images = [noise(30, 20, seed=i) for i in range(3)]
    assert same_pixels(images).shape[0] == 3
    assert same_pixels([images[:2], images[2:]]).shape[0] == 3
    assert same_pixels(np.stack([np.asarray(i) for i in images])).shape[0] == 3
    assert isinstance(BlipImageProcessor()(images)["pixel_values"], list)


def test_paths_are_read_as_there_exif_included(tmp_path: Path) -> None:
    image = noise(40, 20)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    noise(40, 20, "RGBA").save(tmp_path / "alpha.png")
    same_pixels(str(tmp_path / "turned.png"))
    same_pixels(str(tmp_path / "alpha.png"))
    straight = BlipImageProcessor()(image, return_tensors="np")["pixel_values"]
    assert not np.array_equal(
        BlipImageProcessor()(tmp_path / "turned.png", return_tensors="np")["pixel_values"], straight
    )


@pytest.mark.parametrize(
    "options",
    [{"do_center_crop": True}, {"do_pad": True}, {"data_format": "channels_last"}, {"device": "cuda"}],
    ids=str,
)
def test_what_is_not_computed_raises_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedError, match=next(iter(options))):
        BlipImageProcessor()(noise(5, 5), **options)
    with pytest.raises(UnsupportedError, match=next(iter(options))):
        BlipImageProcessor(**options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sise": 3}, TypeError),
        ({"size": {"height": 3}}, ValueError),
        ({"size": {"height": 0, "width": 3}}, ValueError),
        ({"size": -4}, ValueError),
        ({"resample": 9}, ValueError),
        ({"image_mean": [1.0, 2.0]}, ValueError),
        ({"input_data_format": "sideways"}, ValueError),
        ({"return_tensors": "tf"}, ValueError),
    ],
    ids=str,
)
def test_wrong_options_raise(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        BlipImageProcessor()(noise(5, 5), **options)


@pytest.mark.parametrize(
    "array",
    [
        np.full((8, 8, 3), np.nan, np.float32),
        np.full((8, 8, 3), np.inf),
        np.full((8, 8, 3), 300),
        np.full((8, 8, 3), -0.5),
        np.zeros((8, 8, 2), np.uint8),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8,), np.uint8),
        np.zeros((2, 2, 8, 8, 3), np.uint8),
        np.array([["a"]]),
        np.zeros((8, 8, 3), complex),
    ],
    ids=lambda a: f"{a.dtype}{a.shape}",
)
def test_arrays_that_are_no_pictures_are_refused(array: np.ndarray) -> None:
    for do_resize in (True, False):
        if not do_resize and array.size and np.issubdtype(array.dtype, np.number) and np.isfinite(array).all():
            continue  # without a resize any finite number may be a pixel, as in transformers
        with pytest.raises(PictureError):
            BlipImageProcessor(do_resize=do_resize)(array)
    with pytest.raises(PictureError):
        load_image(array)


def test_an_empty_list_of_pictures_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        BlipImageProcessor()([])


def test_old_and_new_files_are_read(tmp_path: Path) -> None:
    theirs = BlipImageProcessorPil(size={"height": 30, "width": 30}, image_mean=[0.1, 0.2, 0.3])
    theirs.save_pretrained(tmp_path / "new")
    old = {
        "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.1, 0.2, 0.3], "image_processor_type": "BlipImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711], "processor_class": "Blip2Processor", "resample": 3,
        "rescale_factor": 0.00392156862745098, "size": {"height": 30, "width": 30},
    }  # fmt: skip
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "preprocessor_config.json").write_text(json.dumps(old))
    want = theirs(noise(50, 40), return_tensors="np")["pixel_values"]
    for folder in ("new", "old"):
        ours = BlipImageProcessor.from_pretrained(tmp_path / folder)
        assert np.array_equal(ours(noise(50, 40), return_tensors="np")["pixel_values"], want)
        ours.save_pretrained(tmp_path / "back")
        again = BlipImageProcessorPil.from_pretrained(tmp_path / "back")
        assert np.array_equal(again(noise(50, 40), return_tensors="np")["pixel_values"], want)
    changed = BlipImageProcessor.from_pretrained(tmp_path / "old", size=20)
    assert changed(noise(50, 40), return_tensors="np")["pixel_values"].shape[-1] == 20


# -- reading pictures ----------------------------------------------------------------------------------------------


def png(width: int, height: int) -> bytes:
    """A PNG of any size whose pixels are not there: only a header that says so."""
    import zlib

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 64)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("side", [10_000, 40_000], ids=["warning-limit", "error-limit"])
def test_decompression_bombs_are_refused_by_name(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(png(side, side))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(PictureError, match=r"bomb\.png: decompression bomb"):
            load_image(tmp_path / "bomb.png")


def test_files_that_are_no_pictures_are_refused_by_name(tmp_path: Path) -> None:
    good = io.BytesIO()
    noise(64, 64).save(good, "JPEG")
    for name, data in {
        "text.jpg": b"not a picture",
        "empty.png": b"",
        "cut.jpg": good.getvalue()[:300],
        "header.png": png(30, 30),
        "vector.eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(PictureError, match=name):
            load_image(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        load_image(tmp_path / "none.png")
    with pytest.raises(PictureError, match="folder"):
        load_image(tmp_path)
    with pytest.raises(PictureError, match="not fetched"):
        load_image("https://example.org/cat.png")
    with pytest.raises(TypeError, match="int"):
        load_image(3)


def test_pictures_of_every_kind_become_rgb(tmp_path: Path) -> None:
    for mode in MODES:
        image = noise(9, 7, mode)
        assert load_image(image).mode == "RGB"
        assert load_image(image).size == (9, 7)
    frames = [noise(8, 8, seed=i) for i in range(3)]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    assert np.array_equal(np.asarray(load_image(tmp_path / "moving.png")), np.asarray(frames[0]))
    noise(1, 1).save(tmp_path / "dot.png")
    assert load_image((tmp_path / "dot.png").read_bytes()).size == (1, 1)
    with (tmp_path / "dot.png").open("rb") as file:
        assert load_image(file).size == (1, 1)


def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path) -> None:
    values = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    want = np.rint(values / 257.0).astype(np.uint8)
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png"))[..., 0], want)
    assert np.array_equal(np.asarray(load_image(Image.fromarray((values / 65535).astype(np.float32))))[..., 0], want)
    with pytest.raises(PictureError, match="mode F"):
        load_image(Image.fromarray(np.full((4, 4), -3.0, np.float32)))


def test_exif_rotation_is_honoured(tmp_path: Path) -> None:
    image = noise(12, 6)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.save(tmp_path / "turned.png", exif=exif)
        turns = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}
        want = image.transpose(turns[orientation]) if orientation in turns else image if orientation == 1 else None
        found = load_image(tmp_path / "turned.png")
        assert found.size == ((12, 6) if orientation < 5 else (6, 12))
        if want is not None:
            assert np.array_equal(np.asarray(found), np.asarray(want))


def test_arrays_and_pictures_of_the_same_bytes_agree() -> None:
    image = noise(20, 10)
    array = np.asarray(image)
    for form in (array, np.moveaxis(array, -1, 0), array[:, ::-1][:, ::-1], torch.from_numpy(array.copy())):
        assert np.array_equal(np.asarray(load_image(form)), array)
    grey = np.asarray(image.convert("L"))
    for form in (grey, grey[..., None], grey[None]):
        assert np.array_equal(np.asarray(load_image(form)), np.repeat(grey[..., None], 3, -1))
    unit = (array / 255.0 * 0.999).astype(np.float32)
    want = BlipImageProcessor()(unit, return_tensors="np", do_resize=False, do_rescale=False, do_normalize=False)
    assert np.abs(np.asarray(load_image(unit)) / 255.0 - want["pixel_values"][0].transpose(1, 2, 0)).max() < 1 / 255


# -- the processor -------------------------------------------------------------------------------------------------

TEXTS: list[Any] = [
    "a",
    "Question: how many cats are there? Answer:",
    ["a dog", "a small red circle to the left of a large blue square"],
    ["x", "", "  two  spaces\n and a newline", "</s> and <pad> inside", "ünïcödé 漢字 🙂"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("processor")
    random_processor(random_config()).save_pretrained(path)
    return path


@pytest.fixture
def pair(folder: Path) -> tuple[Blip2Processor, transformers.Blip2Processor]:
    theirs = transformers.Blip2Processor(
        BlipImageProcessorPil.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder), 4
    )
    return Blip2Processor.from_pretrained(folder), theirs


def same_features(ours: Any, theirs: Any) -> None:
    assert set(ours) == set(theirs)
    for key in theirs:
        assert np.array_equal(np.asarray(ours[key]), np.asarray(theirs[key])), key
        assert type(ours[key]) is type(theirs[key]), key


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("text", TEXTS, ids=["word", "question", "two", "odd"])
def test_processor_token_for_token(pair: Any, text: Any, with_images: bool, side: str) -> None:
    ours, theirs = pair
    images = [noise(30, 40, seed=i) for i in range(len(text) if isinstance(text, list) else 1)] if with_images else None
    ours.tokenizer.padding_side = theirs.tokenizer.padding_side = side
    for padding in (False, True, "longest", "max_length"):
        for truncation in (None, False, True, "longest_first"):
            for max_length in (None, 9, 30):
                options = {"padding": padding, "truncation": truncation, "max_length": max_length}
                options = {key: value for key, value in options.items() if value is not None}
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    a, b = ours(images, text, **options), theirs(images, text, **options)
                assert a["input_ids"] == b["input_ids"], options
                assert a["attention_mask"] == b["attention_mask"], options
                assert set(a) == set(b)


@pytest.mark.parametrize("tensors", ["np", "pt"])
def test_processor_tensors(pair: Any, tensors: str) -> None:
    ours, theirs = pair
    images, texts = [noise(30, 40, seed=i) for i in range(2)], ["a dog", "two green triangles above"]
    same_features(
        ours(images, texts, padding=True, return_tensors=tensors),
        theirs(images, texts, padding=True, return_tensors=tensors),
    )
    same_features(ours(images, return_tensors=tensors), theirs(images, return_tensors=tensors))
    same_features(
        ours(text=texts, padding=True, return_tensors=tensors), theirs(text=texts, padding=True, return_tensors=tensors)
    )


def test_processor_other_options(pair: Any) -> None:
    ours, theirs = pair
    image, text = noise(30, 40), ["a dog", "a longer text than that"]
    for options in (
        {"add_special_tokens": False},
        {"return_attention_mask": False},
        {"pad_to_multiple_of": 8, "padding": True},
        {"padding": True, "padding_side": "left"},
        {"return_token_type_ids": True},
        {"return_special_tokens_mask": True},
        {"text_kwargs": {"padding": True}, "images_kwargs": {"do_normalize": False}},
        {"size": {"height": 10, "width": 12}},
        {"do_rescale": False},
    ):
        a, b = ours(image, text, **options), theirs(image, text, **options)
        assert set(a) == set(b), options
        for key in b:
            equal = np.array_equal if key == "pixel_values" else lambda x, y: x == y
            assert equal(a[key], b[key]), (options, key)


def test_processor_refuses(pair: Any) -> None:
    ours, _ = pair
    with pytest.raises(ValueError, match="images or text"):
        ours()
    for text in ([], 3, [3], ["a", 3]):
        with pytest.raises(ValueError, match="string"):
            ours(text=text)
    with pytest.raises(ValueError, match="rows differ in length"):
        ours(text=["a", "a dog and a cat"], return_tensors="np")
    with pytest.raises(TypeError, match="paddding"):
        ours(text="a", paddding=True)
    with pytest.raises(UnsupportedError, match="text_pair"):
        ours(text="a", text_pair="b")
    with pytest.raises(ValueError, match="padding must be"):
        ours(text="a", padding="sometimes")
    with pytest.raises(ValueError, match="padding_side"):
        ours.tokenizer.padding_side = "top"


def test_decoding_as_there(pair: Any) -> None:
    ours, theirs = pair
    ids = np.random.default_rng(0).integers(0, 320, (6, 20))
    for skip in (True, False):
        for clean in (None, True, False):
            a = ours.batch_decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=clean)
            assert a == theirs.batch_decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=clean)
        assert ours.batch_decode(torch.from_numpy(ids), skip_special_tokens=skip) == theirs.batch_decode(
            ids, skip_special_tokens=skip
        )
        assert ours.decode(ids[0], skip_special_tokens=skip) == theirs.decode(ids[0], skip_special_tokens=skip)
        assert ours.decode(ids[0].tolist(), skip_special_tokens=skip) == theirs.decode(ids[0], skip_special_tokens=skip)
    assert ours.decode(5) == theirs.decode(5)
    with pytest.raises(ValueError, match="negative"):
        ours.decode([-1])


def test_tokenizer_facts_as_there(pair: Any) -> None:
    ours, theirs = pair[0].tokenizer, pair[1].tokenizer
    assert ours.vocab_size == theirs.vocab_size
    assert len(ours) == len(theirs)
    assert ours.get_vocab() == theirs.get_vocab()
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        assert getattr(ours, name) == getattr(theirs, name)
        assert getattr(ours, f"{name}_id") == getattr(theirs, f"{name}_id")
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.convert_tokens_to_ids(["a", "<image>", "no such token"]) == theirs.convert_tokens_to_ids(
        ["a", "<image>", "no such token"]
    )
    assert ours.convert_ids_to_tokens([5, 319]) == theirs.convert_ids_to_tokens([5, 319])
    assert ours.tokenize("a small dog") == theirs.tokenize("a small dog")
    assert ours.encode("a small dog") == theirs.encode("a small dog")
    assert ours("a small dog").data == dict(theirs("a small dog"))
    with pytest.raises(AttributeError, match="no_such"):
        _ = ours.no_such


def test_files_written_here_are_read_there(pair: Any, tmp_path: Path) -> None:
    ours, theirs = pair
    ours.tokenizer.padding_side = "left"
    ours.save_pretrained(tmp_path)
    again = transformers.Blip2Processor.from_pretrained(tmp_path)
    assert again.num_query_tokens == 4
    assert again.tokenizer.padding_side == "left"
    theirs.tokenizer.padding_side = "left"
    exact = transformers.Blip2Processor(BlipImageProcessorPil.from_pretrained(tmp_path), again.tokenizer, 4)
    images, texts = [noise(30, 40, seed=i) for i in range(2)], ["a dog </s>", "two green triangles above"]
    want = theirs(images, texts, padding=True, return_tensors="np")
    same_features(exact(images, texts, padding=True, return_tensors="np"), want)
    same_features(Blip2Processor.from_pretrained(tmp_path)(images, texts, padding=True, return_tensors="np"), want)


def test_checkpoint_of_before_image_tokens(tmp_path: Path) -> None:
    """No processor_config.json, no <image> in the vocabulary, GPT2Tokenizer in tokenizer_config.json."""
    tokenizer = small_tokenizer(image_token=False)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config.update(tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_prefix_space=False, errors="replace")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    bos = {"content": "</s>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    special = {"bos_token": bos, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    BlipImageProcessorPil(size={"height": 28, "width": 28}).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(random_config(image_token=False).to_dict(), default=str))
    ours = Blip2Processor.from_pretrained(tmp_path)
    theirs = transformers.Blip2Processor(
        BlipImageProcessorPil.from_pretrained(tmp_path), transformers.GPT2Tokenizer.from_pretrained(tmp_path)
    )
    assert ours.num_query_tokens is None
    assert ours.image_token_id == theirs.tokenizer.convert_tokens_to_ids("<image>")
    for text in TEXTS:
        many = [noise(30, 20)] * (len(text) if isinstance(text, list) else 1)
        assert ours(many, text)["input_ids"] == theirs(many, text)["input_ids"]


def test_vocabulary_files_without_tokenizer_json(folder: Path, tmp_path: Path) -> None:
    whole = json.loads((folder / "tokenizer.json").read_text())
    model = whole["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "</s>",
        "add_bos_token": True,
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours, want = Blip2Tokenizer.from_pretrained(tmp_path), Blip2Tokenizer.from_pretrained(folder)
    for text in ("a small dog", "Question: what? Answer:", ""):
        assert ours.encode(text) == want.encode(text)


def test_damaged_tokenizer_files_are_named(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(blip2c.CheckpointError, match=r"tokenizer\.json"):
        Blip2Processor.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        Blip2Processor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"num_query_tokens": "many", "image_processor": {}}')
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    with pytest.raises(blip2c.CheckpointError, match="num_query_tokens"):
        Blip2Processor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").write_text('{"image_processor": {"size": "big"}}')
    with pytest.raises(blip2c.CheckpointError, match="size"):
        Blip2Processor.from_pretrained(tmp_path)
    (tmp_path / "processor_config.json").unlink()
    with pytest.raises(FileNotFoundError, match="preprocessor_config"):
        Blip2Processor.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "processor_config.json"])
@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_a_file_that_holds_no_object_is_named(folder: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / name).write_text(content)
    with pytest.raises(blip2c.CheckpointError, match=f"{name}.*expected an object"):
        Blip2Processor.from_pretrained(tmp_path / "copy")


def test_a_folder_may_have_any_name(folder: Path, tmp_path: Path) -> None:
    place = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff \n"))
    ours = Blip2Processor.from_pretrained(folder)
    ours.save_pretrained(place)
    again = Blip2Processor.from_pretrained(place)
    assert again(text="a dog")["input_ids"] == ours(text="a dog")["input_ids"]


def test_threads_share_a_processor(pair: Any) -> None:
    ours, theirs = pair
    calls: list[dict[str, Any]] = [
        {"text": ["a small red circle", "a"], "padding": True},
        {"text": "a dog"},
        {"text": ["a small red circle", "a"], "padding": "max_length", "max_length": 9, "truncation": True},
    ]
    want = [theirs(**call)["input_ids"] for call in calls]

    def work(turn: int) -> bool:
        return bool(ours(**calls[turn % 3])["input_ids"] == want[turn % 3])

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert all(pool.map(work, range(1500)))
    finally:
        sys.setswitchinterval(before)
    again = pickle.loads(pickle.dumps(ours))
    assert again(**calls[0])["input_ids"] == want[0]
    assert copy.deepcopy(ours)(**calls[2])["input_ids"] == want[2]


def test_encode_and_decode_obey_what_they_are_given(pair: Any) -> None:
    ours, theirs = (processor.tokenizer for processor in pair)
    for tensors in ("np", "pt"):
        got, want = ours.encode("a dog", return_tensors=tensors), theirs.encode("a dog", return_tensors=tensors)
        assert type(got) is type(want)
        assert np.array_equal(got, want)
    for tokenizer in (ours, theirs):
        with pytest.raises(TypeError, match="float"):
            tokenizer.decode([1.5])
    with pytest.raises(ValueError, match="text 1 is not Unicode: surrogates not allowed at character 2"):
        ours(["a", "b \ud800"])


# -- BatchFeature --------------------------------------------------------------------------------------------------


def test_batch_feature_casts_only_floats() -> None:
    data = {"pixel_values": torch.rand(1, 3, 4, 4), "input_ids": torch.ones(1, 5, dtype=torch.long)}
    batch = BatchFeature(dict(data)).to("cpu", torch.bfloat16)
    assert batch.pixel_values.dtype == torch.bfloat16
    assert batch.input_ids.dtype == torch.int64
    assert BatchFeature(dict(data)).to(torch.float16).pixel_values.dtype == torch.float16
    assert BatchFeature(dict(data)).to(device="cpu", dtype=torch.float64).pixel_values.dtype == torch.float64
    arrays = {"pixel_values": data["pixel_values"].numpy(), "input_ids": data["input_ids"].numpy()}
    half = BatchFeature(dict(arrays)).to("cpu", "float16")
    assert half["pixel_values"].dtype == np.float16
    assert half["input_ids"].dtype == np.int64
    rounded = BatchFeature(dict(arrays)).to(torch.bfloat16)["pixel_values"]
    assert rounded.dtype == np.float32
    assert np.array_equal(rounded, data["pixel_values"].to(torch.bfloat16).float().numpy())
    with pytest.raises(ValueError, match="CPU"):
        BatchFeature(dict(arrays)).to("cuda")
    with pytest.raises(AttributeError):
        _ = half.no_such
    assert dict(**half).keys() == half.keys()


def test_blip2c_does_not_import_torch(folder: Path) -> None:
    code = (
        "import sys, numpy as np, blip2c\n"
        f"p = blip2c.AutoProcessor.from_pretrained({str(folder)!r})\n"
        "x = p(np.zeros((8, 8, 3), np.uint8), 'a dog', return_tensors='np').to('cpu', 'float16')\n"
        "assert x.pixel_values.dtype == np.float16\n"
        "print(p.batch_decode(x.input_ids, skip_special_tokens=True)[0])\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "a dog"
