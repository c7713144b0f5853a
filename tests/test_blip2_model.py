"""Blip2Model and the parts of a model under the names that scripts call, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import blip2c
from blip2c import Blip2ForConditionalGeneration, Blip2Model, UnsupportedError
from helpers import prompt_ids, random_checkpoint, random_pixels
from output_helpers import assert_same
from running import run_python

EVERYTHING = {"output_hidden_states": True, "output_attentions": True}


@pytest.fixture(scope="module", params=["opt", "llama", "t5"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same checkpoint as Blip2Model here and there."""
    folder = random_checkpoint(tmp_path_factory.mktemp(request.param), 4, family=request.param)
    reference = transformers.Blip2Model.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return Blip2Model.from_pretrained(folder), reference.eval()


def test_image_and_qformer_features(both: tuple[Any, Any]) -> None:
    model, reference = both
    pixels = torch.from_numpy(random_pixels(model.config, 2))
    with torch.no_grad():
        assert_same(model.get_image_features(pixels, **EVERYTHING), reference.get_image_features(pixels, **EVERYTHING))
        want = reference.get_qformer_features(pixels)
    assert_same((model.get_qformer_features(pixels),), (want,))
    with pytest.warns(UserWarning, match="does not use input_ids"):
        model.get_qformer_features(pixels, input_ids=torch.ones(2, 3))
    vision, pooled = model.get_image_features(pixels.numpy(), return_dict=False)
    assert vision.dtype == pooled.dtype == np.float32
    with pytest.raises(TypeError, match="no_such"):
        model.get_image_features(pixels, no_such=1)


def test_text_features(both: tuple[Any, Any]) -> None:
    """Texts alone; the places that the mask hides are nobody's business."""
    model, reference = both
    ids = torch.from_numpy(np.random.default_rng(3).integers(4, 300, (2, 7)))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        assert_same(model.get_text_features(ids, **EVERYTHING), reference.get_text_features(ids, **EVERYTHING))
        want = reference.get_text_features(ids, mask).last_hidden_state
    found = model.get_text_features(ids, mask)
    assert torch.allclose(found.last_hidden_state[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)
    assert found.hidden_states is None
    assert isinstance(model.get_text_features(ids.numpy(), return_dict=False), tuple)
    with pytest.raises(TypeError, match="no_such"):
        model.get_text_features(ids, no_such=1)


def test_parts_compute_what_they_compute_there(both: tuple[Any, Any]) -> None:
    model, reference = both
    pixels = torch.from_numpy(random_pixels(model.config, 2))
    ids = torch.from_numpy(prompt_ids(model.config, 2, 4))
    with torch.no_grad():
        vision = reference.vision_model(pixels, **EVERYTHING)
        queries = reference.query_tokens.expand(2, -1, -1)
        qformer = reference.qformer(query_embeds=queries, encoder_hidden_states=vision.last_hidden_state)
        projected = reference.language_projection(qformer.last_hidden_state)
    assert_same(model.vision_model(pixels, **EVERYTHING), vision)
    assert torch.equal(model.query_tokens, reference.query_tokens)
    shown = torch.ones(vision.last_hidden_state.shape[:2], dtype=torch.long)
    found = model.qformer(
        query_embeds=model.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=vision.last_hidden_state,
        encoder_attention_mask=shown,
    )
    assert_same(found, qformer)
    assert torch.allclose(model.language_projection(found.last_hidden_state), projected, rtol=1e-4, atol=1e-4)
    embeds = model.get_input_embeddings()(ids)
    more = {"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {"labels": ids}
    with torch.no_grad():
        want = reference.language_model(inputs_embeds=embeds, **more)
    assert_same(model.language_model(inputs_embeds=embeds, **more), want)
    assert torch.equal(
        model.language_model(input_ids=ids, **more).logits, model.language_model(None, None, embeds, **more).logits
    )
    assert model.vision_model.config is model.config.vision_config
    assert model.vision_model.dtype == torch.float32
    assert "VisionModel" in repr(model.vision_model)


def test_parts_refuse_what_they_do_not_compute(both: tuple[Any, Any]) -> None:
    model, _ = both
    image = np.zeros((2, 5, 24), np.float32)
    queries = model.query_tokens
    with pytest.raises(UnsupportedError, match="reads no text"):
        model.qformer(queries, query_length=1, encoder_hidden_states=image)
    with pytest.raises(ValueError, match="query_length is 9"):
        model.qformer(queries, query_length=9, encoder_hidden_states=image)
    with pytest.raises(ValueError, match="query_embeds for 3 pictures, there are 2"):
        model.qformer(np.zeros((3, 4, 16), np.float32), encoder_hidden_states=image)
    with pytest.raises(ValueError, match="all zeros in row 1"):
        model.qformer(queries, encoder_hidden_states=image, encoder_attention_mask=np.eye(2, 5)[[0, 0]] * [[1], [0]])
    with pytest.raises(ValueError, match="encoder_hidden_states must be given"):
        model.qformer(queries)
    with pytest.raises(ValueError, match=r"encoder_hidden_states must be \[batch, length, 24\]"):
        model.qformer(queries, encoder_hidden_states=image[..., :3])
    with pytest.raises(ValueError, match="language_projection: expected"):
        model.language_projection(image)
    with pytest.raises(ValueError, match="input_ids must be in"):
        model.get_input_embeddings()([[320]])
    with pytest.raises(ValueError, match="one of input_ids and inputs_embeds"):
        model.language_model()
    with pytest.raises(TypeError, match="no_such"):
        model.vision_model(np.zeros((1, 3, 28, 28), np.float32), no_such=1)
    assert not hasattr(model, "generate")


def test_parameters_are_those_of_the_file(both: tuple[Any, Any]) -> None:
    model, reference = both
    theirs = dict(reference.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == theirs.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, theirs[name]), name
    first = next(iter(model.parameters()))
    assert first.dtype == torch.float32
    assert first.device == torch.device("cpu")
    assert not first.requires_grad
    assert sum(p.numel() for p in model.parameters()) == model.num_parameters()
    assert model.state_dict().keys() == theirs.keys()


def test_parameters_without_torch(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, 1)
    run_python(
        "import sys; from blip2c import Blip2Model\n"
        f"model = Blip2Model.from_pretrained({str(folder)!r})\n"
        "first = next(model.parameters())\n"
        "assert first.dtype == 'float32' and not first.flags.writeable\n"
        "assert model.query_tokens.shape == (1, 4, 16)\n"
        "assert 'torch' not in sys.modules"
    )


def test_one_checkpoint_for_both_classes(tmp_path: Path) -> None:
    """Either saves what the other, and transformers, load."""
    folder = random_checkpoint(tmp_path / "a", 2, max_shard_size="20kB")
    model = Blip2Model.from_pretrained(folder)
    model.save_pretrained(tmp_path / "b")
    pixels, ids = random_pixels(model.config, 1), prompt_ids(model.config, 1, 3)
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert np.array_equal(again(pixels, ids).logits, model(pixels, ids).logits)
    assert transformers.Blip2Model.from_pretrained(tmp_path / "b") is not None
    # Into a folder with another checkpoint's shards: these would be read beside or instead of the new file.
    again.save_pretrained(folder)
    assert sorted(p.name for p in folder.glob("*.safetensors*")) == ["model.safetensors"]
    assert np.array_equal(blip2c.Blip2Model.from_pretrained(folder)(pixels, ids).logits, model(pixels, ids).logits)
