"""InstructBLIP and pictures that are kept: what lies on the device stays there from the pixels to the words."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blip2c
from blip2c import Captioner, DeviceArray
from cuda_callers import DEVICE_TO_HOST, HOST_TO_DEVICE, CallerArray, Taken, copied
from helpers import prompt_ids, random_checkpoint, reference_model
from test_instructblip import arrays, distance, tensors

F32 = np.float32
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"text": {"eos_token_id": 300}, "num_query_tokens": 15},
    "instructblip": {
        "instruct": True,
        "family": "llama",
        "tied": False,
        "text": {"eos_token_id": 300},
        "qformer": {"max_position_embeddings": 160},
        "vision": {"image_size": 56},
    },
}
QUESTIONS = ["how many cats are there?", "what colour is it?", "why?"]


def images(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, 40, 50, 3)).astype(np.uint8))


# ---- InstructBLIP ----


@pytest.fixture(scope="module", params=["llama", "t5"])
def instruct(request: pytest.FixtureRequest, cuda: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A checkpoint's models on the device, on the processor and in transformers."""
    tied = request.param == "t5"
    folder = random_checkpoint(
        tmp_path_factory.mktemp("instruct"), seed=31, instruct=True, family=request.param, tied=tied
    )
    load = blip2c.InstructBlipForConditionalGeneration.from_pretrained
    return load(folder, device=cuda), load(folder), reference_model(folder)


def placed(inputs: dict[str, np.ndarray]) -> dict[str, CallerArray]:
    return {name: CallerArray(value) for name, value in inputs.items()}


def test_everything_on_the_device_against_transformers(instruct: tuple[Any, Any, Any]) -> None:
    """Pixels, ids and masks lie there; logits, features and hidden states come out there."""
    there, here, reference = instruct
    inputs = arrays(reference.config)
    if not reference.config.use_decoder_only_language_model:
        inputs["decoder_input_ids"] = inputs["input_ids"][:, -4:].copy()
    given = placed(inputs)
    found = there(**given, output_hidden_states=True)
    assert given["pixel_values"].deleted == 1
    with torch.no_grad():
        expected = reference(**tensors(inputs), output_hidden_states=True)
    assert isinstance(found.logits, DeviceArray)
    states = found.qformer_outputs.last_hidden_state
    assert isinstance(states, DeviceArray)
    assert distance(found.logits.numpy(), expected.logits) <= 1e-3
    assert distance(states.numpy(), expected.qformer_outputs.last_hidden_state) <= 1e-3
    want = here(**inputs)
    assert distance(found.logits.numpy(), torch.from_numpy(want.logits)) <= 1e-3
    assert np.array_equal(found.logits.numpy(), there(**inputs).logits)
    beams = 1 if "decoder_input_ids" in inputs else 3
    inputs.pop("decoder_input_ids", None)
    tokens = reference.generate(**tensors(inputs), num_beams=beams, max_new_tokens=5).numpy()
    assert np.array_equal(there.generate(**placed(inputs), num_beams=beams, max_new_tokens=5), tokens)


def test_features_on_the_device(instruct: tuple[Any, Any, Any]) -> None:
    there, _, reference = instruct
    names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
    inputs = {name: arrays(reference.config)[name] for name in names}
    found = there.get_image_features(**placed(inputs))
    assert isinstance(found.pooler_output, DeviceArray)
    with torch.no_grad():
        expected = reference.get_image_features(**tensors(inputs)).pooler_output
    assert distance(found.pooler_output.numpy(), expected) <= 1e-3
    # What came out goes in again, and so do embeddings.
    text = prompt_ids(reference.config, 3, 5)
    want = there.generate(**inputs, input_ids=text, max_new_tokens=4)
    assert np.array_equal(
        there.generate(input_ids=CallerArray(text), mm_encoder_outputs={"image": found}, max_new_tokens=4), want
    )


def test_wrong_devices_and_types_are_named(instruct: tuple[Any, Any, Any]) -> None:
    there, _, reference = instruct
    inputs = arrays(reference.config)
    with pytest.raises(ValueError, match="pixel_values: lies on cuda:1, expected cuda:0"):
        there(**{**inputs, "pixel_values": CallerArray(inputs["pixel_values"], device=1)})
    with pytest.raises(TypeError, match="qformer_input_ids must be integers, found float32"):
        there(**{**inputs, "qformer_input_ids": CallerArray(inputs["qformer_input_ids"].astype(F32))})
    with pytest.raises(ValueError, match="qformer_attention_mask has shape"):
        there(**{**inputs, "qformer_attention_mask": CallerArray(inputs["qformer_attention_mask"][:, :3])})


