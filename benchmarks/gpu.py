"""Checks, times and compares on a card: every operation against float64, a model against the processor, then speed.

    python benchmarks/make_checkpoint.py /tmp/blip2-opt-2.7b-random
    python benchmarks/gpu.py --checkpoint /tmp/blip2-opt-2.7b-random
    python benchmarks/gpu.py --host

First every case of tests/kernel_cases.py on the device; a case that is wrong is named and the status is 1. Then the
sample model captions its pictures there and on the processor, token for token. Then each operation at the sizes of
blip2-opt-2.7b (time in its kernels, as CUPTI counts it, without the copies of arrays), and with a checkpoint captions
of 20 tokens, against transformers eager and transformers with a static cache and torch.compile, in the same process on
the same card. Times are medians. Needs a torch that has CUDA.

--host: the checks alone, through the backend as compiled for the host (tests/cuda_host), where there is no card.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
NEW_TOKENS = 20
LOOSER = 4  # than the processor's tolerances: other orders of sums, CUDA's exp, erf and sin
ROUNDED = {"float16": 2.0**-11, "uint16": 2.0**-8}  # products of more than 16 rows round x to the weight's 16 bits


def use_host() -> None:
    from cuda_build import backend_sources, host_library

    os.environ["BLIP2C_CUDA_LIBRARY"] = str(host_library(backend_sources()))


# ---- checks ----


def check_operations(device: str) -> int:
    """The number of cases that are wrong."""
    from kernel_cases import CASES, TOLERANCE, arguments

    wrong = done = 0
    for case in CASES:
        if getattr(case.run, "keywords", {}).get("method", "packed") != "packed":
            continue
        arrays = arguments(case)
        found = case.run(**arrays, device=device)
        expected, scale = case.reference(**arrays)
        error = float(np.max(np.abs(found - expected) / np.maximum(scale, 1e-38), initial=0.0))
        allowed = LOOSER * TOLERANCE[case.tolerance]
        if case.tolerance == "linear" and arrays["x"].size // arrays["x"].shape[-1] > 16:
            allowed = max(allowed, ROUNDED.get(str(arrays["weight"].dtype), 0.0))
        done += 1
        if not error <= allowed:
            wrong += 1
            print(f"WRONG {case.name}: {error:.2e}, allowed {allowed:.2e}")
    print(f"operations: {done - wrong} of {done} cases as float64 has them")
    return wrong


def check_sample(device: str) -> int:
    """The sample model's captions, token for token."""
    import blip2c

    pictures = sorted((Path(blip2c.__file__).parent / "sample" / "pictures").glob("*.png"))[:3]
    here, there = blip2c.load("sample"), blip2c.load("sample", device=device)
    wrong = 0
    for options in ({}, {"num_beams": 3}):
        want = [str(here.caption(p, max_new_tokens=8, **options)) for p in pictures]
        found = [str(there.caption(p, max_new_tokens=8, **options)) for p in pictures]
        for picture, a, b in zip(pictures, want, found, strict=True):
            if a != b:
                wrong += 1
                print(f"WRONG {picture.name} {options}: {b!r}, the processor says {a!r}")
    print(f"sample model: {2 * len(pictures) - wrong} of {2 * len(pictures)} captions are the processor's")
    return wrong


# ---- times ----


