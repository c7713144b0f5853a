"""How exact each dtype is: prints the tables of docs/DTYPES.md.

    python benchmarks/accuracy.py                                   # the sample checkpoint, random models
    python benchmarks/accuracy.py --model FOLDER [--positions 512]  # logits of a checkpoint, of any size

The sample checkpoint answers held-out scenes (tools/sample_model; needs the Noto Color Emoji font). Random models are
compared in their logits, as they are and with outlier channels planted as real models have them. A checkpoint is
compared with itself as stored (float32 arithmetic) in the logits of one picture and random tokens, one dtype after the
other, so that one of them is in memory at a time.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import blip2c
import blip2c.api
from blip2c import Blip2ForConditionalGeneration
from blip2c.dtypes import parse_dtype

ROOT = Path(__file__).resolve().parent.parent
DTYPES = ["auto", "float16", "bfloat16", "int8", "int4"]
Logits = NDArray[np.float32]


def row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def header(*cells: str) -> None:
    row(*cells)
    print("|" + "---|" * len(cells))


def compare(found: Logits, reference: Logits) -> tuple[str, str, str]:
    """Relative error (of norms, and of the largest values), and how often the first choice is the same."""
    error = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    largest = np.abs(found - reference).max() / np.abs(reference).max()
    agreed = (found.argmax(-1) == reference.argmax(-1)).mean()
    return f"{error:.5f}", f"{largest:.5f}", f"{100 * agreed:.1f} %"


# -- the sample checkpoint ---------------------------------------------------------------------------------------------


def held_out(count: int) -> list[Any]:
    sys.path.insert(0, str(ROOT / "tools" / "sample_model"))
    import scenes

    rng = random.Random(2024)  # as tools/sample_model/evaluate.py
    return [scenes.scene(rng, "heldout") for _ in range(count)]


def sample_table(count: int, dtypes: list[str]) -> None:
    """Exact captions and answers of held-out scenes."""
    drawn = held_out(count)
    asked = [(number, question) for number, scene in enumerate(drawn) for question in scene.questions]
    header("dtype", "captions right", "answers right", "captions as in float32", "answers as in float32", "seconds")
    first: tuple[list[str], list[str]] | None = None
    for name in dtypes:
        model, start = blip2c.load(dtype=parse_dtype(name)), time.monotonic()
        images = [scene.image for scene in drawn]
        captions = [str(text) for text in model.caption(images, batch_size=32, progress=False)]
        rows = [(number, blip2c.api.QUESTION.format(question.text)) for number, question in asked]
        answers = [str(text) for text in model.stream(images, rows, 64, max_new_tokens=20)]
        first = first or (captions, answers)
        right = sum(a == s.caption for a, s in zip(captions, drawn, strict=True))
        answered = sum(a == q.answer for a, (_, q) in zip(answers, asked, strict=True))
        same = [sum(a == b for a, b in zip(x, y, strict=True)) for x, y in zip((captions, answers), first, strict=True)]
        row(name, *(f"{100 * n / len(of):.2f} %" for n, of in ((right, drawn), (answered, asked), (same[0], drawn),
            (same[1], asked))), f"{time.monotonic() - start:.0f}")  # fmt: skip


# -- random models -----------------------------------------------------------------------------------------------------

SHAPES: dict[str, Any] = {
    "vision": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "qformer": {"hidden_size": 96, "intermediate_size": 192, "num_attention_heads": 4},
}
LANGUAGES: dict[str, dict[str, int]] = {
    "opt": {"hidden_size": 256, "ffn_dim": 1024, "num_hidden_layers": 4, "num_attention_heads": 4},
    "llama": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 4},
    "t5": {"d_model": 256, "d_ff": 640, "num_layers": 4, "num_decoder_layers": 4, "num_heads": 4, "d_kv": 64},
}  # fmt: skip


def random_models(folder: Path, family: str) -> Iterator[tuple[str, Path]]:
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers import calm_queries, plant_outliers, random_checkpoint

    plain = random_checkpoint(folder / "plain", 0, family=family, text=LANGUAGES[family], **SHAPES)
    if family == "t5":
        calm_queries(plain)
    yield "as drawn", plain
    planted = Path(shutil.copytree(plain, folder / "planted"))
    plant_outliers(planted)
    yield "with outliers", planted


def planted_table(family: str, dtypes: list[str]) -> None:
    """Logits of a random model, and of the same function with channels of its norms 100 times larger."""
    with tempfile.TemporaryDirectory() as folder:
        models = dict(random_models(Path(folder), family))
        from helpers import prompt_ids, random_pixels

        config = Blip2ForConditionalGeneration.from_pretrained(models["as drawn"]).config
        ids = prompt_ids(config, 8, 64)
        decoded = {"decoder_input_ids": ids[:, config.num_query_tokens :]} if family == "t5" else {}

        def logits(path: Path, dtype: Any) -> Logits:
            model = Blip2ForConditionalGeneration.from_pretrained(path, dtype=dtype)
            return np.asarray(model(random_pixels(config, 8), ids, **decoded).logits, np.float32)

        reference = logits(models["as drawn"], None)
        for name in dtypes:
            for kind, path in models.items():
                row(family, name, kind, *compare(logits(path, parse_dtype(name)), reference))


# -- a checkpoint ------------------------------------------------------------------------------------------------------


def logits_of(folder: Path, dtype: str, positions: int) -> Logits:
    """[positions, V]: one picture, then random tokens, read at once. An encoder-decoder decodes those tokens."""
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=parse_dtype(dtype), cache=False)
    core, config = model._core, model._core_config
    rng, side = np.random.default_rng(0), config["vision"]["image_size"]
    pixels = rng.normal(size=(1, 3, side, side)).astype(np.float32)
    text = rng.integers(4, config["text"]["vocab_size"] - 1, positions).astype(np.int32)
    ids = np.concatenate([np.full(config["num_query_tokens"], -1, np.int32), text])
    features = core.encode(pixels)
    queries, logits = config["num_query_tokens"], None
    if config["text"]["model_type"] == "t5":
        logits = core.forward(
            features, ids[: queries + 16], np.array([0, queries + 16], np.int64),
            decoder_ids=text, decoder_offsets=np.array([0, positions], np.int64),
        )["logits"]  # fmt: skip
        return np.asarray(logits, np.float32)
    logits = core.forward(features, ids, np.array([0, len(ids)], np.int64))["logits"]
    return np.asarray(logits, np.float32)[queries:]


def checkpoint_table(folder: Path, others: list[str], positions: int, kept: Path | None) -> None:
    """others: dtypes, or folders that quantize() made of it. kept: a file for the reference's logits."""
    if kept is not None and kept.exists():
        reference: Logits = np.load(kept)
    else:
        reference = logits_of(folder, "auto", positions)
        if kept is not None:
            np.save(kept, reference)
    choices = len(np.unique(reference.argmax(-1)))
    print(f"As stored: {choices} different first choices at {positions} positions\n")
    header("dtype", "relative error", "largest error", f"same first choice of {positions}")
    for name in others:
        packed = Path(name).is_dir()
        found = logits_of(Path(name) if packed else folder, "auto" if packed else name, positions)
        row(name, *compare(found, reference))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="compare this checkpoint's logits instead")
    parser.add_argument("--dtype", action="append", help="repeatable; with --model also a packed folder")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--keep", type=Path, help="with --model: keep the reference's logits in this file")
    options = parser.parse_args()
    if options.model:
        checkpoint_table(options.model, options.dtype or DTYPES[1:], options.positions, options.keep)
        return
    sample_table(options.scenes, options.dtype or DTYPES)
    print()
    header("language model", "dtype", "model", "relative error", "largest error", "same first choice")
    for family in LANGUAGES:
        planted_table(family, options.dtype or DTYPES[1:])


if __name__ == "__main__":
    main()