# ---- pictures that are kept ----


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("states"), 71, tokenizer=True, **FAMILIES[request.param])


def answers(model: Captioner, picture: Any) -> list[list[int]]:
    return [answer.ids for answer in model.ask(picture, QUESTIONS, max_new_tokens=4)]


def test_states_stay_on_the_device(folder: Path, cuda: str) -> None:
    """Neither what was made of a picture nor what the language model reads of it goes through the host."""
    here, there = blip2c.load(folder), blip2c.load(folder, device=cuda)
    pictures = images(3)
    want = [answers(here, picture) for picture in pictures]
    for _ in range(3):  # what is made once
        there.encode(pictures)
    pixels = sum(there.prompts.pixels(picture).nbytes for picture in pictures)
    went, came = copied(HOST_TO_DEVICE), copied(DEVICE_TO_HOST)
    states = there.encode(pictures)
    bytes_of_one = 4 * states[0].encoded.size
    assert all(isinstance(state.encoded, DeviceArray) for state in states)
    assert copied(HOST_TO_DEVICE) - went < pixels + bytes_of_one / 2
    assert copied(DEVICE_TO_HOST) - came < bytes_of_one / 2
    assert [answers(there, state) for state in states] == want
    for state, picture in zip(states, pictures, strict=True):
        assert np.abs(state.embeds - here.encode(picture).embeds).max() <= 1e-3 * np.abs(state.embeds).max()
    on_host = blip2c.State(there.prompts, states[0].embeds.copy(), "as it was")
    assert asked_bytes(there, on_host) - asked_bytes(there, there.encode(pictures[0])) >= bytes_of_one


def asked_bytes(model: Captioner, state: Any) -> int:
    """What goes to the device for questions about a new state."""
    went = copied(HOST_TO_DEVICE)
    answers(model, state)
    return copied(HOST_TO_DEVICE) - went


def test_captions_copy_no_states(folder: Path, cuda: str) -> None:
    """The same bits as through the host, in every row of a batch."""
    there = blip2c.load(folder, device=cuda)
    pictures = images(4)
    core, words = there.model._core, there.prompts
    pixels = np.concatenate([words.pixels(picture) for picture in pictures])
    through = core.vision(pixels) if words.words_tokenizer is not None else core.encode(pixels)
    states = there.encode(pictures)
    for state, row in zip(states, through, strict=True):
        assert np.array_equal(state.embeds, row)
        went, came = copied(HOST_TO_DEVICE), copied(DEVICE_TO_HOST)
        features = words.features(state.encoded, "why?")
        assert copied(HOST_TO_DEVICE) - went < 4 * state.encoded.size / 2
        assert copied(DEVICE_TO_HOST) - came <= 64  # a note of NaN
        assert isinstance(features, DeviceArray)
        assert np.array_equal(features.numpy(), np.asarray(words.features(row, "why?")))
    want = [caption.ids for caption in there.caption(states, max_new_tokens=4)]
    assert [caption.ids for caption in there.caption(pictures, max_new_tokens=4)] == want


def test_states_have_memory_of_their_own_and_are_pickled(folder: Path, cuda: str) -> None:
    there = blip2c.load(folder, device=cuda)
    states = there.encode(images(4))
    taken = [Taken(state.encoded) for state in states]
    places = sorted(one.tensor.data for one in taken)
    assert states[0].encoded.size * 4 % 256 != 0
    assert all((b - a) % 256 == 0 for a, b in pairwise(places))
    for one in taken:
        one.drop()
    again = pickle.loads(pickle.dumps(states[2]))
    assert isinstance(again.encoded, np.ndarray)
    assert np.array_equal(again.embeds, states[2].embeds)
    assert answers(there, again) == answers(there, states[2])


def test_a_state_goes_with_its_model(folder: Path, cuda: str) -> None:
    """Made on one device, it is asked about on another and on the processor; so is a conversation."""
    model = blip2c.load(folder, device=cuda)
    picture = images(1)[0]
    state = model.encode(picture)
    want = answers(model, state)
    chat = model.chat(state, max_new_tokens=4)
    said = [chat.ask(question).ids for question in QUESTIONS]
    again = model.chat(state, max_new_tokens=4)
    for place, question in zip(("cuda:1", "cpu", "cuda:0"), QUESTIONS, strict=True):
        model.model.to(place)
        assert answers(model, state) == want
        assert again.ask(question).ids == said[QUESTIONS.index(question)]
