"""The LLaMA family against transformers: hidden states, logits and exact tokens over the configs that it comes in."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import blip2c
from blip2c import CheckpointError, UnsupportedError
from blip2c.config import Blip2Config, core_config
from blip2c.rope import rope, standard_parameters
from helpers import prompt_ids, random_checkpoint, random_config, random_pixels, reference_model

LOGITS_TOLERANCE, HIDDEN_TOLERANCE = 1e-4, 5e-5
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32, "rope_theta": 500000.0}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
LONG = {"rope_type": "longrope", "short_factor": [1.0, 1.1, 1.3, 1.7, 2.2], "long_factor": [2.0, 3.0, 5.0, 7.0, 9.0]}
VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama", "tied": False},
    "vicuna": {"family": "llama", "tied": False, "text": {"vocab_size": 64, "pad_token_id": 0, "pretraining_tp": 1}},
    "tied, one key head": {"family": "llama", "text": {"num_key_value_heads": 1}},
    "wide heads, biases": {
        "family": "llama",
        "text": {
            "num_attention_heads": 4, "head_dim": 14, "attention_bias": True, "mlp_bias": True, "hidden_act": "gelu",
            "rms_norm_eps": 0.1,
        },
    },
    "linear": {"family": "llama", "text": {"rope_scaling": {"type": "linear", "factor": 3.0}, "rope_theta": 500.0}},
    "llama3": {"family": "llama", "tied": False, "text": {"rope_parameters": LLAMA3, "head_dim": 16}},
    "yarn": {"family": "llama", "text": {"rope_parameters": YARN, "head_dim": 16}},
    "dynamic": {
        "family": "llama",
        "text": {"rope_scaling": {"rope_type": "dynamic", "factor": 3.0}, "max_position_embeddings": 32},
    },
    "longrope": {"family": "llama", "text": {"rope_scaling": {**LONG, "original_max_position_embeddings": 32}}},
    "mistral": {"family": "mistral", "tied": False},
    "mistral without a window": {"family": "mistral", "text": {"sliding_window": None, "head_dim": 6}},
    "qwen2": {"family": "qwen2"},
    "qwen3": {"family": "qwen3", "tied": False, "text": {"attention_bias": True}},
    "float16": {"family": "llama", "dtype": "float16", "tied": False},
    "runs beyond its positions": {"family": "llama", "text": {"max_position_embeddings": 8}},
}  # fmt: skip


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same checkpoint in blip2c and in transformers (float32)."""
    folder = tmp_path_factory.mktemp("llama")
    random_checkpoint(folder, seed=60 + list(VARIANTS).index(request.param), **VARIANTS[request.param])
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder), reference_model(folder)


