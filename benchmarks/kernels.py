"""Rates of the kernels at blip2-opt-2.7b's sizes beside the machine's ceilings and peers, all measured in the same run.

    python benchmarks/kernels.py [--threads 2] [--rounds 7] [--only fc1,decode]

    pip install ctranslate2 for its int8 products as well

Ceilings: products in registers (multiply-adds of float32, pairs of bfloat16 where the processor has them, int8; of the
instruction set in use) and reading 512 MB of memory. "pairs" is bfloat16 arithmetic, which bfloat16 weights get when
many rows meet them. Peers: torch's float32, bfloat16 and dynamically quantised int8 linear (oneDNN; its threads spin
after their work: run it with OMP_WAIT_POLICY=passive) and its attention, OpenBLAS as blip2c calls it for mapped float32
weights, and CTranslate2's int8, which can be asked for whole layers only: what fc1 and fc2 together take is a third of
the difference between three layers with feed-forwards twice as wide and as wide as OPT-2.7B's. Weights are rotated over
at least 320 MB (rounded ones, which take long to make: 100 MB) where few rows make memory the limit, keys and values
over 32 layers where one token is decoded. Engines take turns within each round; the medians of all calls are printed.

Other work on the machine shows in every figure: ratios between engines of one run mean more than rates.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import machine
import numpy as np
import torch

from blip2c import _core, kernels

F32 = np.float32
ROTATED_BYTES = 320e6
ROTATED_BYTES_ROUNDED = 100e6
# Name, dtype, whether bfloat16 pairs are meant, arithmetic.
FORMATS = [
    ("float32", "float32", False, "float32"),
    ("float16", "float16", False, "float32"),
    ("bfloat16", "bfloat16", False, "float32"),
    *([("bfloat16 pairs", "bfloat16", True, "bfloat16")] if machine.arithmetic_of("bfloat16") == "bfloat16" else []),
    ("int8", "int8", False, "int8"),
    ("int4", "int4", False, "int8"),
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
    Shape("Q-Former cross key", 257, 768, 1408),
    Shape("OPT prefill query", 33, 2560, 2560),
    Shape("OPT prefill fc1", 33, 10240, 2560),
    Shape("OPT prefill fc2", 33, 2560, 10240),
    Shape("OPT decode query", 1, 2560, 2560),
    Shape("OPT decode fc1", 1, 10240, 2560),
    Shape("OPT decode fc2", 1, 2560, 10240),
    Shape("OPT decode head", 1, 50304, 2560),
    Shape("OPT decode fc1, 5 beams", 5, 10240, 2560),
    Shape("OPT decode fc2, 5 beams", 5, 2560, 10240),
    Shape("OPT decode head, 5 beams", 5, 50304, 2560),
]


@dataclass(frozen=True)
class Attention:
    name: str
    batch: int
    queries: int  # of a row
    keys: int
    heads: int
    width: int  # of a head
    causal: bool = False
    layers: int = 1  # whose keys and values take turns

    @property
    def flops(self) -> float:
        seen = (self.keys + 1) / 2 if self.causal else self.keys
        return 4.0 * self.batch * self.queries * seen * self.heads * self.width

    @property
    def bytes(self) -> float:
        return 8.0 * self.batch * self.keys * self.heads * self.width


ATTENTIONS = [
    Attention("ViT attention", 1, 257, 257, 16, 88),
    Attention("Q-Former attention", 1, 32, 32, 12, 64),
    Attention("Q-Former cross attention", 1, 32, 257, 12, 64),
    Attention("OPT prefill attention", 1, 33, 33, 32, 80, causal=True),
    Attention("OPT decode attention", 1, 1, 53, 32, 80, layers=32),
    Attention("OPT decode attention, 5 rows", 5, 1, 53, 32, 80, layers=32),
]

Engine = Callable[[], list[float]]  # does its work once with each of its weights, returns the seconds of each
Ceilings = dict[str, float]  # "float32", "bfloat16", "int8": operations per second; "read": bytes per second


def ceilings() -> Ceilings:
    return {name: machine.peak(name) for name in ("float32", "bfloat16", "int8")} | {"read": machine.read_rate()}


def ceiling_line(found: Ceilings) -> str:
    return (
        f"{found['float32'] / 1e9:.0f} GF/s float32, {found['bfloat16'] / 1e9:.0f} bfloat16, "
        f"{found['int8'] / 1e9:.0f} Gop/s int8, reading {found['read'] / 1e9:.1f} GB/s"
    )


def own(x: np.ndarray, weights: list[Any], item_rows: int = 0) -> Engine:
    return lambda: _core._time_linear(x, weights, item_rows)


def torch_linear(x: np.ndarray, weights: list[np.ndarray], dtype: torch.dtype = torch.float32) -> Engine:
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


def torch_int8(x: np.ndarray, weights: list[np.ndarray]) -> Engine:
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


def engines(shape: Shape, rng: np.random.Generator) -> dict[str, tuple[Engine, str, float]]:
    """Name: (what runs it, arithmetic, bytes of one weight)."""
    x = rng.standard_normal((shape.rows, shape.inner)).astype(F32)
    elements = shape.out * shape.inner

    def copies(size: float, rotated: float = ROTATED_BYTES) -> int:
        return 1 + int(rotated // (elements * size)) if shape.rows < 16 else 1

    w = rng.standard_normal((shape.out, shape.inner), dtype=F32)
    plain: list[Any] = [w.copy() for _ in range(copies(4))]
    found: dict[str, tuple[Engine, str, float]] = {}
    for name, dtype, pairs, arithmetic in FORMATS:
        size = machine.HELD[dtype]
        count = copies(size, ROTATED_BYTES_ROUNDED if dtype.startswith("int") else ROTATED_BYTES)
        packed: list[Any] = [kernels.PackedWeight(w, dtype, pairs)._capsule for _ in range(count)]
        few = shape.rows < 16 and arithmetic == "bfloat16"
        found[f"blip2c {name}"] = own(x, packed), "float32" if few else arithmetic, elements * size
    found["torch float32"] = torch_linear(x, plain), "float32", elements * 4
    if machine.arithmetic_of("bfloat16") == "bfloat16":
        found["torch bfloat16"] = torch_linear(x, plain, torch.bfloat16), "bfloat16", elements * 2
    found["torch int8"] = torch_int8(x, plain), "int8", elements
    found["OpenBLAS float32"] = own(x, plain, shape.rows), "float32", elements * 4
    return found


def attention_engines(shape: Attention, rng: np.random.Generator) -> dict[str, tuple[Engine, str, float]]:
    """As engines(). torch gets every head's rows side by side in memory, as they lie behind a product."""
    inner = shape.heads * shape.width
    layers = [
        [
            rng.standard_normal((shape.batch, n, inner), dtype=F32) * F32(0.5)
            for n in (shape.queries, shape.keys, shape.keys)
        ]
        for _ in range(shape.layers)
    ]

    def timed(work: Callable[..., Any], inputs: list[list[Any]]) -> Engine:
        def run() -> list[float]:
            times = []
            with torch.inference_mode():
                for q, k, v in inputs:
                    start = time.perf_counter()
                    work(q, k, v)
                    times.append(time.perf_counter() - start)
            return times

        return run

    def own_attention(q: Any, k: Any, v: Any) -> None:
        kernels.attention(q, k, v, shape.heads, causal=shape.causal)

    def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=shape.causal)

    def split(dtype: torch.dtype) -> list[list[Any]]:
        return [
            [torch.from_numpy(x).to(dtype).view(*x.shape[:2], shape.heads, -1).transpose(1, 2) for x in layer]
            for layer in layers
        ]

    found = {
        "blip2c float32": (timed(own_attention, layers), "float32", shape.bytes),
        "torch float32": (timed(torch_attention, split(torch.float32)), "float32", shape.bytes),
    }
    if machine.arithmetic_of("bfloat16") == "bfloat16":
        found["torch bfloat16"] = (
            timed(torch_attention, split(torch.bfloat16)), "bfloat16", shape.bytes / 2,
        )  # fmt: skip
    return found