def kernel_seconds(work: Callable[[], Any]) -> float:
    """Seconds in kernels of one call, the median of five."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    def once() -> float:
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            work()
            torch.cuda.synchronize()
        kernels = [e for e in seen.events() if "Memcpy" not in e.name and "Memset" not in e.name]
        return sum(e.device_time for e in kernels) / 1e6

    once()
    return statistics.median(once() for _ in range(5))


def time_operations(device: str) -> None:
    """Each operation at the sizes of blip2-opt-2.7b: its time, and the bytes or products in it against that."""
    from blip2c import kernels

    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape).astype(np.float32)

    rows: list[tuple[str, Callable[[], Any], float, float]] = []
    for dtype, size in (("float16", 2.0), ("int8", 1.0), ("int4", 0.5625)):
        for count in (1, 5, 64, 257 * 8):
            n, k = 10240, 2560
            weight, x = kernels.PackedWeight(normal(n, k), dtype, device=device), normal(count, k)
            work = lambda weight=weight, x=x: kernels.linear(x, weight, device=device)  # noqa: E731
            rows.append((f"linear {count} x {n} x {k} {dtype}", work, n * k * size, 2.0 * count * n * k))
    x, g = normal(257 * 8, 1408), normal(1408)
    rows.append(("layer_norm 2056 x 1408", lambda: kernels.layer_norm(x, g, g, device=device), 2.0 * x.nbytes, 0.0))
    q = normal(8, 257, 1408)
    flops = 4.0 * 8 * 16 * 257 * 257 * 88
    rows.append(("attention 8 x 257, 16 of 88", lambda: kernels.attention(q, q, q, 16, device=device), 0.0, flops))
    one, past = normal(1, 1, 2560), normal(1, 60, 2560)
    decode = lambda: kernels.attention(one, past, past, 32, device=device)  # noqa: E731
    rows.append(("attention 1 x 1 over 60, 32 of 80", decode, 2.0 * past.nbytes, 0.0))
    logits = normal(5, 50304)
    rows.append(("log_softmax 5 x 50304", lambda: kernels.log_softmax(logits, device), 2.0 * logits.nbytes, 0.0))
    rows.append(("top_k 10 of 5 x 50304", lambda: kernels.top_k(logits, 10, device), 1.0 * logits.nbytes, 0.0))
    print("\n| operation | us | GB/s | TFLOP/s |\n|---|---|---|---|")
    for name, work, moved, products in rows:
        seconds = kernel_seconds(work)
        rates = [
            f"{moved / seconds / 1e9:.0f}" if moved else "",
            f"{products / seconds / 1e12:.1f}" if products else "",
        ]
        print(f"| {name} | {1e6 * seconds:.1f} | {rates[0]} | {rates[1]} |")


def median_seconds(work: Callable[[], Any], rounds: int) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    for _ in range(3):  # compiles, captures
        once()
    return statistics.median(once() for _ in range(rounds))


def model_rows(generate: Callable[[int, int, int], Any], rounds: int) -> dict[str, float]:
    """generate(pictures, tokens, beams) on the card, done when it returns."""
    one = median_seconds(lambda: generate(1, 1, 1), rounds)
    greedy = median_seconds(lambda: generate(1, NEW_TOKENS, 1), rounds)
    many = median_seconds(lambda: generate(64, NEW_TOKENS, 1), max(rounds // 3, 1))
    return {
        "caption, ms": 1e3 * greedy,
        "beam 5, ms": 1e3 * median_seconds(lambda: generate(1, NEW_TOKENS, 5), rounds),
        "a token, ms": 1e3 * (greedy - one) / (NEW_TOKENS - 1),
        "batch 64, pictures/s": 64 / many,
    }


def our_rows(folder: str, dtype: str, device: str, rounds: int) -> dict[str, float]:
    import blip2c

    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype, device=device)
    size = model.config.vision_config.image_size
    pixels = np.random.default_rng(0).standard_normal((64, 3, size, size)).astype(np.float32)
    return model_rows(
        lambda count, tokens, beams: model.generate(
            pixel_values=pixels[:count], max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams
        ),
        rounds,
    )


def their_rows(folder: str, device: str, compiled: bool, rounds: int) -> dict[str, float]:
    import torch
    from transformers import Blip2ForConditionalGeneration

    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float16).eval().to(device)
    size = model.config.vision_config.image_size
    pixels = torch.randn(64, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device, torch.float16)
    options = {"cache_implementation": "static"} if compiled else {}
    if compiled:
        model.language_model.forward = torch.compile(
            model.language_model.forward, mode="reduce-overhead", fullgraph=True
        )

    def generate(count: int, tokens: int, beams: int) -> None:
        with torch.inference_mode():
            model.generate(
                pixel_values=pixels[:count], max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams, **options
            )
        torch.cuda.synchronize()

    return model_rows(generate, rounds)


def time_models(folder: str, dtypes: list[str], device: str, peers: bool, rounds: int) -> None:
    import torch

    engines: dict[str, Callable[[], dict[str, float]]] = {
        f"blip2c {dtype}": lambda dtype=dtype: our_rows(folder, dtype, device, rounds) for dtype in dtypes
    }
    if peers:
        engines["transformers float16"] = lambda: their_rows(folder, device, False, rounds)
        engines["transformers float16, static cache, compiled"] = lambda: their_rows(folder, device, True, rounds)
    header = ""
    for name, run in engines.items():
        row = run()
        torch.cuda.empty_cache()
        if not header:
            header = " | ".join(row)
            print(f"\n| engine | {header} |\n|---|" + "---|" * len(row))
        print(f"| {name} | " + " | ".join(f"{value:.2f}" for value in row.values()) + " |", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", action="store_true", help="the checks alone, without a card")
    parser.add_argument("--checkpoint", help="a folder of true size, to be timed")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "int8", "int4"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--no-peers", action="store_true", help="leave transformers out")
    arguments = parser.parse_args()
    # transformers looks for a package called `kernels`, which must not be the script of that name beside this one.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "benchmarks"]
    sys.path.append(str(ROOT / "tests"))
    if arguments.host:
        use_host()

    from blip2c import _core

    for found in _core.cuda_devices():
        print(found)
    wrong = check_operations(arguments.device) + check_sample(arguments.device)
    if wrong or arguments.host:
        return int(wrong > 0)
    time_operations(arguments.device)
    if arguments.checkpoint:
        time_models(arguments.checkpoint, arguments.dtypes, arguments.device, not arguments.no_peers, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
