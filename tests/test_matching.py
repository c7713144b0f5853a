"""Many texts with one picture, the Q-Former's three masks, search among pictures, and where the Q-Former looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import blip2c
from blip2c import UnsupportedError
from helpers import random_checkpoint, random_pixels, reference_model

TEXTS = ["a small red circle", "two cats", "a dog on the beach", "there is a woman"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("matching"), seed=70, retrieval=True, tokenizer=True)


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return blip2c.load(folder)


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3), dtype=np.uint8))


def packed(rng: np.random.Generator, count: int, vocabulary: int) -> Any:
    rows = [rng.integers(1, vocabulary, rng.integers(1, 9)).astype(np.int32) for _ in range(count)]
    return np.concatenate(rows), np.cumsum([0, *map(len, rows)]).astype(np.int64), None


# -- many texts with few pictures ---------------------------------------------------------------------------------


def test_texts_that_share_a_picture_get_what_each_gets_alone(model: Any) -> None:
    """Over several groups of texts and of pictures, one of which has no text: the bits of one pair at a time."""
    core, rng = model.model._core, np.random.default_rng(0)
    pictures = core.encode_stages(random_pixels(model.model.config, 9))["vision"]
    picture_of = np.sort(rng.choice([0, 1, 2, 3, 5, 6, 7, 8], 200)).astype(np.int32)
    picture_of[20:100] = 1
    picture_of.sort()
    text = packed(rng, 200, 64)
    found = core.match(pictures, text, picture_of)
    one_by_one = core.encode_stages(image_embeds=pictures[picture_of], text=text)["match"]
    np.testing.assert_array_equal(found, one_by_one)
    assert len(np.unique(found)) > 300


def test_long_texts_go_through_in_smaller_groups(tmp_path: Path) -> None:
    """Which bounds memory and changes no bit."""
    folder = random_checkpoint(tmp_path, seed=72, retrieval=True, qformer={"max_position_embeddings": 512})
    core = blip2c.Blip2ForImageTextRetrieval.from_pretrained(folder)._core
    rng = np.random.default_rng(4)
    rows = [rng.integers(1, 64, length).astype(np.int32) for length in [512, *rng.integers(1, 300, 39)]]
    text = np.concatenate(rows), np.cumsum([0, *map(len, rows)]).astype(np.int64), None
    picture = rng.normal(size=(1, 5, 24)).astype(np.float32)
    found, read = core.match(picture, text, np.zeros(40, np.int32)), core.read_texts(text)["embeds"]
    for place in (0, 1, 11, 12, 39):
        alone = rows[place], np.array([0, len(rows[place])], np.int64), None
        np.testing.assert_array_equal(core.match(picture, alone, np.zeros(1, np.int32))[0], found[place])
        start = text[1][place]
        np.testing.assert_array_equal(core.read_texts(alone)["embeds"], read[start : start + len(rows[place])])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [([1, 0], "picture_of\\[1\\] is 0"), ([0, 2], "picture_of\\[1\\] is 2"), ([-1, 0], "picture_of\\[0\\] is -1")],
)
def test_pairs_that_do_not_fit(model: Any, numbers: list[int], message: str) -> None:
    core, text = model.model._core, packed(np.random.default_rng(0), 2, 64)
    pictures = core.encode_stages(random_pixels(model.model.config, 2))["vision"]
    with pytest.raises(IndexError, match=message):
        core.match(pictures, text, np.array(numbers, np.int32))
    with pytest.raises(ValueError, match="width of 24"):
        core.match(pictures[:, :, :-1].copy(), text, np.zeros(2, np.int32))
    with pytest.raises(ValueError, match="text"):
        core.match(pictures, text, np.zeros(3, np.int32))


def test_a_text_model_matches_nothing(folder: Path) -> None:
    text_model = blip2c.Blip2TextModelWithProjection.from_pretrained(folder)
    with pytest.raises(UnsupportedError, match="itm_head"):
        text_model._core.match(
            np.zeros((1, 5, 24), np.float32), packed(np.random.default_rng(0), 1, 64), np.zeros(1, np.int32)
        )


def test_batches_and_order_change_nothing(model: Any) -> None:
    """Pairs in any order, with errors between them, whatever the batch."""
    pictures = [picture(0), b"no picture", picture(1), picture(2)]
    pairs = [(2, TEXTS[0]), (0, TEXTS[1]), (1, TEXTS[1]), (2, " "), (0, TEXTS[1]), (3, TEXTS[2]), (2, TEXTS[3])] * 12
    whole = list(model.stream_matches(pictures, pairs, 8))
    for (index, text), found in zip(pairs, whole, strict=True):
        if index == 1 or not text.strip():
            assert isinstance(found, ValueError)
        else:
            assert found == model.match(pictures[index], text)
    assert [str(x) for x in model.stream_matches(pictures, pairs, 1)] == [str(x) for x in whole]
    for found, logits in zip(whole, model.stream_logits(pictures, pairs, 2), strict=True):
        assert isinstance(found, Exception) == isinstance(logits, Exception)
        assert isinstance(found, Exception) or found.logit == float(logits[1])


# -- masks --------------------------------------------------------------------------------------------------------


def seen_by(kind: str, queries: int, text: int) -> torch.Tensor:
    """[Q + T, Q + T] of 0 and -inf, as the paper's figure 2 draws them."""
    sees = torch.ones(queries + text, queries + text, dtype=torch.bool)
    if kind != "all":
        sees[:queries, queries:] = False
    if kind == "before":
        sees[queries:, queries:] = torch.ones(text, text).tril().bool()
    if kind == "own":
        sees[queries:, :queries] = False
    return torch.where(sees, 0.0, float("-inf"))


