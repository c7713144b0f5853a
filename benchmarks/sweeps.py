"""How cost grows: batch, beams, new tokens, prompt, picture size, threads; each curve next to its floor, as plots.

    python benchmarks/make_checkpoint.py /tmp/blip2-opt-2.7b-random
    python benchmarks/sweeps.py /tmp/blip2-opt-2.7b-random --dtypes auto int8 int4 --out benchmarks/sweeps

Writes one PNG for each sweep and a JSON of all figures into OUT. A floor is what the machine could do at best, measured
in the same run: the weights read once a step at the rate of plain reading, or the multiply-adds at the rate of
the instruction set's own products, whichever is longer. Other work on the machine shows in every figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import blip2c
from blip2c import _core, kernels
from blip2c.generation import core_options

NEW_TOKENS, PROMPT = 20, 33
Curve = list[tuple[float, float, float]]  # (x, seconds, seconds at the floor)


def median_time(work: Callable[[], Any], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def read_rate() -> float:
    """Bytes per second of a pass that does nothing but read."""
    memory = np.ones((8192, 8192), np.float32)
    kernels.first_bad_row(memory)
    return memory.nbytes / min(median_time(lambda: kernels.first_bad_row(memory), 1) for _ in range(5))


class Machine:
    """Ceilings of this run: reading, and multiply-adds by dtype."""

    def __init__(self) -> None:
        self.read = read_rate()
        fma = max(_core._fma_peak() for _ in range(5))
        int8 = max(_core._int8_peak() for _ in range(5))
        self.operations = {"int8": int8, "int4": int8}
        self.fma = fma

    def floor(self, weights: float, size: float, rows: float, dtype: str) -> float:
        """Seconds for `rows` rows times `weights` weights of `size` bytes each."""
        return max(weights * size / self.read, 2 * weights * rows / self.operations.get(dtype, self.fma))


class Model:
    """A loaded checkpoint and its counts."""

    def __init__(self, folder: str, dtype: str, machine: Machine) -> None:
        self.model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
        self.core, self.machine = self.model._core, machine
        sizes = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5625}
        self.dtypes = self.model.dtypes
        self.size = {part: sizes[name] for part, name in self.dtypes.items()}
        text, vision = self.model.config.text_config, self.model.config.vision_config
        self.side, self.patch = vision.image_size, vision.patch_size
        layer = 4 * text.hidden_size**2 + 2 * text.hidden_size * text.ffn_dim
        self.language = text.num_hidden_layers * layer + text.vocab_size * text.hidden_size
        layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
        self.vision = vision.num_hidden_layers * layer
        self.queries = self.model.config.num_query_tokens
        self.positions = text.max_position_embeddings

    def pixels(self, batch: int, side: int | None = None) -> np.ndarray:
        side = side or self.side
        return np.random.default_rng(0).standard_normal((batch, 3, side, side)).astype(np.float32)

    def encode(self, batch: int, side: int | None = None) -> float:
        pixels = self.pixels(batch, side)
        return median_time(lambda: self.core.encode(pixels, interpolate=side is not None))

    def encode_floor(self, batch: int, side: int | None = None) -> float:
        tokens = 1 + ((side or self.side) // self.patch) ** 2
        return self.machine.floor(self.vision, self.size["vision"], batch * tokens, self.dtypes["vision"])

    def generate(self, batch: int, prompt: int, new: int, beams: int = 1) -> float:
        features = np.zeros((batch, self.queries, self.model.config.text_config.hidden_size), np.float32)
        rows = [[-1] * self.queries + [2 + i % 1000 for i in range(prompt - self.queries)]] * batch
        ids = np.array(rows, np.int32).ravel()
        offsets = np.arange(0, len(ids) + 1, prompt, dtype=np.int64)
        options = core_options(
            self.model.generation_config,
            {"max_new_tokens": new, "min_new_tokens": new, "num_beams": beams},
            [prompt],
        )
        return median_time(lambda: self.core.generate(features, ids, offsets, None, ids, options), 1 if new > 20 else 3)

    def generate_floor(self, batch: int, prompt: int, new: int, beams: int = 1) -> float:
        size, dtype = self.size["language"], self.dtypes["language"]
        prefill = self.machine.floor(self.language, size, batch * prompt, dtype)
        return prefill + (new - 1) * self.machine.floor(self.language, size, batch * beams, dtype)


def curve(xs: Sequence[int], measured: Callable[[int], float], floor: Callable[[int], float]) -> Curve:
    return [(x, measured(x), floor(x)) for x in xs]


def sweeps(m: Model) -> dict[str, Curve]:
    """Name (what is on the x axis): its curve."""
    found = {
        "pictures encoded": curve((1, 2, 4, 8, 16, 32), m.encode, m.encode_floor),
        "picture side": curve((224, 280, 364), lambda s: m.encode(1, s), lambda s: m.encode_floor(1, s)),
        "rows of 20 tokens": curve(
            (1, 2, 4, 8, 16, 32),
            lambda b: m.generate(b, PROMPT, NEW_TOKENS), lambda b: m.generate_floor(b, PROMPT, NEW_TOKENS),
        ),
        "beams of 20 tokens": curve(
            (1, 2, 3, 5, 7, 10),
            lambda k: m.generate(1, PROMPT, NEW_TOKENS, k), lambda k: m.generate_floor(1, PROMPT, NEW_TOKENS, k),
        ),
        "new tokens": curve(
            [n for n in (1, 4, 16, 64, 256) if PROMPT + n <= m.positions],
            lambda n: m.generate(1, PROMPT, n), lambda n: m.generate_floor(1, PROMPT, n),
        ),
        "prompt tokens": curve(
            [p for p in (33, 64, 128, 256, 512) if p < m.positions],
            lambda p: m.generate(1, p, 1), lambda p: m.generate_floor(1, p, 1),
        ),
    }  # fmt: skip
    return found | thread_sweeps(m)


def thread_sweeps(m: Model) -> dict[str, Curve]:
    """The floor of fewer threads is not known: that of all of them is drawn."""
    most = _core.get_num_threads()
    encoded, decoded = [], []
    try:
        for threads in range(1, most + 1):
            _core.set_num_threads(threads)
            encoded.append((threads, m.encode(1), m.encode_floor(1)))
            decoded.append((threads, m.generate(1, PROMPT, NEW_TOKENS), m.generate_floor(1, PROMPT, NEW_TOKENS)))
    finally:
        _core.set_num_threads(most)
    return {"threads, encoding": encoded, "threads, 20 tokens": decoded}


def plot(name: str, by_dtype: dict[str, dict[str, Curve]], out: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for dtype, curves in by_dtype.items():
        xs, seconds, floors = zip(*curves[name], strict=True)
        (line,) = axes.plot(xs, seconds, "o-", label=dtype)
        axes.plot(xs, floors, "--", color=line.get_color(), alpha=0.6, label=f"{dtype}, floor")
    axes.set(xlabel=name, ylabel="seconds", title=title)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / f"{name.replace(', ', '-').replace(' ', '-')}.png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtypes", nargs="+", default=["auto", "int8", "int4"])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "sweeps")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Curve]] = {}
    for dtype in arguments.dtypes:
        machine = Machine()
        found[dtype] = sweeps(Model(arguments.folder, dtype, machine))
        for name, points in found[dtype].items():
            for x, seconds, floor in points:
                print(f"{dtype}: {name} {x:g}: {seconds:.3f} s, {seconds / floor:.2f} x the floor", flush=True)
    info = _core.cpu_info()
    title = f"{info['brand']}, {info['isa']}, {_core.get_num_threads()} threads"
    for name in found[arguments.dtypes[0]]:
        plot(name, found, arguments.out, title)
    (arguments.out / "figures.json").write_text(json.dumps({"machine": title, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
