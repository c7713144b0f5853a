"""Pictures of any size: interpolated positions against torch's bicubic, and every way in that takes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from blip2c import Blip2ForConditionalGeneration, get_num_threads, set_num_threads
from helpers import prompt_ids, random_checkpoint, reference_model

# The model's own is 56 x 56 with patches of 14.
SIZES = [(56, 56), (84, 84), (42, 42), (14, 14), (28, 98), (61, 70), (57, 69), (126, 30)]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    folder = random_checkpoint(tmp_path_factory.mktemp("sizes"), 6, vision={"image_size": 56})
    return Blip2ForConditionalGeneration.from_pretrained(folder), reference_model(folder)


def picture(size: tuple[int, int], batch: int = 2) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).normal(size=(batch, 3, *size)).astype(np.float32))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_positions_are_torch_s_bicubic(both: tuple[Any, Any], size: tuple[int, int]) -> None:
    """Seen in the embedding output, which is patches + positions: the patches are the same."""
    model, reference = both
    pixels = picture(size)
    with torch.no_grad():
        want = reference.vision_model.embeddings(pixels, interpolate_pos_encoding=True)
    found = model.vision_model(pixels, interpolate_pos_encoding=True, output_hidden_states=True).hidden_states[0]
    assert found.shape == want.shape
    assert (found - want).abs().max() <= 1e-5


def test_every_way_in(both: tuple[Any, Any]) -> None:
    model, reference = both
    pixels, ids = picture((70, 42), 3), torch.from_numpy(prompt_ids(model.config, 3, 4))
    interpolate = {"interpolate_pos_encoding": True}
    with torch.no_grad():
        want = reference(pixels, ids, **interpolate)
        features = reference.get_image_features(pixels, **interpolate)
    found = model(pixels, ids, **interpolate)
    assert torch.allclose(found.logits, want.logits, rtol=1e-4, atol=1e-4)
    assert torch.allclose(
        model.get_image_features(pixels, **interpolate).pooler_output, features.pooler_output, rtol=1e-4, atol=1e-4
    )
    tokens = model.generate(pixels, ids, max_new_tokens=6, **interpolate)
    assert torch.equal(tokens, reference.generate(pixels, ids, max_new_tokens=6, **interpolate))
    other = model.generate(pixels.flip(2), ids, max_new_tokens=6, **interpolate)
    assert not torch.equal(tokens, other)


def test_the_own_size_is_left_alone(both: tuple[Any, Any]) -> None:
    model, _ = both
    pixels, ids = picture((56, 56)), torch.from_numpy(prompt_ids(model.config, 2, 4))
    assert torch.equal(model(pixels, ids, interpolate_pos_encoding=True).logits, model(pixels, ids).logits)


def test_places_in_a_batch_and_threads_give_the_same_bits(both: tuple[Any, Any]) -> None:
    model, _ = both
    pixels = picture((98, 70), 5).numpy()
    together = model._core.encode(pixels, interpolate=True)
    apart = np.concatenate([model._core.encode(p[None], interpolate=True) for p in pixels])
    assert np.array_equal(together, apart)
    threads = get_num_threads()
    try:
        set_num_threads(1)
        assert np.array_equal(model._core.encode(pixels, interpolate=True), together)
    finally:
        set_num_threads(threads)


def test_sizes_that_do_not_fit(both: tuple[Any, Any]) -> None:
    model, _ = both
    ids = torch.from_numpy(prompt_ids(model.config, 2, 4))
    with pytest.raises(ValueError, match=r"56x42, this model takes 56x56 \(interpolate_pos_encoding=True: any size\)"):
        model(picture((56, 42)), ids)
    with pytest.raises(ValueError, match="13x56, expected at least 14x14"):
        model(picture((13, 56)), ids, interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="at most 16384 patches"):
        model.generate(np.zeros((1, 3, 14 * 129, 14 * 128), np.float32), interpolate_pos_encoding=True)
    with pytest.raises(ValueError, match="pixel_values: expected shape"):
        model._core.encode(picture((56, 42)).numpy())