@pytest.mark.parametrize("kind", ["all", "before", "own"])
@pytest.mark.parametrize("padded", [False, True])
def test_the_three_masks(folder: Path, model: Any, kind: str, padded: bool) -> None:
    """ITM, ITG and ITC against transformers with the same mask."""
    theirs, generator = reference_model(folder).qformer, torch.Generator().manual_seed(1)
    queries, text = torch.randn(2, 4, 16, generator=generator), torch.randn(2, 6, 16, generator=generator)
    image = torch.randn(2, 5, 24, generator=generator)
    shown = torch.ones(2, 6, dtype=torch.uint8)
    if padded:
        shown[1, 4:] = 0
    mask = seen_by(kind, 4, 6).expand(2, 1, -1, -1).clone()
    mask[..., 4:].masked_fill_(shown[:, None, None] == 0, float("-inf"))
    with torch.no_grad():
        want = theirs(torch.cat([queries, text], 1), 4, mask, image, output_attentions=True)
    found = model.model._core.run_qformer(
        queries.numpy(),
        text.numpy(),
        None,
        shown.numpy(),
        image.numpy(),
        attentions=True,
        hidden_states=True,
        sees=kind,
    )
    np.testing.assert_allclose(found["qformer"], want.last_hidden_state[:, :4], atol=1e-4)
    seen = shown.bool().numpy()
    np.testing.assert_allclose(found["text"][seen], want.last_hidden_state[:, 4:].numpy()[seen], atol=1e-4)
    own = [w.numpy() for w in want.attentions if w.shape[-2:] == (10, 10)]
    keys = {"all": (10, slice(0, 10)), "before": (4, slice(0, 10)), "own": (4, slice(4, 10))}[kind]
    for ours, text_weights, weights in zip(
        found["qformer_attentions"], found["qformer_text_attentions"], own, strict=True
    ):
        np.testing.assert_allclose(ours, weights[:, :, :4, : keys[0]], atol=1e-5)
        np.testing.assert_allclose(text_weights, weights[:, :, 4:, keys[1]], atol=1e-5)


def test_what_is_not_seen_changes_no_bit(model: Any) -> None:
    core, rng = model.model._core, np.random.default_rng(2)
    queries, text, image = (rng.normal(size=s).astype(np.float32) for s in ((2, 4, 16), (2, 6, 16), (2, 5, 24)))
    alone = core.run_qformer(queries, image_embeds=image)["qformer"]
    before = core.run_qformer(queries, text, image_embeds=image, sees="before")
    own = core.run_qformer(queries, text, image_embeds=image, sees="own")
    np.testing.assert_array_equal(before["qformer"], alone)
    np.testing.assert_array_equal(own["qformer"], alone)
    np.testing.assert_array_equal(own["text"], core.run_qformer(queries[:, :0], text)["text"])
    shorter = core.run_qformer(queries, text[:, :4].copy(), image_embeds=image, sees="before")
    np.testing.assert_array_equal(before["text"][:, :4], shorter["text"])
    assert not np.array_equal(before["text"][:, 4:], own["text"][:, 4:])
    with pytest.raises(ValueError, match="expected all, before or own, found behind"):
        core.run_qformer(queries, text, image_embeds=image, sees="behind")


# -- search -------------------------------------------------------------------------------------------------------


def test_search_among_pictures_and_in_an_index(model: Any, tmp_path: Path) -> None:
    pictures = [picture(i) for i in range(7)]
    paths = [tmp_path / "pictures" / f"{i}.png" for i in range(7)]
    paths[0].parent.mkdir()
    for path, image in zip(paths, pictures, strict=True):
        image.save(path)
    index = blip2c.Index.create(tmp_path / "index", model)
    index.add(paths[0].parent)
    hits = model.search(TEXTS[0], pictures, k=3)
    cosines = [model.match(image, TEXTS[0]).cosine for image in pictures]
    assert [hit.entry for hit in hits] == np.argsort(-np.array(cosines), kind="stable")[:3].tolist()
    assert [hit.cosine for hit in hits] == sorted(cosines, reverse=True)[:3]
    assert hits.query == TEXTS[0]
    # The same among files of a folder, and, with vectors rounded to float16, in an index.
    assert [hit.path for hit in model.search(TEXTS[0], paths[0].parent, k=3)] == [str(paths[h.entry]) for h in hits]
    for place in (index, tmp_path / "index", str(tmp_path / "index")):
        assert model.search(TEXTS, place, k=3, rerank=5) == index.search(TEXTS, k=3, rerank=5)
    again = model.search(TEXTS, pictures, k=3, rerank=5)
    for ours, theirs in zip(again, index.search(TEXTS, k=3, rerank=5), strict=True):
        assert [hit.entry for hit in ours] == [hit.entry for hit in theirs]
        np.testing.assert_allclose([h.score for h in ours], [h.score for h in theirs], atol=1e-3)
    alike = model.search(pictures[4], pictures, k=2)
    assert alike[0].entry == 4
    assert alike[0].cosine == pytest.approx(1, abs=1e-5)
    assert model.search(paths[4], index, k=2)[0].path == str(paths[4])


