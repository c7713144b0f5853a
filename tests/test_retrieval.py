"""Retrieval against transformers: ITC, ITM, the halves, the Q-Former alone, and the friendly calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

import blip2c
from blip2c import CheckpointError, UnsupportedError, cli
from helpers import edit_config, random_checkpoint, random_pixels, reference_model
from output_helpers import assert_same

VARIANTS: dict[str, dict[str, Any]] = {
    "image token": {},
    "old form": {"image_token": False, "qformer": {"cross_attention_frequency": 1, "layer_norm_eps": 0.1}},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16", "image_token": False},
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("retrieval")
    return random_checkpoint(path, seed=50, retrieval=True, tokenizer=True, **VARIANTS[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint where the form does not matter."""
    return random_checkpoint(tmp_path_factory.mktemp("plain"), seed=51, retrieval=True, tokenizer=True)


def half(name: str, folder: Path) -> Any:
    """transformers' class of that name in float32."""
    kind = getattr(transformers, name)
    return kind.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()


def rows(config: Any, batch: int, image: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """ids [batch, (Q +) 7] of texts of unequal length, padded at the right, and their mask."""
    rng = np.random.default_rng(1)
    lengths = np.array([7, *rng.integers(2, 7, batch - 1)])
    mask = (np.arange(7) < lengths[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(1, config.qformer_config.vocab_size, (batch, 7)), 0)
    if image and config.image_token_index is not None:
        front = np.full((batch, config.num_query_tokens), config.image_token_index)
        ids, mask = np.concatenate([front, ids], axis=1), np.concatenate([np.ones_like(front), mask], axis=1)
    return torch.from_numpy(ids), torch.from_numpy(mask)


def pixels(config: Any, batch: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(random_pixels(config, batch, seed))


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


WATCH = {"output_hidden_states": True, "output_attentions": True}


@pytest.mark.parametrize("together", [False, True], ids=["itc", "itm"])
def test_pictures_with_texts(folder: Path, together: bool) -> None:
    model, reference = blip2c.Blip2ForImageTextRetrieval.from_pretrained(folder).float(), reference_model(folder)
    ids, mask = rows(reference.config, 3)
    inputs = {"pixel_values": pixels(reference.config, 3), "input_ids": ids, "attention_mask": mask}
    for options in ({}, WATCH, {"return_dict": False}):
        with torch.no_grad():
            expected = reference(**inputs, use_image_text_matching_head=together, **options)
        found = model(**inputs, use_image_text_matching_head=together, **options)
        assert assert_same(found, expected) >= 7
    assert np.ptp(np.asarray(expected[0])) > 0.05  # pictures and texts do count
    whole = {name: value for name, value in inputs.items() if name != "attention_mask"}
    ones = model(**whole, use_image_text_matching_head=together)
    assert_same(ones, model(**whole, attention_mask=torch.ones_like(mask), use_image_text_matching_head=together), 0)
    assert not torch.equal(ones[0], found[0])  # and so does the mask


def test_more_texts_than_pictures(plain: Path) -> None:
    model, reference = blip2c.Blip2ForImageTextRetrieval.from_pretrained(plain), reference_model(plain)
    ids, mask = rows(reference.config, 5)
    with torch.no_grad():
        expected = reference(pixels(reference.config, 2), ids, mask)
    found = model(pixels(reference.config, 2), ids, mask)
    assert_same(found, expected)
    assert found.logits_per_image.shape == (2, 5)
    with pytest.raises(ValueError, match=r"5 rows.*2 pictures"):
        model(pixels(reference.config, 2), ids, mask, use_image_text_matching_head=True)


@pytest.mark.parametrize("options", [{}, WATCH, {"return_dict": False}], ids=["plain", "watched", "tuple"])
def test_the_halves(folder: Path, options: dict[str, Any], recwarn: pytest.WarningsRecorder) -> None:
    theirs = half("Blip2TextModelWithProjection", folder)
    ours = blip2c.Blip2TextModelWithProjection.from_pretrained(folder).float()
    ids, mask = rows(theirs.config, 3, image=False)
    with torch.no_grad():
        assert_same(ours(ids, mask, **options), theirs(ids, mask, **options))
        assert_same(ours(ids, **options), theirs(ids, **options))
    look = half("Blip2VisionModelWithProjection", folder)
    own = blip2c.Blip2VisionModelWithProjection.from_pretrained(folder).float()
    given = pixels(look.config, 3)
    with torch.no_grad():
        assert_same(own(given, **options), look(given, **options))
        large = torch.randn(1, 3, 42, 56)
        assert_same(own(large, interpolate_pos_encoding=True), look(large, interpolate_pos_encoding=True))
    assert (
        ours.num_parameters() + own.num_parameters()
        > blip2c.Blip2ForImageTextRetrieval.from_pretrained(folder).num_parameters()
    )
    assert not [w for w in recwarn if "left out" in str(w.message)]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("queries", [0, 3, 8])
def test_the_qformer_alone(plain: Path, queries: int, masked: bool) -> None:
    """Any embeddings, of which the first `queries` look at the picture, and masks over rows and picture."""
    theirs, ours = reference_model(plain), blip2c.Blip2QFormerModel.from_pretrained(plain)
    whole = blip2c.Blip2ForImageTextRetrieval.from_pretrained(plain)
    generator = torch.Generator().manual_seed(3)
    given: dict[str, Any] = {"query_embeds": torch.randn(2, 8, 16, generator=generator), "query_length": queries}
    if queries:
        given["encoder_hidden_states"] = torch.randn(2, 5, 24, generator=generator)
    if masked:
        given["attention_mask"] = torch.tensor([[1, 0, 1, 1, 1, 1, 0, 1], [1, 1, 1, 1, 1, 0, 0, 0]])
    if masked and queries == 8:  # upstream fails on a masked picture with texts beside the queries
        given["encoder_attention_mask"] = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1]])
    with torch.no_grad():
        want = theirs.qformer(**given, **WATCH)
    found = ours(**given, **WATCH)
    names = ("last_hidden_state", "pooler_output", "hidden_states", "attentions")
    # Upstream's eager `attentions` hold the cross-attentions a second time where there are any.
    own = tuple(w for w in want.attentions if w.shape[-2:] == (8, 8))
    for name in names:
        assert_same(found[name], own if name == "attentions" else want[name])
    if queries:
        assert_same(found.cross_attentions, tuple(want.cross_attentions))
    assert_same(whole.qformer(**given, return_dict=False), found.to_tuple()[:2], 0)


