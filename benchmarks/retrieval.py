"""Every call of retrieval beside transformers': prints the largest difference of any number in each output.

    python benchmarks/retrieval.py             # random small models, both forms of the configuration, float16 too
    python benchmarks/retrieval.py --seeds 5   # the largest over five models

Texts are of unequal length, padded at the right and masked; pictures and texts come in batches. Both sides compute in
float32 on the values that the file holds, and transformers in float64, too: random models magnify rounding, and this
says how much of a difference is theirs. "scale" is the largest number of the output itself.
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
Case = tuple[str, Callable[[], Any], Callable[[torch.dtype], Any]]


def texts(config: Any, image: bool, seed: int) -> dict[str, torch.Tensor]:
    rng = np.random.default_rng(seed)
    mask = (np.arange(LENGTH) < np.array([LENGTH, *rng.integers(2, LENGTH, BATCH - 1)])[:, None]).astype(np.int64)
    ids = np.where(mask == 1, rng.integers(1, config.qformer_config.vocab_size, (BATCH, LENGTH)), 0)
    if image and config.image_token_index is not None:
        front = np.full((BATCH, config.num_query_tokens), config.image_token_index)
        ids, mask = np.concatenate([front, ids], axis=1), np.concatenate([np.ones_like(front), mask], axis=1)
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}


def half(name: str, folder: Path) -> tuple[Any, dict[torch.dtype, Any]]:
    """blip2c's class of that name, and transformers' in float32 and float64."""
    kind, options = getattr(transformers, name), {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = {
        dtype: kind.from_pretrained(str(folder), **options).eval().to(dtype) for dtype in (torch.float32, torch.float64)
    }
    return getattr(blip2c, name).from_pretrained(folder).float(), theirs


def of(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {
        name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in given.items()
    }


def retrieval_cases(folder: Path, seed: int) -> Iterator[Case]:
    ours = blip2c.Blip2ForImageTextRetrieval.from_pretrained(folder).float()
    theirs = {dtype: reference_model(folder, dtype) for dtype in (torch.float32, torch.float64)}
    config = theirs[torch.float32].config
    pixels = {"pixel_values": torch.from_numpy(random_pixels(config, BATCH, seed))}
    joined, alone = texts(config, True, seed), texts(config, False, seed)
    for name, together in (("ITC", False), ("ITM", True)):
        given = {**pixels, **joined, "use_image_text_matching_head": together}
        yield (
            f"Blip2ForImageTextRetrieval, {name}",
            lambda g=given: ours(**g),
            lambda dtype, g=given: theirs[dtype](**of(g, dtype)),
        )
    words, their_words = half("Blip2TextModelWithProjection", folder)
    yield "Blip2TextModelWithProjection", lambda: words(**alone), lambda dtype: their_words[dtype](**alone)
    look, their_look = half("Blip2VisionModelWithProjection", folder)
    yield (
        "Blip2VisionModelWithProjection",
        lambda: look(**pixels),
        lambda dtype: their_look[dtype](**of(pixels, dtype)),
    )
    width, image = config.qformer_config.hidden_size, config.vision_config.hidden_size
    generator = torch.Generator().manual_seed(seed)
    given = {
        "query_embeds": torch.randn(BATCH, 19, width, generator=generator), "query_length": 8,
        "attention_mask": (torch.arange(19) < 17).long().expand(BATCH, -1),
        "encoder_hidden_states": torch.randn(BATCH, 17, image, generator=generator),
    }  # fmt: skip
    qformer = blip2c.Blip2QFormerModel.from_pretrained(folder).float()
    yield "Blip2QFormerModel", lambda: qformer(**given), lambda dtype: theirs[dtype].qformer(**of(given, dtype))


def feature_cases(folder: Path, seed: int) -> Iterator[Case]:
    """Of a captioning checkpoint."""
    ours, theirs = half("Blip2Model", folder)
    pixels = {"pixel_values": torch.from_numpy(random_pixels(theirs[torch.float32].config, BATCH, seed))}
    ids = torch.from_numpy(np.random.default_rng(seed).integers(4, 300, (BATCH, LENGTH)))
    mask = (torch.arange(LENGTH) < torch.tensor([[LENGTH], [3], [5], [8]])).long()
    for name in ("get_image_features", "get_qformer_features"):
        yield (
            f"Blip2Model.{name}",
            lambda n=name: getattr(ours, n)(**pixels),
            lambda dtype, n=name: getattr(theirs[dtype], n)(**of(pixels, dtype)),
        )
    yield (
        "Blip2Model.get_text_features, without the pads",
        lambda: ours.get_text_features(ids, mask).last_hidden_state[mask == 1],
        lambda dtype: theirs[dtype].get_text_features(ids, mask).last_hidden_state[mask == 1],
    )


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    titles = ("form", "call", "output", "blip2c - transformers", "blip2c - float64", "transformers - float64", "scale")
    print("| " + " | ".join(titles) + " |\n" + "|---" * len(titles) + "|")
    for form, options in FORMS.items():
        found: dict[tuple[str, str], list[float]] = {}
        for seed in range(arguments.seeds):
            with tempfile.TemporaryDirectory() as place:
                whole = random_checkpoint(Path(place) / "itm", seed=seed, retrieval=True, **SHAPE, **options)
                caption = random_checkpoint(Path(place) / "opt", seed=seed, **SHAPE, **options)
                for call, ours, theirs in [*retrieval_cases(whole, seed), *feature_cases(caption, seed)]:
                    with torch.no_grad():
                        mine, other, exact = ours(), theirs(torch.float32), theirs(torch.float64)
                    for (where, a, b), (_, _, c) in zip(pairs(mine, other), pairs(other, exact), strict=True):
                        key = call, where.lstrip(".") or "result"
                        sizes = [distance(a, b), distance(a, c), distance(b, c), float(c.abs().max())]
                        found[key] = [max(pair) for pair in zip(sizes, found.get(key, sizes), strict=True)]
        for (call, where), sizes in found.items():
            print(f"| {form} | {call} | {where} | " + " | ".join(f"{size:.1e}" for size in sizes) + " |")


if __name__ == "__main__":
    main()