def prompts(config: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """pixels [3, ...], ids [3, T] longer than the windows, and a mask with pads between, inside and at the end."""
    pixels, ids = random_pixels(config, 3), prompt_ids(config, 3, 9)
    mask = np.ones_like(ids)
    queries = config.num_query_tokens
    mask[0, queries : queries + 3] = 0
    mask[1, queries + 2] = 0
    mask[2, -2:] = 0
    return pixels, ids, mask


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_logits_and_hidden_states(pair: tuple[Any, Any], masked: bool) -> None:
    model, reference = pair
    pixels, ids, mask = prompts(reference.config)
    tensors = {"pixel_values": torch.from_numpy(pixels), "input_ids": torch.from_numpy(ids)}
    if masked:
        tensors["attention_mask"] = torch.from_numpy(mask)
    with torch.no_grad():
        expected = reference(**tensors, output_hidden_states=True)
        # A norm of small features makes some of these models ill-conditioned: upstream's own error is the measure.
        exact = reference_model(model.name_or_path, torch.float64)(
            **{**tensors, "pixel_values": tensors["pixel_values"].double()}
        ).logits
    allowed = max(LOGITS_TOLERANCE, 4.0 * float((expected.logits - exact).abs().max()))
    flat = np.where(ids == reference.config.image_token_index, -1, ids).astype(np.int32).reshape(-1)
    offsets = np.arange(4, dtype=np.int64) * ids.shape[1]
    kept = mask.astype(np.uint8).reshape(-1) if masked else None
    found = model._core.forward(model._core.encode(pixels), flat, offsets, kept, hidden_states=True)
    assert np.abs(found["logits"] - exact.flatten(0, 1).numpy()).max() <= allowed
    states = expected.language_model_outputs.hidden_states
    assert len(found["hidden_states"]) == len(states)
    for ours, theirs in zip(found["hidden_states"][:-1], states[:-1], strict=True):
        scale = theirs.abs().max()
        assert np.abs(ours - theirs.flatten(0, 1).numpy()).max() <= HIDDEN_TOLERANCE * scale


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("beams", [1, 4])
def test_tokens(pair: tuple[Any, Any], beams: int) -> None:
    model, reference = pair
    pixels, ids, mask = prompts(reference.config)
    for options in ({}, {"attention_mask": mask}):
        tensors = {name: torch.from_numpy(value) for name, value in options.items()}
        lengths = {"num_beams": beams, "max_new_tokens": 14}
        found = model.generate(pixels, ids, **options, **lengths)
        expected = reference.generate(torch.from_numpy(pixels), torch.from_numpy(ids), **tensors, **lengths)
        np.testing.assert_array_equal(found, expected.numpy())
    other = model.generate(random_pixels(reference.config, 3, seed=9), ids, num_beams=beams, max_new_tokens=14)
    assert other.shape != found.shape or (other != found).any()


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_hold_for_so_many_tokens(kind: str, tmp_path: Path) -> None:
    """Beyond them upstream turns everything by other frequencies: refused, pads counted as there."""
    random_checkpoint(tmp_path, seed=3, **VARIANTS[kind])
    model, reference = blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path), reference_model(tmp_path)
    pixels, ids = random_pixels(model.config, 1), prompt_ids(model.config, 1, 32)
    whole, within = ids[:, :32], ids[:, :27]
    with torch.no_grad():
        expected = reference(pixel_values=torch.from_numpy(pixels), input_ids=torch.from_numpy(whole)).logits
        again = reference.generate(torch.from_numpy(pixels), torch.from_numpy(within), max_new_tokens=6)
    assert np.abs(model(pixels, whole).logits - expected.numpy()).max() < 1e-4
    assert model.generate(pixels, within, max_new_tokens=6).tolist() == again.tolist()
    mask = np.ones_like(ids)
    mask[0, -5:] = 0
    for call in (lambda: model(pixels, ids), lambda: model(pixels, ids, mask)):
        with pytest.raises(ValueError, match=r"row 0: 37 tokens .* the model has 32 positions"):
            call()
    with pytest.raises(ValueError, match=r"27 tokens .* and up to 7 new ones, but the model has 32 positions"):
        model.generate(pixels, within, max_new_tokens=7)


def test_a_window_hides_what_lies_before_it(pair: tuple[Any, Any]) -> None:
    """The last token's logits change with the first text token only where some layer sees that far."""
    model, reference = pair
    pixels, ids, _ = prompts(reference.config)
    queries, layers = reference.config.num_query_tokens, reference.config.text_config.num_hidden_layers
    text = model._core_config["text"]
    reach = layers * (text["sliding_window"] - 1) if all(text["slides"]) else ids.shape[1]
    before = model(pixels, ids).logits[:, -1]
    for place in range(queries, ids.shape[1] - 1):
        changed = ids.copy()
        changed[:, place] = (ids[:, place] - 3) % 7 + 4
        same = (model(pixels, changed).logits[:, -1] == before).all()
        assert same == (ids.shape[1] - 1 - place > reach), place


def test_saved_weights_are_the_files(tmp_path: Path) -> None:
    random_checkpoint(tmp_path / "a", seed=90, family="qwen3", tied=False, text={"attention_bias": True})
    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    before, after = reference_model(tmp_path / "a").state_dict(), reference_model(tmp_path / "b").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.num_parameters() == sum(p.numel() for p in reference_model(tmp_path / "a").parameters())