def test_unequal_texts_give_what_each_gives_alone(plain: Path) -> None:
    """Padded and masked, packed, alone, beside 70 others (two groups), with one thread: the same bits."""
    model = blip2c.Blip2ForImageTextRetrieval.from_pretrained(plain)
    ids, mask = rows(model.config, 70, image=False)
    together = blip2c.Blip2TextModelWithProjection.from_pretrained(plain)(ids, mask).text_embeds[:, 0].numpy()
    texts = [row[seen == 1].numpy().astype(np.int32) for row, seen in zip(ids, mask, strict=True)]
    offsets = np.cumsum([0, *map(len, texts)]).astype(np.int64)
    core, given = model._core, random_pixels(model.config, 5)
    packed = core.read_texts((np.concatenate(texts), offsets, None))["embeds"][offsets[:-1]]
    np.testing.assert_array_equal(packed, together)
    five = (np.concatenate(texts[:5]), offsets[:6], None)
    matched = core.encode_stages(given, text=five)
    np.testing.assert_array_equal(
        core.encode_stages(image_embeds=matched["vision"], text=five)["match"], matched["match"]
    )
    images = core.encode_stages(given)["embeds"]
    cosines = core.similarity(images, packed)
    np.testing.assert_allclose(cosines, np.einsum("iqp,jp->iqj", images, packed).max(axis=1), atol=1e-6)
    threads = blip2c.get_num_threads()
    try:
        blip2c.set_num_threads(1)
        for place, text in enumerate(texts[:5]):
            alone = (text, np.array([0, len(text)], np.int64), None)
            np.testing.assert_array_equal(core.read_texts(alone)["embeds"][0], packed[place])
            one = core.encode_stages(given[place : place + 1], text=alone)
            np.testing.assert_array_equal(one["match"][0], matched["match"][place])
            found = core.similarity(images[place : place + 1], packed[place : place + 1])
            assert found[0, 0] == cosines[place, place]
    finally:
        blip2c.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore")
