"""Every call of retrieval beside transformers': prints the largest difference of any number in each output.

    python benchmarks/retrieval.py             # random small models, both forms of the configuration, float16 too
    python benchmarks/retrieval.py --seeds 5   # the largest over five models

Texts are of unequal length, padded at the right and masked; pictures and texts come in batches. Both sides compute in
float32 on the values that the file holds. "scale" is the largest number of the output itself.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import blip2c

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from helpers import random_checkpoint, random_pixels, reference_model
from output_helpers import pairs

FORMS: dict[str, dict[str, Any]] = {
    "image token": {},
    "without": {"image_token": False},
    "image token, float16": {"dtype": "float16"},
    "without, bfloat16": {"image_token": False, "dtype": "bfloat16"},
}
SHAPE: dict[str, Any] = {
    "vision": {"hidden_size": 64, "intermediate_size": 128, "image_size": 56, "num_hidden_layers": 4},
    "qformer": {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4},
    "num_query_tokens": 8,
}
BATCH, LENGTH = 4, 11
Case = tuple[str, Callable[[], Any], Callable[[], Any]]


def texts(config: Any, image: bool, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < np.array([LENGTH, *rng.integers(2, LENGTH, BATCH - 1)])[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(1, config.qformer_config.vocab_size, (BATCH, LENGTH)), 0)
    if image and config.image_token_index is not None:
        front = np.full((BATCH, config.num_query_tokens), config.image_token_index)
        ids, mask = np.concatenate([front, ids], axis=1), np.concatenate([np.ones_like(front), mask], axis=1)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def half(name: str, folder: Path) -> tuple[Any, Any]:
    options: dict[str, Any] = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = getattr(transformers, name).from_pretrained(str(folder), **options).eval()
    return getattr(blip2c, name).from_pretrained(folder).float(), theirs


def retrieval_cases(folder: Path, seed: int) -> Iterator[Case]:
    ours, theirs = blip2c.Blip2ForImageTextRetrieval.from_pretrained(folder).float(), reference_model(folder)
    config = theirs.config
    pixels = torch.from_numpy(random_pixels(config, BATCH, seed))
    joined, alone = texts(config, True, seed), texts(config, False, seed)
    for name, together in (("ITC", False), ("ITM", True)):
        given = {"pixel_values": pixels, **joined, "use_image_text_matching_head": together}
        yield f"Blip2ForImageTextRetrieval, {name}", lambda g=given: ours(**g), lambda g=given: theirs(**g)
    words, their_words = half("Blip2TextModelWithProjection", folder)
    yield "Blip2TextModelWithProjection", lambda: words(**alone), lambda: their_words(**alone)
    look, their_look = half("Blip2VisionModelWithProjection", folder)
    yield "Blip2VisionModelWithProjection", lambda: look(pixels), lambda: their_look(pixels)
    width, image = config.qformer_config.hidden_size, config.vision_config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(BATCH, 19, width, generator=generator)
    given = {
        "query_embeds": embeds, "query_length": 8, "attention_mask": (torch.arange(19) < 17).long().expand(BATCH, -1),
        "encoder_hidden_states": torch.randn(BATCH, 17, image, generator=generator),
    }  # fmt: skip
    qformer = blip2c.Blip2QFormerModel.from_pretrained(folder).float()
    yield "Blip2QFormerModel", lambda: qformer(**given), lambda: theirs.qformer(**given)


def feature_cases(folder: Path, seed: int) -> Iterator[Case]:
    """Of a captioning checkpoint."""
    ours, theirs = half("Blip2Model", folder)
    pixels = torch.from_numpy(random_pixels(theirs.config, BATCH, seed))
    rng = np.random.default_rng(seed)
    ids = torch.from_numpy(rng.integers(4, 300, (BATCH, LENGTH)))
    mask = (torch.arange(LENGTH) >= torch.tensor([[0], [3], [5], [1]])).long()
    for name in ("get_image_features", "get_qformer_features"):
        yield (
            f"Blip2Model.{name}",
            lambda n=name: getattr(ours, n)(pixels),
            lambda n=name: getattr(theirs, n)(pixels),
        )
    yield (
        "Blip2Model.get_text_features, without the pads",
        lambda: ours.get_text_features(ids, mask).last_hidden_state[mask == 1],
        lambda: theirs.get_text_features(ids, mask).last_hidden_state[mask == 1],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| form | call | output | largest difference | scale |\n|---|---|---|---|---|")
    for form, options in FORMS.items():
        found: dict[tuple[str, str], tuple[float, float]] = {}
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as place:
                whole = random_checkpoint(Path(place) / "itm", seed=seed, retrieval=True, **SHAPE, **options)
                caption = random_checkpoint(Path(place) / "opt", seed=seed, **SHAPE, **options)
                for call, ours, theirs in [*retrieval_cases(whole, seed), *feature_cases(caption, seed)]:
                    with torch.no_grad():
                        for where, a, b in pairs(ours(), theirs()):
                            key = call, where.lstrip(".") or "result"
                            error, scale = float((a - b).abs().max()), float(b.abs().max())
                            before = found.get(key, (0.0, 0.0))
                            found[key] = max(error, before[0]), max(scale, before[1])
        for (call, where), (error, scale) in found.items():
            print(f"| {form} | {call} | {where} | {error:.1e} | {scale:.2g} |")


if __name__ == "__main__":
    main()
