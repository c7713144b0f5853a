"""InstructBLIP against transformers: the Q-Former reading the instruction, logits, tokens, the processor, the api."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import blip2c
from blip2c import UnsupportedError
from blip2c.cli import describe
from helpers import CORPUS, prompt_ids, random_checkpoint, random_pixels, reference_model

TOLERANCE = 1e-4
VARIANTS: dict[str, dict[str, Any]] = {
    "vicuna": {"family": "llama", "tied": False},
    "flan-t5": {"family": "t5"},
    "opt, cross-attention in each layer": {"qformer": {"cross_attention_frequency": 1, "layer_norm_eps": 0.1}},
    "float16": {"family": "llama", "dtype": "float16"},
}


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same checkpoint in blip2c and in transformers (float32)."""
    folder = tmp_path_factory.mktemp("instructblip")
    variant = VARIANTS[request.param]
    random_checkpoint(folder, seed=30 + list(VARIANTS).index(request.param), instruct=True, **variant)
    return blip2c.InstructBlipForConditionalGeneration.from_pretrained(folder), reference_model(folder)


def instructions(config: Any, batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """ids [batch, 7] of unequal lengths, padded at the right, and their mask."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(1, config.qformer_config.vocab_size, (batch, 7))
    mask = (np.arange(7) < rng.integers(2, 8, (batch, 1))).astype(np.int64)
    mask[0] = 1
    return np.where(mask == 1, ids, 0), mask


def arrays(config: Any, batch: int = 3) -> dict[str, np.ndarray]:
    ids, mask = instructions(config, batch)
    text = prompt_ids(config, batch, 5)
    return {
        "pixel_values": random_pixels(config, batch), "qformer_input_ids": ids, "qformer_attention_mask": mask,
        "input_ids": text, "attention_mask": np.ones_like(text),
    }  # fmt: skip


def tensors(values: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(value) for name, value in values.items()}


def distance(found: Any, expected: Any) -> float:
    assert tuple(found.shape) == tuple(expected.shape)
    return float((torch.as_tensor(found) - expected).abs().max() / expected.abs().max())


def test_features_and_hidden_states(pair: tuple[Any, Any]) -> None:
    model, reference = pair
    inputs = {name: arrays(reference.config)[name] for name in ("pixel_values", "qformer_input_ids")}
    for mask in ({}, {"qformer_attention_mask": instructions(reference.config, 3)[1]}):
        given = {**inputs, **mask}
        found = model.get_image_features(**given, output_hidden_states=True, output_attentions=True)
        with torch.no_grad():
            expected = reference.get_image_features(**tensors(given), output_hidden_states=True, output_attentions=True)
        assert distance(found.pooler_output, expected.pooler_output) <= TOLERANCE
        ours, theirs = found.qformer_outputs, expected.qformer_outputs
        assert distance(ours.last_hidden_state, theirs.last_hidden_state) <= TOLERANCE
        assert len(ours.hidden_states) == len(theirs.hidden_states)
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            assert distance(a, b) <= TOLERANCE
        # Upstream's `attentions` hold the cross-attentions a second time, each behind its layer's.
        own = [weights for weights in theirs.attentions if weights.shape[-1] == weights.shape[-2]]
        assert len(ours.attentions) == len(own) == model.config.qformer_config.num_hidden_layers
        for a, b in zip((*ours.attentions, *ours.cross_attentions), (*own, *theirs.cross_attentions), strict=True):
            assert distance(a, b) <= TOLERANCE
    plain = model.get_image_features(**given)
    assert plain.qformer_outputs.hidden_states is None
    assert plain.hidden_states is None
    np.testing.assert_array_equal(plain.qformer_outputs.last_hidden_state, ours.last_hidden_state)


def test_texts_of_unequal_length_give_what_each_gives_alone(pair: tuple[Any, Any]) -> None:
    """Packed without pads or padded and masked, one by one or five pictures (in two groups) at once: the same bits."""
    model, _ = pair
    pixels = random_pixels(model.config, 5)
    ids, mask = instructions(model.config, 5)
    rows = [row[kept == 1].astype(np.int32) for row, kept in zip(ids, mask, strict=True)]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    together = model._core.encode(pixels, text=(np.concatenate(rows), offsets, None))
    padded = model.get_image_features(pixels, ids, mask).pooler_output
    np.testing.assert_array_equal(together, padded)
    vision = model._core.vision(pixels)
    np.testing.assert_array_equal(model._core.read(vision, (np.concatenate(rows), offsets, None)), together)
    for place, row in enumerate(rows):
        alone = (row, np.array([0, len(row)], np.int64), None)
        np.testing.assert_array_equal(model._core.encode(pixels[place : place + 1], text=alone)[0], together[place])
    assert len(np.unique(together[:, 0, 0])) == 5


def test_logits_and_loss(pair: tuple[Any, Any]) -> None:
    model, reference = pair
    inputs = arrays(reference.config)
    labels = inputs["input_ids"].copy()
    if not reference.config.use_decoder_only_language_model:
        inputs["decoder_input_ids"] = labels = inputs["input_ids"][:, -6:].copy()
    found = model(**inputs, labels=labels)
    with torch.no_grad():
        expected = reference(**tensors(inputs), labels=torch.from_numpy(labels))
    assert distance(found.logits, expected.logits) <= TOLERANCE
    assert abs(float(found.loss) - float(expected.loss)) <= 1e-4
    states = found.qformer_outputs.last_hidden_state
    assert distance(states, expected.qformer_outputs.last_hidden_state) <= TOLERANCE
    # The instruction is seen, and so is the picture.
    other = {**inputs, "qformer_input_ids": inputs["qformer_input_ids"][::-1].copy()}
    assert np.abs(model(**other).logits - found.logits).max() > 1e-2
    other = {**inputs, "pixel_values": inputs["pixel_values"][::-1].copy()}
    assert np.abs(model(**other).logits - found.logits).max() > 1e-2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "repetition_penalty": 1.5}], ids=str)
def test_tokens(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    model, reference = pair
    for leave_out in ((), ("qformer_attention_mask",), ("input_ids", "attention_mask")):
        if "input_ids" in leave_out and model.config.text_config.bos_token_id is None:
            continue
        inputs = {name: value for name, value in arrays(reference.config).items() if name not in leave_out}
        found = model.generate(**inputs, **options, max_new_tokens=12)
        expected = reference.generate(**tensors(inputs), **options, max_new_tokens=12)
        np.testing.assert_array_equal(found, expected.numpy())


def test_torch_in_torch_out_in_upstreams_order(pair: tuple[Any, Any]) -> None:
    model, reference = pair
    inputs = tensors(arrays(reference.config))
    found = model.generate(*inputs.values(), max_new_tokens=5)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, reference.generate(*inputs.values(), max_new_tokens=5))


def test_saved_weights_are_the_files(pair: tuple[Any, Any], tmp_path: Path) -> None:
    model, reference = pair
    model.save_pretrained(tmp_path)
    again = reference_model(tmp_path).state_dict()
    before = reference.state_dict()
    assert before.keys() == again.keys()
    assert all(torch.equal(before[name], again[name]) for name in before)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"qformer_input_ids": None, "qformer_attention_mask": None}, ValueError, "qformer_input_ids.*none was given"),
    ({"qformer_input_ids": None}, ValueError, "qformer_attention_mask was given without qformer_input_ids"),
    ({"qformer_input_ids": np.full((3, 7), 64)}, ValueError, r"qformer_input_ids\[0, 0\] is 64"),
    (
        {"qformer_input_ids": np.ones((2, 7), int), "qformer_attention_mask": None},
        ValueError,
        "expected 3 texts, found 2",
    ),
    ({"qformer_attention_mask": np.ones((3, 6), int)}, ValueError, r"qformer_attention_mask has shape \(3, 6\)"),
    ({"qformer_input_ids": np.ones((3, 33), int), "qformer_attention_mask": None}, ValueError, "33 tokens, .* 32"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(pair: tuple[Any, Any], change: dict[str, Any], error: type[Exception], words: str) -> None:
    model, _ = pair
    inputs = {**arrays(model.config), **change}
    for call in (model, model.generate):
        with pytest.raises(error, match=words):
            call(**inputs)


def test_each_class_refuses_the_other_s_folder_and_words(pair: tuple[Any, Any], tmp_path: Path) -> None:
    random_checkpoint(tmp_path, seed=5)
    with pytest.raises(UnsupportedError, match="'blip-2'; this class reads 'instructblip' only"):
        blip2c.InstructBlipForConditionalGeneration.from_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="'instructblip'; this class reads 'blip-2' only"):
        blip2c.Blip2ForConditionalGeneration.from_pretrained(pair[0].name_or_path)
    plain = blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    text = (np.ones(2, np.int32), np.array([0, 2], np.int64), None)
    with pytest.raises(ValueError, match="reads no text"):
        plain._core.encode(random_pixels(plain.config, 1), text=text)
    with pytest.raises(TypeError, match="qformer_input_ids"):
        plain(random_pixels(plain.config, 1), prompt_ids(plain.config, 1, 3), qformer_input_ids=np.ones((1, 2), int))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(
        tmp_path_factory.mktemp("vicuna"), seed=37, instruct=True, tokenizer=True, family="llama", tied=False
    )


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 50, 3)).astype(np.uint8))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [{"padding": True}, {"padding": "max_length", "max_length": 30, "truncation": True}, {"add_special_tokens": False}],
    ids=str,
)
def test_processor(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    ours = blip2c.InstructBlipProcessor.from_pretrained(folder)
    theirs = transformers.InstructBlipProcessor.from_pretrained(folder, backend="pil")
    texts = CORPUS[:3] if "padding" in options else CORPUS[:1]
    for given in ({"images": picture(), "text": texts}, {"text": texts}, {"images": picture()}):
        found, expected = ours(**given, **options), theirs(**given, **options)
        assert found.keys() == expected.keys()
        for name in found:
            np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(expected[name]))
    assert set(ours.model_input_names) == set(theirs.model_input_names)
    ours.save_pretrained(tmp_path)
    again = transformers.InstructBlipProcessor.from_pretrained(tmp_path, backend="pil")
    assert again(text=texts, **options) == theirs(text=texts, **options)
    assert isinstance(blip2c.AutoProcessor.from_pretrained(tmp_path), blip2c.InstructBlipProcessor)


@pytest.mark.filterwarnings("ignore")
def test_friendly_calls_read_the_question_twice(folder: Path) -> None:
    """caption() and ask() give what transformers gives for one question on one picture, whatever is asked beside it."""
    friendly = blip2c.load(folder)
    processor = transformers.InstructBlipProcessor.from_pretrained(folder, backend="pil")
    reference = reference_model(folder)
    questions, pictures = ["what colour is the circle?", "how many cats are there?"], [picture(1), picture(2)]
    found = [friendly.ask(image, questions, template="{}", max_new_tokens=8) for image in pictures]
    captions = friendly.caption(pictures, "a photo of", max_new_tokens=8)
    rows = [(image, question) for image in pictures for question in questions]
    rows += [(image, "a photo of") for image in pictures]
    flat = [answer for answers in found for answer in answers] + list(captions)
    for (image, question), answer in zip(rows, flat, strict=True):
        inputs = processor(images=image, text=question, return_tensors="pt")
        expected = reference.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        assert answer.ids == expected[: len(answer.ids)].tolist()
    assert len({tuple(answer.ids) for answer in flat}) >= 5


@pytest.mark.filterwarnings("ignore")
def test_quantised_copies_and_info(folder: Path, tmp_path: Path) -> None:
    """blip2c.quantize() keeps the kind of model and the second tokenizer; `blip2c info` describes it."""
    packed = blip2c.load(blip2c.quantize(folder, tmp_path / "int8"))
    assert isinstance(packed.model, blip2c.InstructBlipForConditionalGeneration)
    direct = blip2c.load(folder, dtype="int8", cache=False)
    answers = [friendly.ask(picture(1), "what is this?", max_new_tokens=8).ids for friendly in (packed, direct)]
    assert answers[0] == answers[1]
    facts = describe(str(folder))["model"]
    assert facts["text"]["model_type"] == "llama"
    assert facts["qformer"]["text_side"] == "beside"
    assert "inv_freq" not in facts["text"]