def test_processor_and_friendly_calls(folder: Path) -> None:
    """match() gives what transformers gives for each pair alone; its processor is the one that transformers has."""
    friendly, reference = blip2c.load(folder), reference_model(folder)
    friendly.model.float()
    processor = transformers.Blip2Processor.from_pretrained(folder, backend="pil")
    pictures, texts = [picture(1), picture(2)], ["a small red circle", "two cats"]
    for options in ({}, {"text": texts, "padding": True}, {"text": texts[0]}):
        for images in (None, pictures):
            if images is None and not options:
                continue
            found, expected = friendly.processor(images, **options), processor(images, **options)
            assert found.keys() == expected.keys()
            for name in found:
                np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]))
    vectors, words = friendly.embed(pictures), friendly.embed_text(texts)
    cosines = friendly.similarity(vectors, words)
    for i, image in enumerate(pictures):
        matches = friendly.match(image, texts)
        for j, text in enumerate(texts):
            inputs = processor(images=image, text=text, return_tensors="pt")
            with torch.no_grad():
                itm = reference(**inputs, use_image_text_matching_head=True).logits_per_image.softmax(1)[0, 1]
                itc = reference(**inputs).logits_per_image[0, 0]
            assert abs(matches[j].probability - float(itm)) < 1e-4
            assert abs(matches[j].cosine - float(itc)) < 1e-4
            assert matches[j].cosine == cosines[i, j]
            assert friendly.match(image, text) == matches[j]
        np.testing.assert_array_equal(friendly.embed(image), vectors[i])
        np.testing.assert_array_equal(friendly.embed_text(texts[i]), words[i])
    assert list(friendly.match(pictures, texts)) == [friendly.match(p, t) for p, t in zip(pictures, texts, strict=True)]
    assert list(friendly.match(pictures, texts[0], batch_size=1)) == [friendly.match(p, texts[0]) for p in pictures]
    assert str(friendly.match(pictures[0], texts)).count("probability 0.") == 2


def test_quantised_saved_and_described(plain: Path, tmp_path: Path) -> None:
    model = blip2c.load(plain)
    packed = blip2c.load(blip2c.quantize(plain, tmp_path / "int8"))
    direct = blip2c.load(plain, dtype="int8", cache=False)
    assert packed.model.dtypes == {"vision": "int8", "qformer": "float16"}
    texts = ["a small red circle", "two cats"]
    assert list(packed.match(picture(), texts)) == list(direct.match(picture(), texts))
    # Which ids a trained tokenizer gives is not the same in each run; the picture is.
    cosines = (packed.embed(picture()) * model.embed(picture())).sum(axis=-1)
    assert cosines.min() > 0.98
    assert cosines.min() < 1 - 1e-7
    model.model.save_pretrained(tmp_path / "saved")
    saved = reference_model(tmp_path / "saved")
    assert_same(dict_of(saved.state_dict()), dict_of(reference_model(plain).state_dict()), 0)
    assert not (tmp_path / "saved" / "generation_config.json").exists()
    facts = cli.describe(str(plain))["model"]
    assert facts["heads"]["projection_size"] == 12
    assert facts["parameters"] == model.model.num_parameters() == sum(p.numel() for p in saved.parameters())


def dict_of(state: dict[str, Any]) -> Any:
    return tuple(state[name] for name in sorted(state))


def test_attention_maps_can_be_watched(plain: Path) -> None:
    """Of a picture read with a text: what every query and head gives to every patch, layer by layer."""
    model = blip2c.Blip2ForImageTextRetrieval.from_pretrained(plain)
    text = (np.array([2, 9, 3], np.int32), np.array([0, 3], np.int64), None)
    maps = model._core.encode_stages(random_pixels(model.config, 1), attentions=True, text=text)
    weights = maps["qformer_cross_attentions"]
    assert [w.shape for w in weights] == [(1, 2, 4, 5)] * 2  # layers 0 and 2; heads, queries, tokens of the picture
    np.testing.assert_allclose([w.sum(axis=-1) for w in weights], 1.0, atol=1e-5)