def test_searches_that_can_not_be(model: Any, tmp_path: Path) -> None:
    for options, message in (({"k": 0}, "k must"), ({"rerank": True}, "rerank must")):
        with pytest.raises(ValueError, match=message):
            model.search(TEXTS[0], [picture(0)], **options)
    with pytest.raises(ValueError, match="rerank"):
        model.search(picture(0), [picture(1)], rerank=3)
    with pytest.raises(ValueError, match="empty"):
        model.search("", [picture(1)])
    with pytest.raises(ValueError, match="nothing to do"):
        model.search(TEXTS[0], [])
    with pytest.raises(ValueError, match="not a picture"):
        model.search(TEXTS[0], [picture(0), b"no picture"])
    with pytest.raises(UnsupportedError, match="retrieval checkpoint"):
        blip2c.load().search("a crab", [picture(0)])


# -- where the Q-Former looks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [None, TEXTS[2]])
def test_attention_maps_are_the_cross_attentions(folder: Path, model: Any, text: str | None) -> None:
    reference, image = reference_model(folder), picture(3)
    maps = model.attention_maps(image, text)
    inputs = model.processor(images=image, return_tensors="pt")
    with torch.no_grad():
        vision = reference.vision_model(inputs["pixel_values"]).last_hidden_state
        embeds, count = reference.query_tokens, reference.config.num_query_tokens
        if text is not None:
            ids = torch.tensor([model.token_ids(text)])
            embeds = torch.cat([embeds, reference.embeddings(ids)], 1)
        want = reference.qformer(embeds, count, None, vision, output_attentions=True).cross_attentions
    assert maps.weights.shape == (2, 2, 4, 5)
    assert repr(maps) == "AttentionMaps(layers 0, 2: 2 heads, 4 queries, 2 x 2 patches)"
    assert (maps.layers, maps.grid, maps.picture.size) == ((0, 2), (2, 2), image.size)
    np.testing.assert_allclose(maps.weights, torch.cat(want).numpy(), atol=1e-5)
    np.testing.assert_array_equal(maps.patches(0)[1, 3].reshape(-1), maps.weights[0, 1, 3, 1:])
    np.testing.assert_array_equal(maps.patches(head=1, query=2), maps.patches()[1, 2])
    np.testing.assert_allclose(maps.heat(1), maps.weights[1, :, :, 1:].mean((0, 1)).reshape(2, 2), rtol=1e-6)
    for wrong in ({"layer": 2}, {"head": -3}, {"query": 4}):
        with pytest.raises(IndexError, match=f"{next(iter(wrong))} "):
            maps.patches(**wrong)


def test_a_plot_is_red_where_the_weight_is(model: Any) -> None:
    maps = model.attention_maps(Image.new("RGB", (600, 300), (128, 128, 128)))
    bright = np.zeros_like(maps.weights)
    bright[1, 0, 2, 2] = 1.0  # the patch in the upper right
    image = blip2c.AttentionMaps(bright, maps.layers, maps.grid, maps.picture).plot(1, 0, 2)
    assert (image.mode, image.size) == ("RGB", (600, 300))
    red, _, blue = image.getpixel((560, 40))
    assert red > blue + 50
    red, _, blue = image.getpixel((40, 260))
    assert blue > red + 50
    assert maps.plot().size == (600, 300)
    flat = blip2c.AttentionMaps(np.full_like(bright, 0.2), maps.layers, maps.grid, picture(0)).plot()
    assert flat.size == (480, 384)
    assert np.isfinite(np.asarray(flat)).all()


def test_a_captioner_looks_too(tmp_path: Path) -> None:
    captioner = blip2c.load()
    maps = captioner.attention_maps(picture(1))
    np.testing.assert_allclose(maps.weights.sum(-1), 1, atol=1e-5)
    with pytest.raises(UnsupportedError, match="reads no text"):
        captioner.attention_maps(picture(1), "a crab")
    instruct = blip2c.load(random_checkpoint(tmp_path, seed=71, instruct=True, tokenizer=True))
    one, other = (instruct.attention_maps(picture(1), text).weights for text in TEXTS[:2])
    assert one.shape == other.shape == (2, 2, 4, 5)
    # What a text says reaches the queries' second look.
    assert np.abs(one[1] - other[1]).max() > 1e-4
