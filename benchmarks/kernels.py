"""Rates of the linear kernels beside the machine's ceilings and peers, all measured in the same run.

    python benchmarks/kernels.py [--threads 2] [--rounds 7] [--only fc1,decode]

    pip install ctranslate2 for its int8 products as well

Ceilings: multiply-adds in registers (the instruction set in use), int8 products in registers, and reading 512 MB of
memory. Weights of int8 and int4 are measured against the second, all others against the first ("pairs": bfloat16
arithmetic, where the processor has it). Peers: torch's float32, bfloat16 and dynamically quantised int8 linear (oneDNN;
its threads spin after their work: run it with OMP_WAIT_POLICY=passive), OpenBLAS as blip2c calls it for mapped float32
weights, and CTranslate2's int8, which can be asked for whole layers only: what fc1 and fc2 together take is a third of
the difference between three layers with feed-forwards twice as wide and as wide as OPT-2.7B's. Weights are rotated over
at least 320 MB (rounded ones, which take long to make: 100 MB) where few rows make memory the limit. Engines take
turns within each round; the medians of all calls are printed.

Other work on the machine shows in every figure: ratios between engines of one run mean more than rates.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from blip2c import _core, kernels

F32 = np.float32
ROTATED_BYTES = 320e6
ROTATED_BYTES_ROUNDED = 100e6
# Name, dtype, whether bfloat16 pairs are meant, bytes of an element with its share of the scales.
FORMATS = [
    ("float32", "float32", False, 4.0),
    ("float16", "float16", False, 2.0),
    ("bfloat16", "bfloat16", False, 2.0),
    ("bfloat16 pairs", "bfloat16", True, 2.0),
    ("int8", "int8", False, 1.0),
    ("int4", "int4", False, 0.5625),
]


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    out: int
    inner: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.out * self.inner


SHAPES = [
    Shape("ViT qkv", 257, 4224, 1408),
    Shape("ViT projection", 257, 1408, 1408),
    Shape("ViT fc1", 257, 6144, 1408),
    Shape("ViT fc2", 257, 1408, 6144),
    Shape("Q-Former", 32, 768, 768),
    Shape("Q-Former fc", 32, 3072, 768),
    Shape("OPT prefill fc1", 33, 10240, 2560),
    Shape("OPT prefill fc2", 33, 2560, 10240),
    Shape("OPT decode fc1", 1, 10240, 2560),
    Shape("OPT decode fc2", 1, 2560, 10240),
    Shape("OPT decode fc1, 5 beams", 5, 10240, 2560),
]


def flops_ceiling() -> float:
    return max(_core._fma_peak() for _ in range(5))


def int8_ceiling() -> float:
    return max(_core._int8_peak() for _ in range(5))


def read_ceiling() -> float:
    """Bytes per second of the check for NaN, which does nothing but read."""
    memory = np.ones((8192, 16384), F32)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        kernels.first_bad_row(memory)
        times.append(time.perf_counter() - start)
    return memory.nbytes / min(times)


def own(x: np.ndarray, weights: list[object], item_rows: int = 0) -> Callable[[], list[float]]:
    return lambda: _core._time_linear(x, weights, item_rows)


def torch_linear(
    x: np.ndarray, weights: list[np.ndarray], dtype: torch.dtype = torch.float32
) -> Callable[[], list[float]]:
    tensors, row = [torch.from_numpy(w).to(dtype) for w in weights], torch.from_numpy(x).to(dtype)

    def run() -> list[float]:
        times = []
        with torch.inference_mode():
            for w in tensors:
                start = time.perf_counter()
                torch.nn.functional.linear(row, w)
                times.append(time.perf_counter() - start)
        return times

    return run


def torch_int8(x: np.ndarray, weights: list[np.ndarray]) -> Callable[[], list[float]]:
    """oneDNN's products of bytes: x is rounded on the way."""
    warnings.filterwarnings("ignore", "torch.quantize_per_tensor")
    torch.backends.quantized.engine = "onednn"
    row, layers = torch.from_numpy(x), []
    for w in weights:
        scale = float(np.abs(w).max()) / 127
        rounded = torch.quantize_per_tensor(torch.from_numpy(w), scale, 0, torch.qint8)
        layers.append(torch.ops.quantized.linear_prepack(rounded, None))

    def run() -> list[float]:
        times = []
        with torch.inference_mode():
            for layer in layers:
                start = time.perf_counter()
                torch.ops.quantized.linear_dynamic(row, layer, False)
                times.append(time.perf_counter() - start)
        return times

    return run