def measure(
    title: str, flops: float, running: dict[str, tuple[Engine, str, float]], rounds: int, limits: Ceilings
) -> None:
    times: dict[str, list[float]] = {name: [] for name in running}
    for i in range(rounds + 1):
        for name, (run, _, _) in running.items():
            taken = run()
            if i > 0:
                times[name] += taken
    print(f"\n{title}")
    reference = statistics.median(times["torch float32"])
    for name, (_, arithmetic, size) in running.items():
        t = statistics.median(times[name])
        print(
            f"  {name:21} {t * 1e3:8.3f} ms  {flops / t / 1e9:5.0f} Gop/s ({flops / t / limits[arithmetic]:4.0%})"
            f"  {size / t / 1e9:5.1f} GB/s ({size / t / limits['read']:4.0%})  {reference / t:5.2f} x torch float32",
            flush=True,
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


def keep_freed_memory() -> None:
    """Else every output and every scratch would be new pages, which a model's calls are not."""
    libc = ctypes.CDLL(None)
    m_trim_threshold, m_mmap_threshold = -1, -3
    libc.mallopt(m_mmap_threshold, 1 << 30)
    libc.mallopt(m_trim_threshold, 1 << 30)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="comma-separated parts of names")
    arguments = parser.parse_args()
    keep_freed_memory()
    _core.set_num_threads(arguments.threads)
    torch.set_num_threads(arguments.threads)
    limits, rng = ceilings(), np.random.default_rng(0)
    print(f"{machine.title()}, torch {torch.__version__}")
    print(f"ceilings: {ceiling_line(limits)}")

    def asked(name: str) -> bool:
        return any(part in name for part in arguments.only.split(","))

    for shape in SHAPES:
        if asked(shape.name):
            title = f"{shape.name}: {shape.rows} x {shape.inner} -> {shape.out}"
            measure(title, shape.flops, engines(shape, rng), arguments.rounds, limits)
    for seen in ATTENTIONS:
        if asked(seen.name):
            title = f"{seen.name}: {seen.batch} x {seen.queries} queries, {seen.keys} keys, {seen.heads} x {seen.width}"
            measure(title, seen.flops, attention_engines(seen, rng), arguments.rounds, limits)
    if find_spec("ctranslate2") and not arguments.only:
        beside_ctranslate2(arguments.rounds, arguments.threads)
    print(f"\nceilings again: {ceiling_line(ceilings())}")


if __name__ == "__main__":
    main()