def test_bad_texts_and_masks(plain: Path) -> None:
    model, friendly = blip2c.Blip2ForImageTextRetrieval.from_pretrained(plain), blip2c.load(plain)
    given = pixels(model.config, 2)
    ids, mask = rows(model.config, 2)
    words = rows(model.config, 2, image=False)[0]
    for bad, message in (
        (ids[:, :4], "input_ids is empty"), (words, "must begin with 4 image tokens"),
        (torch.cat([ids[:, :4], torch.full((2, 3), 64)], 1), r"input_ids\[0, 0\] is 64, expected 0..63"),
        (torch.cat([ids[:, :4], torch.ones(2, 33, dtype=torch.long)], 1), "33 tokens, .* positions for 32"),
        (ids[0], "must be \\[batch, length\\]"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model(given, bad)
    hidden = mask.clone()
    hidden[0, 4:] = 0
    with pytest.raises(ValueError, match="all zeros in row 0"):
        model(given, ids, hidden)
    assert model(given, ids, hidden, use_image_text_matching_head=True).logits_per_image.isfinite().all()
    hidden[0, 0] = 0
    with pytest.raises(UnsupportedError, match="hiding image tokens"):
        model(given, ids, hidden, use_image_text_matching_head=True)
    with pytest.raises(UnsupportedError, match="token_type_ids"):
        model(given, ids, token_type_ids=torch.ones_like(ids))
    with pytest.raises(TypeError, match="no option colour"):
        model(given, ids, colour=1)
    with pytest.raises(ValueError, match="empty"):
        friendly.match(picture(), " ")
    with pytest.raises(ValueError, match="positions for 32"):
        friendly.embed_text("beach " * 40)
    with pytest.raises(TypeError, match="must be a string"):
        friendly.embed_text([3])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        friendly.match("nowhere.png", "a cat")
    found = friendly.match([picture(), "nowhere.png"], ["", "a cat"], errors="return")
    assert [type(item) for item in found] == [ValueError, FileNotFoundError]
    rest = friendly.embed(["nowhere.png", picture()], errors="return")
    assert isinstance(rest[0], FileNotFoundError)
    np.testing.assert_array_equal(rest[1], friendly.embed(picture()))


@pytest.mark.parametrize("name", ["itm_head.weight", "text_projection.bias", "embeddings.word_embeddings.weight"])
def test_a_missing_head_is_named(plain: Path, tmp_path: Path, name: str) -> None:
    random_checkpoint(tmp_path, seed=51, retrieval=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        blip2c.Blip2ForImageTextRetrieval.from_pretrained(tmp_path)
    blip2c.Blip2VisionModelWithProjection.from_pretrained(tmp_path)  # which needs none of them


def test_kinds_of_checkpoint(plain: Path, tmp_path: Path) -> None:
    """What has no text side says so; a retrieval checkpoint without architectures is known by its Q-Former."""
    random_checkpoint(tmp_path / "opt", seed=1, tokenizer=True)
    captioner = blip2c.load(tmp_path / "opt")
    states = captioner.embed([picture(1), picture(2)])
    expected = captioner.model.get_image_features(
        captioner.processor([picture(1), picture(2)], return_tensors="np")["pixel_values"]
    )
    np.testing.assert_array_equal(states, expected.qformer_outputs.last_hidden_state)
    np.testing.assert_array_equal(captioner.embed(picture(2)), states[1])
    for call in (lambda: captioner.match(picture(), "a cat"), lambda: captioner.embed_text("a cat")):
        with pytest.raises(UnsupportedError, match="retrieval checkpoint"):
            call()
    with pytest.raises(UnsupportedError, match="use_qformer_text_input"):
        blip2c.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "opt")
    with pytest.raises(UnsupportedError, match="reads no text"):
        blip2c.Blip2QFormerModel.from_pretrained(tmp_path / "opt")(np.zeros((1, 3, 16), np.float32), query_length=0)
    random_checkpoint(tmp_path / "bare", seed=51, retrieval=True, tokenizer=True)
    edit_config(tmp_path / "bare", architectures=None)
    assert isinstance(blip2c.load(tmp_path / "bare"), blip2c.Matcher)
    retrieval = blip2c.Blip2ForImageTextRetrieval.from_pretrained(plain)
    with pytest.raises(UnsupportedError, match="no language model"):
        retrieval._core.embed(np.zeros(1, np.int32))
    with pytest.raises(UnsupportedError, match="no vision encoder"):
        blip2c.Blip2TextModelWithProjection.from_pretrained(plain)._core.vision(random_pixels(retrieval.config, 1))


def test_command_line(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [str(tmp_path / f"{i}.png") for i in range(2)]
    for i, name in enumerate(names):
        picture(i).save(name)
    friendly = blip2c.load(plain)
    texts = ["a small red circle", "two cats", ""]
    assert cli.main(["match", names[0], *texts, "--model", str(plain), "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["text"] for line in lines] == texts
    for line in lines[:2]:
        assert (line["probability"], line["cosine"]) == friendly.match(names[0], line["text"])[:2]
    assert "empty" in lines[2]["error"]
    assert cli.main(["match", names[0], "two cats", "--model", str(plain)]) == 0
    assert capsys.readouterr().out == f"{friendly.match(names[0], 'two cats')}  two cats\n"
    out = tmp_path / "vectors.npz"
    assert cli.main(["embed", *names, str(tmp_path / "none.png"), "--model", str(plain), "--out", str(out)]) == 1
    assert "2 pictures, 4 vectors of 12 each" in capsys.readouterr().out
    with np.load(out) as held:
        assert held["names"].tolist() == names
        np.testing.assert_array_equal(held["embeddings"], friendly.embed(names))
    assert cli.main(["match", names[0], "a cat", "--model", "sample"]) == 2
    assert "retrieval checkpoint" in capsys.readouterr().err
    assert cli.main(["info", str(plain)]) == 0
    assert "projections to 12" in capsys.readouterr().out