def engines(shape: Shape, rng: np.random.Generator) -> dict[str, tuple[Callable[[], list[float]], float]]:
    """Name: (what runs it over all its weights once and returns seconds, bytes of one weight)."""
    x = rng.standard_normal((shape.rows, shape.inner)).astype(F32)
    elements = shape.out * shape.inner

    def copies(size: float, rotated: float = ROTATED_BYTES) -> int:
        return 1 + int(rotated // (elements * size)) if shape.rows < 16 else 1

    w = rng.standard_normal((shape.out, shape.inner), dtype=F32)
    plain = [w.copy() for _ in range(copies(4))]
    found: dict[str, tuple[Callable[[], list[float]], float]] = {}
    for name, dtype, pairs, size in FORMATS:
        count = copies(size, ROTATED_BYTES_ROUNDED if dtype.startswith("int") else ROTATED_BYTES)
        packed = [kernels.PackedWeight(w, dtype, pairs)._capsule for _ in range(count)]
        found[f"blip2c {name}"] = own(x, packed), elements * size
    found["torch float32"] = torch_linear(x, plain), elements * 4
    found["torch bfloat16"] = torch_linear(x, plain, torch.bfloat16), elements * 2
    found["torch int8"] = torch_int8(x, plain), elements
    found["OpenBLAS float32"] = own(x, plain, shape.rows), elements * 4
    return found


def measure(shape: Shape, rounds: int, peaks: dict[str, float], read: float) -> None:
    running = engines(shape, np.random.default_rng(0))
    times: dict[str, list[float]] = {name: [] for name in running}
    for i in range(rounds + 1):
        for name, (run, _) in running.items():
            taken = run()
            if i > 0:
                times[name] += taken
    print(f"\n{shape.name}: {shape.rows} x {shape.inner} -> {shape.out}")
    reference = statistics.median(times["torch float32"])
    for name, (_, size) in running.items():
        t, peak = statistics.median(times[name]), peaks["int8" if "int" in name else "float"]
        print(
            f"  {name:21} {t * 1e3:8.3f} ms  {shape.flops / t / 1e9:5.0f} GF/s ({shape.flops / t / peak:4.0%})"
            f"  {size / t / 1e9:5.1f} GB/s ({size / t / read:4.0%})  {reference / t:5.2f} x torch"
        )


LAYERS = 3


def feed_forwards(folder: str, width: int, inner: int, threads: int) -> Any:
    """CTranslate2's generator for LAYERS random OPT layers, int8."""
    import ctranslate2
    from ctranslate2.specs import common_spec, transformer_spec

    rng = np.random.default_rng(0)  # equal weights would become one

    def fill(spec: Any, out: int, into: int) -> None:
        spec.weight = rng.standard_normal((out, into), dtype=F32) * F32(0.02)
        spec.bias = np.zeros(out, F32)

    def norm(spec: Any) -> None:
        spec.gamma, spec.beta = np.ones(width, F32), np.zeros(width, F32)

    model = transformer_spec.TransformerDecoderModelSpec.from_config(
        LAYERS, width // 80, pre_norm=True, activation=common_spec.Activation.RELU
    )
    decoder = model.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = np.ones((64, width), F32)
    decoder.position_encodings.encodings = np.zeros((64, width), F32)
    decoder.projection.weight = decoder.embeddings.weight
    norm(decoder.layer_norm)
    for layer in decoder.layer:
        fill(layer.self_attention.linear[0], 3 * width, width)
        fill(layer.self_attention.linear[1], width, width)
        fill(layer.ffn.linear_0, inner, width)
        fill(layer.ffn.linear_1, width, inner)
        norm(layer.self_attention.layer_norm)
        norm(layer.ffn.layer_norm)
    model.register_vocabulary([f"<{i}>" for i in range(64)])
    model.config.bos_token = model.config.eos_token = model.config.unk_token = "<2>"
    model.validate()
    model.optimize(quantization="int8")
    model.save(folder)
    return ctranslate2.Generator(folder, compute_type="int8", intra_threads=threads)


def beside_ctranslate2(rounds: int, threads: int, width: int = 2560, inner: int = 10240) -> None:
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        narrow, wide = feed_forwards(one, width, inner, threads), feed_forwards(two, width, 2 * inner, threads)
        rng, ours = np.random.default_rng(0), []
        for out, into in ((inner, width), (width, inner)):
            w = rng.standard_normal((out, into), dtype=F32)
            ours.append((into, [kernels.PackedWeight(w, "int8")._capsule for _ in range(LAYERS)]))
        print(f"\nfc1 and fc2, {width} and {inner}, int8")
        for name, prompts in (("33 rows", [["<3>"] * 33]), ("1 row", [["<3>"]]), ("5 rows", [["<3>"]] * 5)):
            rows = sum(map(len, prompts))
            times: list[list[float]] = [[], [], []]
            for i in range(rounds + 1):
                taken = []
                for model in (narrow, wide):
                    start = time.perf_counter()
                    model.forward_batch(prompts)
                    taken.append(time.perf_counter() - start)
                own_times = [_core._time_linear(np.ones((rows, into), F32), weights, 0) for into, weights in ours]
                if i > 0:
                    for kept, value in zip(times, [*taken, sum(map(sum, own_times))], strict=True):
                        kept.append(value / LAYERS)
            low, high, own_time = map(statistics.median, times)
            print(
                f"  {name}: CTranslate2 {(high - low) * 1e3:.3f} ms, blip2c {own_time * 1e3:.3f} ms:"
                f" {(high - low) / own_time:.2f} x"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="comma-separated parts of names")
    arguments = parser.parse_args()
    _core.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    peaks, read = {"float": flops_ceiling(), "int8": int8_ceiling()}, read_ceiling()
    info = _core.cpu_info()
    print(f"{info['brand']}, {info['isa']}, {arguments.threads} threads, torch {torch.__version__}")
    ceilings = peaks["float"], peaks["int8"], read
    print("ceilings: {:.0f} GF/s, int8 {:.0f} Gop/s, reading {:.1f} GB/s".format(*(c / 1e9 for c in ceilings)))
    for shape in SHAPES:
        if any(part in shape.name for part in arguments.only.split(",")):
            measure(shape, arguments.rounds, peaks, read)
    if find_spec("ctranslate2") and not arguments.only:
        beside_ctranslate2(arguments.rounds, arguments.threads)
    again = flops_ceiling(), int8_ceiling(), read_ceiling()
    print("\nceilings again: {:.0f} GF/s, int8 {:.0f} Gop/s, reading {:.1f} GB/s".format(*(c / 1e9 for c in again)))


if __name__ == "__main__":
    main()
