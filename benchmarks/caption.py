"""Times blip2c and transformers on the same checkpoint: separate processes, interleaved, medians, ratios.

    python benchmarks/make_checkpoint.py /tmp/blip2-opt-2.7b-random
    python benchmarks/caption.py /tmp/blip2-opt-2.7b-random --rounds 5

Every round starts each engine once in a fresh process, which loads the checkpoint and runs every piece of work. Rows:
load, ViT, Q-Former with projection, prefill of 33 tokens, one decoded token, captions of 20 tokens, greedy and with 5
beams; peak resident memory of the process after a greedy caption and after everything.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS = {
    "load": "s", "vit": "s", "qformer": "s", "prefill_33": "s", "decode_token": "s", "greedy_20": "s", "beam5_20": "s",
    "peak_rss_greedy": "GB", "peak_rss": "GB",
}  # fmt: skip
NEW_TOKENS = 20


def peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def several(work: Callable[[], Any]) -> float:
    """Median of three."""
    return statistics.median(timed(work)[0] for _ in range(3))


def picture(size: int) -> np.ndarray:
    """One random picture [1, 3, S, S], normalised."""
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


def captions(row: dict[str, float], generate: Callable[[int, int], Any]) -> None:
    """generate(new_tokens, beams) from the picture to ids. A token is (20 tokens - 1 token) / 19."""
    one, _ = timed(lambda: generate(1, 1))
    row["greedy_20"], _ = timed(lambda: generate(NEW_TOKENS, 1))
    row["decode_token"] = (row["greedy_20"] - one) / (NEW_TOKENS - 1)
    row["peak_rss_greedy"] = peak_rss()
    row["beam5_20"], _ = timed(lambda: generate(NEW_TOKENS, 5))
    row["peak_rss"] = peak_rss()


def run_blip2c(folder: str) -> dict[str, float]:
    import blip2c

    row: dict[str, float] = {}
    row["load"], model = timed(lambda: blip2c.Blip2ForConditionalGeneration.from_pretrained(folder))
    core, pixels = model._core, picture(model.config.vision_config.image_size)
    features = core.encode(pixels)  # first touch of every page
    row["vit"] = several(lambda: core.vision(pixels))
    vision = core.vision(pixels)
    row["qformer"] = several(lambda: core.read(vision))
    ids = np.array([-1] * model.config.num_query_tokens + [2], np.int32)
    offsets = np.array([0, len(ids)], np.int64)
    options = model._options({"max_new_tokens": 1}, [len(ids)])
    row["prefill_33"], _ = timed(lambda: core.generate(features, ids, offsets, None, ids, options))
    captions(
        row,
        lambda tokens, beams: model.generate(
            pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams
        ),
    )
    return row


def run_transformers(folder: str, dtype: str) -> dict[str, float]:
    # transformers looks for a package called `kernels`, which must not be the script of that name beside this one.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    import torch
    from transformers import Blip2ForConditionalGeneration

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    row: dict[str, float] = {}
    kind = getattr(torch, dtype)
    row["load"], model = timed(lambda: Blip2ForConditionalGeneration.from_pretrained(folder, dtype=kind).eval())
    pixels = torch.from_numpy(picture(model.config.vision_config.image_size)).to(kind)
    with torch.inference_mode():
        embeds = model.get_image_features(pixels).pooler_output.to(kind)
        vision = model.vision_model(pixels).last_hidden_state
        row["vit"] = several(lambda: model.vision_model(pixels))

        def qformer() -> torch.Tensor:
            out = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=vision)
            projected: torch.Tensor = model.language_projection(out.last_hidden_state.to(kind))
            return projected

        row["qformer"] = several(qformer)
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[2]]))], 1)
        row["prefill_33"], _ = timed(lambda: model.language_model(inputs_embeds=embeds, logits_to_keep=1))
        captions(
            row,
            lambda tokens, beams: model.generate(
                pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams
            ),
        )
    return row


def has_bf16() -> bool:
    with open("/proc/cpuinfo") as file:
        return "avx512_bf16" in file.read()


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    name = values.get("model name", platform.processor())
    return f"{name} (family {values.get('cpu family')}, model {values.get('model')})"


def run_engine(engine: str, folder: str) -> dict[str, float]:
    command = [sys.executable, __file__, folder, "--engine", engine]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: medians of each engine and the ratio of each to blip2c (above 1: blip2c is better)."""
    engines = list(results)
    lines = ["| work | " + " | ".join(engines) + " | " + " | ".join(f"{e} / blip2c" for e in engines[1:]) + " |"]
    lines.append("|---" * (2 * len(engines)) + "|")
    for key, unit in ROWS.items():
        medians = [statistics.median(run[key] for run in results[engine]) for engine in engines]
        ratios = [f"{m / medians[0]:.2f} x" if medians[0] > 0 else "" for m in medians[1:]]
        cells = [f"{m:.3g} {unit}" for m in medians]
        lines.append(f"| {key} | " + " | ".join(cells + ratios) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", help="run one engine in this process and print its figures as JSON")
    parser.add_argument("--engines", nargs="*", help="blip2c, transformers-float32, transformers-bfloat16")
    arguments = parser.parse_args()
    if arguments.engine:
        name, _, dtype = arguments.engine.partition("-")
        row = run_blip2c(arguments.folder) if name == "blip2c" else run_transformers(arguments.folder, dtype)
        print(json.dumps(row))
        return
    peers = ["transformers-float32", *(["transformers-bfloat16"] if has_bf16() else [])]
    engines = arguments.engines or ["blip2c", *peers]
    results: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for i in range(arguments.rounds):
        for engine in engines:
            results[engine].append(run_engine(engine, arguments.folder))
            print(f"round {i + 1}: {engine}: {json.dumps(results[engine][-1])}", file=sys.stderr, flush=True)
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} processors, medians of {arguments.rounds}\n")
    print(table(results))


if __name__ == "__main__":
    main()
