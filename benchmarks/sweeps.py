"""How cost grows: pictures, their size, rows, beams, new tokens, prompt, threads; each curve beside its floor, plotted.

    python benchmarks/make_checkpoint.py /tmp/blip2-opt-2.7b-random
    python benchmarks/sweeps.py /tmp/blip2-opt-2.7b-random --dtypes int8

Writes one PNG for each sweep and figures.json into OUT. Figures of other dtypes and sweeps that are there already, of
the same machine, stay: a long run may be done in pieces (--dtypes, --only), each of which draws all that is there.
int8 and int4 load from a packed folder beside the checkpoint, written when it is missing.

A floor is what the machine could do at best, measured just before the curve: for each pass over the model the longer
of two times, in which its weights (and, while decoding, the keys and values) could be read and in which its products
could be done in registers, at the rate of the arithmetic that the dtype asks for. Attention counts as float32. Other
work on the machine shows in every figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import numpy as np
from caption import generation, packed_folder, quantize

import blip2c
from blip2c import _core

NEW_TOKENS, TEXT = 20, 1
REPEAT_SECONDS = 2.0  # a point is repeated, three times at most, as long as it has not taken this
Point = tuple[float, float, float]  # x, seconds, seconds at the floor


def median_time(work: Callable[[], Any]) -> float:
    times: list[float] = []
    while not times or (len(times) < 3 and sum(times) < REPEAT_SECONDS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


class Rates:
    """Ceilings with the present number of threads: reading, and products of each kind."""

    def __init__(self) -> None:
        self.read = machine.read_rate()
        self.peaks = {name: machine.peak(name) for name in ("float32", "bfloat16", "int8")}

    def seconds(self, size: float, operations: float, arithmetic: str) -> float:
        return max(size / self.read, operations / self.peaks[arithmetic])


class Model:
    """A loaded checkpoint, what of it is timed, and the floors of that."""

    def __init__(self, folder: str, dtype: str) -> None:
        quantize(folder, dtype)
        packed = packed_folder(folder, dtype)
        self.model = blip2c.Blip2ForConditionalGeneration.from_pretrained(
            packed or folder, **({} if packed else {"dtype": dtype})
        )
        self.core, self.dtypes = self.model._core, self.model.dtypes
        self.text, self.vision = self.model.config.text_config, self.model.config.vision_config
        self.queries = self.model.config.num_query_tokens
        if self.text.model_type == "t5":
            raise SystemExit("sweeps.py: expected a decoder alone (OPT, LLaMA), found an encoder-decoder")
        self.rates = Rates()
        self.encode(1)  # first touch of every page
        self.generate(1, TEXT, 2)

    def fits(self, tokens: int) -> bool:
        """Whether the model has positions for so many behind the picture's."""
        return self.queries + tokens <= int(self.text.max_position_embeddings)

    def encode(self, pictures: int, side: int | None = None) -> float:
        side = side or self.vision.image_size
        pixels = np.random.default_rng(0).standard_normal((pictures, 3, side, side)).astype(np.float32)
        return median_time(lambda: self.core.encode(pixels, interpolate=side != self.vision.image_size))

    def encode_floor(self, pictures: int, side: int | None = None) -> float:
        """Of the vision encoder; the Q-Former behind it would add 2 %."""
        weights, dtype = machine.vision_weights(self.vision), self.dtypes["vision"]
        every = machine.vision_operations(self.vision, pictures, side)
        attention = every - machine.vision_products(self.vision, pictures, side)
        products = self.rates.seconds(weights * machine.HELD[dtype], every - attention, machine.arithmetic_of(dtype))
        return products + attention / self.rates.peaks["float32"]

    def generate(self, batch: int, text: int, new: int, beams: int = 1) -> float:
        """The language model alone: `text` tokens behind the picture's, then `new` tokens."""
        features = np.zeros((batch, self.queries, self.text.hidden_size), np.float32)
        run = generation(self.model, features, text, beams)
        return median_time(lambda: run(new))

    def generate_floor(self, batch: int, text: int, new: int, beams: int = 1) -> float:
        """Prefill, of whose rows only the last meets the head, and new - 1 steps."""
        prompt, dtype, rates = self.queries + text, self.dtypes["language"], self.rates
        layers, head = machine.layer_weights(self.text), machine.head_weights(self.text)
        size = machine.token_bytes(self.text, dtype)
        rows = batch * prompt
        seconds = rates.seconds(size, 2 * (layers * rows + head * batch), machine.arithmetic_of(dtype))
        # bfloat16 is computed in float32 while decoding
        few = "int8" if machine.arithmetic_of(dtype) == "int8" else "float32"
        for step in range(1, new):
            past = machine.past_bytes(self.text) * batch * (prompt + step * beams)
            seconds += rates.seconds(size + past, 2 * (layers + head) * batch * beams, few)
        return seconds


@dataclass(frozen=True)
class Sweep:
    name: str
    title: str
    x: str  # label, with the unit
    points: Sequence[int]
    measure: Callable[[Model, int], tuple[float, float]]  # seconds, floor
    log: bool = True
    fits: Callable[[Model, int], bool] = lambda model, x: True


def encoded(m: Model, pictures: int) -> tuple[float, float]:
    return m.encode(pictures), m.encode_floor(pictures)


def sized(m: Model, side: int) -> tuple[float, float]:
    return m.encode(1, side), m.encode_floor(1, side)