ROPES: list[dict[str, Any]] = [
    {},
    {"rope_theta": 1e6},
    {"rope_scaling": {"type": "linear", "factor": 2.5}},
    {"rope_parameters": {**LLAMA3}},
    {"rope_parameters": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 2, "high_freq_factor": 5}},
    {"rope_parameters": {**YARN, "rope_theta": 1e4}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "attention_factor": 0.8, "beta_fast": 16, "beta_slow": 2}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_theta": 1e5},
    {"rope_scaling": {**LONG, "original_max_position_embeddings": 40}},
    {"rope_scaling": {**LONG, "attention_factor": 1.7}, "rope_theta": 1e5},
]


@pytest.mark.parametrize("head_dim", [10, 64, 128])
@pytest.mark.parametrize("values", ROPES, ids=range(len(ROPES)))
def test_frequencies_are_transformers(values: dict[str, Any], head_dim: int) -> None:
    """To the last bits: the rounding of torch's own powers, and what is made of them."""
    sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "max_position_embeddings": 160}
    values = copy.deepcopy(values)
    if values.get("rope_scaling", {}).get("rope_type") == "longrope":
        for name in ("short_factor", "long_factor"):  # one for each pair
            values["rope_scaling"][name] = (values["rope_scaling"][name] * head_dim)[: head_dim // 2]
    config = transformers.LlamaConfig(**sizes, **copy.deepcopy(values))
    expected = LlamaRotaryEmbedding(config)
    parameters = standard_parameters(values, 160)
    assert parameters == dict(config.rope_parameters)
    found = rope(parameters, head_dim, 160)
    assert found.scaling == expected.attention_scaling
    np.testing.assert_allclose(found.frequencies, expected.inv_freq.numpy(), rtol=3e-7, atol=0)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"rope_scaling": {"rope_type": "dynamic"}}, CheckpointError, "rope_parameters.factor must be a number"),
    ({"rope_scaling": {"rope_type": "longrope"}}, CheckpointError, "short_factor must be a list of 5 numbers"),
    ({"rope_scaling": {**LONG, "long_factor": [1.0, 0, 2, 3, 4]}}, CheckpointError, "long_factor must be a list of 5"),
    ({"rope_scaling": {"rope_type": "proportional"}}, UnsupportedError, "rope_type 'proportional' .* known: default"),
    ({"rope_scaling": {"rope_type": "linear"}}, CheckpointError, "rope_parameters.factor must be a number"),
    ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, CheckpointError, "factor .* found -1"),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": "x"}}, CheckpointError, "rope_theta .* found 'x'"),
    ({"rope_scaling": "linear"}, CheckpointError, "rope_parameters must be an object, found 'linear'"),
    ({"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor 0.5"),
    ({"num_key_value_heads": 3, "num_attention_heads": 4}, CheckpointError, "4 is not a multiple .* 3"),
    ({"num_key_value_heads": 9}, CheckpointError, "num_key_value_heads must be in 1..2, found 9"),
    ({"head_dim": 5}, UnsupportedError, "head_dim 5 is odd"),
    ({"hidden_act": "mish"}, UnsupportedError, "hidden_act 'mish'"),
    ({"model_type": "gemma"}, UnsupportedError, "model_type 'gemma' .* known: llama, mistral, opt"),
    ({"model_type": "mistral", "sliding_window": 0}, CheckpointError, "sliding_window must be in .* found 0"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"]}, CheckpointError, "layer_types must name one"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, CheckpointError, "there is no sliding_window"),
]


@pytest.mark.parametrize(("change", "error", "words"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(change: dict[str, Any], error: type[Exception], words: str) -> None:
    config = random_config(family="llama").to_dict()
    config["text_config"] = {**config["text_config"], **change}
    if "rope_scaling" in change or "partial_rotary_factor" in change:
        config["text_config"].pop("rope_parameters")
    with pytest.raises(error, match=words):
        core_config(Blip2Config.from_dict(config))