def generated(m: Model, batch: int = 1, text: int = TEXT, new: int = NEW_TOKENS, beams: int = 1) -> tuple[float, float]:
    return m.generate(batch, text, new, beams), m.generate_floor(batch, text, new, beams)


def with_threads(m: Model, threads: int, measure: Callable[[Model], tuple[float, float]]) -> tuple[float, float]:
    most, rates = _core.get_num_threads(), m.rates
    try:
        _core.set_num_threads(threads)
        m.rates = Rates()
        return measure(m)
    finally:
        _core.set_num_threads(most)
        m.rates = rates


POWERS = (1, 2, 4, 8, 16, 32)
THREADS = range(1, _core.get_num_threads() + 1)
SWEEPS = [
    Sweep("pictures", "Encoding pictures of 224 x 224", "pictures at once", POWERS, encoded),
    Sweep("side", "Encoding a picture", "side of the picture, pixels", (224, 280, 336, 364), sized, log=False),
    Sweep(
        "rows", f"{NEW_TOKENS} tokens, greedy, after one picture each", "rows at once", POWERS,
        lambda m, n: generated(m, batch=n),
    ),
    Sweep(
        "beams", f"{NEW_TOKENS} tokens with beam search", "beams", (1, 2, 3, 5, 7, 10),
        lambda m, n: generated(m, beams=n), log=False,
    ),
    Sweep(
        "new-tokens", "Greedy tokens after one picture", "new tokens", (1, 4, 16, 64, 256),
        lambda m, n: generated(m, new=n), fits=lambda m, n: m.fits(TEXT + n),
    ),
    Sweep(
        "prompt", "One token after a picture and a text", "tokens of text in the prompt", (1, 8, 32, 128, 256, 512),
        lambda m, n: generated(m, text=n, new=1), fits=lambda m, n: m.fits(n + 1),
    ),
    Sweep(
        "threads-encoding", "Encoding a picture of 224 x 224", "threads", THREADS,
        lambda m, n: with_threads(m, n, lambda m: encoded(m, 1)), log=False,
    ),
    Sweep(
        "threads-tokens", f"{NEW_TOKENS} tokens, greedy", "threads", THREADS,
        lambda m, n: with_threads(m, n, generated), log=False,
    ),
]  # fmt: skip


def run(sweep: Sweep, model: Model, dtype: str) -> list[Point]:
    model.rates = Rates()
    found = []
    for x in sweep.points:
        if not sweep.fits(model, x):
            continue
        seconds, floor = sweep.measure(model, x)
        found.append((float(x), seconds, floor))
        print(f"{dtype}: {sweep.name} {x}: {seconds:.3f} s, {seconds / floor:.2f} x the floor", flush=True)
    return found


# -- plots -------------------------------------------------------------------------------------------------------------

COLOURS = {"float16": "#1f77b4", "float32": "#17becf", "bfloat16": "#2ca02c", "int8": "#d62728", "int4": "#9467bd"}


def plot(sweep: Sweep, curves: dict[str, list[Point]], where: str, file: Path) -> None:
    """Measured: lines with dots; floors: dashed in the same colour. The last dot says how far above its floor it is."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    figure, axes = plt.subplots(figsize=(7, 4.6))
    for dtype, points in curves.items():
        xs, seconds, floors = zip(*points, strict=True)
        colour = COLOURS.get(dtype, "black")
        axes.plot(xs, seconds, "o-", color=colour, label=dtype, linewidth=1.8, markersize=5)
        axes.plot(xs, floors, "--", color=colour, linewidth=1.3, alpha=0.75)
        axes.annotate(
            f"{seconds[-1] / floors[-1]:.2f} x", (xs[-1], seconds[-1]), xytext=(7, 0), textcoords="offset points",
            va="center", fontsize=8, color=colour,
        )  # fmt: skip
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    if sweep.log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(plain)
        # One decade alone has too few labels.
        low, high = axes.get_ylim()
        axes.yaxis.set_minor_formatter(plain if high / low < 20 else NullFormatter())
        axes.tick_params(which="minor", labelsize=8)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xticks(sorted({point[0] for points in curves.values() for point in points}))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(x=0.09)
    axes.set(xlabel=sweep.x, ylabel="seconds")
    axes.set_title(sweep.title, fontsize=12, loc="left", pad=22)
    axes.text(0, 1.025, where, transform=axes.transAxes, fontsize=8, color="0.35")
    axes.grid(which="major", alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    handles, _ = axes.get_legend_handles_labels()
    handles.append(Line2D([], [], color="0.3", linestyle="--", linewidth=1.3, label="floor (reading or products)"))
    axes.legend(handles=handles, fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtypes", nargs="+", default=["auto", "int8", "int4"])
    parser.add_argument("--only", nargs="+", choices=[sweep.name for sweep in SWEEPS], help="these sweeps alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "sweeps")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    kept, where = arguments.out / "figures.json", f"{Path(arguments.folder).name}, {machine.title()}"
    found: dict[str, dict[str, list[Point]]] = {}
    if kept.exists() and (before := json.loads(kept.read_text()))["measured"] == where:
        found = before["seconds"]
    for dtype in arguments.dtypes:
        model = Model(arguments.folder, dtype)
        held = model.dtypes["language"]
        for sweep in SWEEPS:
            if not arguments.only or sweep.name in arguments.only:
                found.setdefault(sweep.name, {})[held] = run(sweep, model, held)
                plot(sweep, found[sweep.name], where, arguments.out / f"{sweep.name}.png")
                kept.write_text(json.dumps({"measured": where, "seconds": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
