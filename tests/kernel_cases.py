"""The one list of what kernels compute: arguments, the function, and the answer in float64.

test_kernels.py asks each of these of the processor, test_cuda_kernels.py of a device.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from blip2c import kernels

F32 = np.float32

# Largest |found - float64| / scale. The scale of a sum is the sum of absolute values, so that cancellation is no excuse
# and a single term that is missing shows.
TOLERANCE = {
    "linear": 5e-7,
    "layer_norm": 1e-6,
    "rms_norm": 5e-7,
    "gate": 4e-7,
    "activation": 2.5e-7,
    "log_softmax": 3e-7,
    "attention": 1.5e-6,
    "rope": 2e-7,
    "exact": 0.0,
}
# Rounding of the weight, to compare with the weight before it was packed.
STORAGE = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8}


@dataclass(frozen=True)
class Case:
    name: str
    tolerance: str
    make: Callable[[np.random.Generator], dict[str, Any]]
    """The arrays, by argument name."""
    run: Callable[..., Any]
    reference: Callable[..., tuple[np.ndarray, np.ndarray | float]]
    """In float64: the value, and the scale that errors are measured against."""
    rows: tuple[str, ...]
    """Arguments whose first axis counts the rows of the output: these may be computed alone."""


def normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(F32)


def widened(stored: np.ndarray) -> np.ndarray:
    """float64 of what is stored: float32, float16, or bfloat16 bits."""
    if stored.dtype == np.uint16:
        return (stored.astype(np.uint32) << 16).view(F32).astype(np.float64)
    return stored.astype(np.float64)


ACTIVATIONS_64 = {
    "none": lambda t: t,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "quick_gelu": lambda t: t * torch.sigmoid(1.702 * t),
    "silu": torch.nn.functional.silu,
}


def activate(x: np.ndarray, name: str) -> np.ndarray:
    return ACTIVATIONS_64[name](torch.from_numpy(x)).numpy()


def linear_case(m: int, n: int, k: int, dtype: str = "float32", activation: str = "none", method: str = "packed",
                bias: bool = True, residual: bool = True, item_rows: int = 0) -> Case:  # fmt: skip
    def make(rng: np.random.Generator) -> dict[str, Any]:
        arrays = {"x": normal(rng, m, k), "weight": normal(rng, n, k, scale=k**-0.5)}
        arrays["weight"] = kernels.PackedWeight(arrays["weight"], dtype).unpack()
        if bias:
            arrays["bias"] = normal(rng, n)
        if residual:
            arrays["residual"] = normal(rng, m, n)
        return arrays

    def reference(x, weight, bias=0.0, residual=0.0):
        x, w = x.astype(np.float64), widened(weight)
        value = activate(x @ w.T + bias, activation) + residual
        return value, 1.2 * (np.abs(x) @ np.abs(w.T) + np.abs(bias)) + np.abs(residual)

    options = {"activation": activation, "method": method, "item_rows": item_rows}
    name = f"linear-{m}x{n}x{k}-{dtype}-{activation}-{method}{item_rows or ''}"
    name += ("" if bias else "-nobias") + ("" if residual else "-nores")
    rows = ("x", "residual") if residual else ("x",)
    return Case(name, "linear", make, partial(kernels.linear, **options), reference, rows)


def norm_case(m: int, d: int, affine: bool = True, eps: float = 1e-6) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        arrays = {"x": normal(rng, m, d, scale=3.0) + F32(1.0)}
        if affine:
            arrays |= {"weight": normal(rng, d), "bias": normal(rng, d)}
        return arrays

    def reference(x, weight=1.0, bias=0.0):
        x = x.astype(np.float64)
        y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return y * weight + bias, np.abs(y * weight) + np.abs(bias) + np.abs(weight)

    return Case(f"layer_norm-{m}x{d}{'' if affine else '-plain'}", "layer_norm", make,
                partial(kernels.layer_norm, eps=eps), reference, ("x",))  # fmt: skip


def rms_norm_case(m: int, d: int, eps: float = 1e-6) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {"x": normal(rng, m, d, scale=3.0) + F32(1.0), "weight": normal(rng, d)}

    def reference(x, weight):
        x = x.astype(np.float64)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight
        return y, np.abs(y) + 1e-30

    return Case(f"rms_norm-{m}x{d}", "rms_norm", make, partial(kernels.rms_norm, eps=eps), reference, ("x",))


def gate_case(name: str, m: int, n: int) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {"gate": normal(rng, m, n, scale=4.0), "up": normal(rng, m, n)}

    def reference(gate, up):
        gate = gate.astype(np.float64)
        return activate(gate, name) * up, np.maximum(1.0, np.abs(gate)) * np.abs(up) + 1e-30

    return Case(f"gate-{name}-{m}x{n}", "gate", make, partial(kernels.gate, activation=name), reference,
                ("gate", "up"))  # fmt: skip


def activation_case(name: str, n: int) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {"x": np.concatenate([normal(rng, n, scale=4.0), np.linspace(-12, 12, n).astype(F32)])}

    def reference(x):
        x = x.astype(np.float64)
        return activate(x, name), np.maximum(1.0, np.abs(x))

    return Case(f"activation-{name}-{n}", "activation", make, partial(kernels.activation, name=name), reference, ("x",))


def log_softmax_case(m: int, v: int, scale: float) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {"x": normal(rng, m, v, scale=scale)}

    def reference(x):
        value = torch.log_softmax(torch.from_numpy(x).double(), -1).numpy()
        return value, np.abs(value) + np.abs(x).max() + 1.0

    return Case(f"log_softmax-{m}x{v}", "log_softmax", make, kernels.log_softmax, reference, ("x",))


def top_k_case(m: int, v: int, k: int) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {"x": rng.integers(0, max(2, v // 2), (m, v)).astype(F32)}  # full of ties

    def run(x, device="cpu"):
        values, ids = kernels.top_k(x, k, device)
        return np.stack([values, ids.astype(F32)], 1)

    def reference(x):
        ids = np.argsort(-x, axis=-1, kind="stable")[:, :k]
        return np.stack([np.take_along_axis(x, ids, -1), ids], 1).astype(np.float64), 1.0

    return Case(f"top_k-{m}x{v}-{k}", "exact", make, run, reference, ("x",))


def embedding_case(v: int, d: int, n: int, dtype: str, packed: bool, add: bool) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        table = kernels.PackedWeight(normal(rng, v, d), dtype).unpack()
        arrays = {"table": table, "ids": rng.integers(0, v, n).astype(np.int32)}
        return arrays | ({"added_to": normal(rng, n, d)} if add else {})

    def run(table, ids, added_to=None, device="cpu"):
        table = kernels.PackedWeight(table, device=device) if packed else table
        return kernels.embedding(table, ids, added_to, device)

    def reference(table, ids, added_to=None):
        found = widened(table)[ids]
        return (found if added_to is None else (found + added_to).astype(F32).astype(np.float64)), 1.0

    name = f"embedding-{v}x{d}-{dtype}{'-packed' if packed else ''}{'-added' if add else ''}"
    return Case(name, "exact", make, run, reference, ("ids", "added_to") if add else ("ids",))


def patches_case(b: int, c: int, height: int, width: int, p: int) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {"pixels": normal(rng, b, c, height, width)}

    def reference(pixels):
        unfolded = torch.nn.functional.unfold(torch.from_numpy(pixels), p, stride=p)
        return unfolded.transpose(1, 2).double().numpy(), 1.0

    name = f"patches-{b}x{c}x{height}x{width}-{p}"
    return Case(name, "exact", make, partial(kernels.patches, patch=p), reference, ("pixels",))


def add_rows_case(m: int, n: int, d: int) -> Case:
    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {"x": normal(rng, m * n, d), "rows": normal(rng, n, d)}

    def reference(x, rows):
        return (x + np.tile(rows, (len(x) // len(rows), 1))).astype(np.float64), 1.0

    return Case(f"add_rows-{m}x{n}x{d}", "exact", make, kernels.add_rows, reference, ())


def rope_case(n: int, heads: int, head_dim: int, rotary: int, scaling: float = 1.0) -> Case:
    frequencies = (10000.0 ** -(np.arange(rotary // 2) / max(rotary // 2, 1))).astype(F32)

    def make(rng: np.random.Generator) -> dict[str, Any]:
        return {"x": normal(rng, n, heads * head_dim), "positions": rng.integers(0, 5000, n).astype(np.int32)}

    def reference(x, positions):
        # The angle is a float32 product, as in transformers; the rest in float64.
        angle = np.tile((positions.astype(F32)[:, None] * frequencies).astype(np.float64), 2)[:, None]
        x = x.astype(np.float64).reshape(n, heads, head_dim)
        turned = x[..., :rotary]
        half = np.concatenate([-turned[..., rotary // 2 :], turned[..., : rotary // 2]], -1)
        value = (turned * np.cos(angle) + half * np.sin(angle)) * scaling
        size = (np.abs(turned) + np.abs(half)) * scaling
        whole = (np.concatenate([part, x[..., rotary:]], -1) for part in (value, size))
        value, size = (part.reshape(n, -1) for part in whole)
        return value, np.abs(size)

    options = {"inv_freq": frequencies, "head_dim": head_dim, "scaling": scaling}
    return Case(f"rope-{n}x{heads}x{head_dim}-{rotary}", "rope", make, partial(kernels.rope, **options), reference,
                ("x", "positions"))  # fmt: skip


def attention_64(q, k, v, heads, kv_heads, causal, scale, window=0, key_mask=None, distance_bias=None):
    """(output, output over |v|) in float64, heads one by one."""
    batch, queries, keys, width = *q.shape[:2], k.shape[1], q.shape[2] // heads
    q, k, v = (a.astype(np.float64) for a in (q, k, v))
    out, size = np.zeros(q.shape), np.zeros(q.shape)
    seen = np.ones((batch, queries, keys), bool) if key_mask is None else key_mask[:, None, :].repeat(queries, 1) != 0
    if causal:
        seen &= np.arange(keys) <= np.arange(queries)[:, None] + keys - queries
    if window:
        seen &= np.arange(keys) > np.arange(queries)[:, None] + keys - queries - window
    for b, h in itertools.product(range(batch), range(heads)):
        mine = slice(h * width, (h + 1) * width)
        theirs = slice(h * kv_heads // heads * width, (h * kv_heads // heads + 1) * width)
        scores = scale * q[b, :, mine] @ k[b, :, theirs].T
        if distance_bias is not None:
            last = distance_bias.shape[1] // 2
            distance = np.arange(keys) - (np.arange(queries)[:, None] + keys - queries)
            scores = scores + distance_bias[h, np.clip(distance, -last, last) + last]
        scores = np.where(seen[b], scores, -np.inf)
        some = seen[b].any(-1)
        p = np.exp(scores[some] - scores[some].max(-1, keepdims=True, initial=-np.inf))
        p /= p.sum(-1, keepdims=True)
        out[b, some, mine], size[b, some, mine] = p @ v[b, :, theirs], p @ np.abs(v[b, :, theirs])
    return out, size + 1e-30


def attention_case(b: int, tq: int, tk: int, heads: int, kv_heads: int, dh: int, causal: bool = False,
                   masked: str = "", window: int = 0, distances: int = 0) -> Case:  # fmt: skip
    scale = 0.7 * dh**-0.5

    def make(rng: np.random.Generator) -> dict[str, Any]:
        arrays = {"q": normal(rng, b, tq, heads * dh), "k": normal(rng, b, tk, kv_heads * dh)}
        arrays["v"] = normal(rng, b, tk, kv_heads * dh)
        if masked:
            mask = rng.random((b, tk)) < 0.6
            if masked == "left":
                mask = np.arange(tk) >= rng.integers(0, tk, (b, 1))
            if masked == "all":
                mask[0] = False
            arrays["key_mask"] = mask
        if distances:
            arrays["distance_bias"] = normal(rng, heads, 2 * distances - 1)
        return arrays

    options = {"heads": heads, "kv_heads": kv_heads, "causal": causal, "scale": scale, "window": window}
    name = f"attention-{b}x{tq}x{tk}-{heads}of{kv_heads}x{dh}{'-causal' if causal else ''}-{masked}".rstrip("-")
    name += f"-window{window}" if window else ""
    name += f"-distances{distances}" if distances else ""
    return Case(name, "attention", make, partial(kernels.attention, **options), partial(attention_64, **options),
                ("q", "k", "v", "key_mask") if masked else ("q", "k", "v"))  # fmt: skip


CASES = [
    # shapes that fit nothing
    *(linear_case(m, n, k) for m, n, k in [(1, 1, 1), (2, 3, 1), (5, 17, 3), (7, 32, 192), (257, 33, 588)]),
    # the four ways, each storage, around the sizes of register tiles and blocks of k
    *(
        linear_case(m, n, k, dtype)
        for dtype in STORAGE
        for m, n, k in [(1, 250, 513), (4, 100, 256), (6, 47, 257), (14, 129, 300), (15, 64, 700), (33, 200, 512)]
    ),
    linear_case(257, 300, 1408, "float16"),
    linear_case(301, 48, 530, "bfloat16"),
    linear_case(1150, 40, 300, "float16"),
    *(linear_case(9, 40, 65, activation=a) for a in kernels.ACTIVATIONS),
    linear_case(1, 19, 70, "float16", "gelu", residual=False),
    linear_case(20, 19, 70, "float16", "gelu", bias=False),
    *(linear_case(m, 37, 290, dtype, "relu", "rows") for m, dtype in zip((1, 23, 40), STORAGE, strict=True)),
    linear_case(3 * 26, 300, 588, "float32", "gelu", "openblas", item_rows=26),
    linear_case(33, 520, 100, "float32", "none", "openblas", residual=False, item_rows=33),
    *(norm_case(m, d) for m, d in [(1, 1), (3, 7), (33, 192), (257, 1408)]),
    norm_case(5, 100, affine=False, eps=1e-12),
    *(rms_norm_case(m, d) for m, d in [(1, 1), (3, 7), (33, 192), (40, 2049)]),
    *(gate_case(name, 5, 37) for name in kernels.ACTIVATIONS),
    gate_case("gelu_tanh", 60, 1000),
    *(activation_case(name, n) for name in kernels.ACTIVATIONS for n in (3, 5000)),
    *(log_softmax_case(m, v, s) for m, v, s in [(1, 1, 1.0), (5, 37, 10.0), (9, 50272, 3.0)]),
    *(top_k_case(m, v, k) for m, v, k in [(1, 1, 1), (9, 50, 50), (7, 5000, 10), (3, 33, 2)]),
    *(embedding_case(50, 37, 40, dtype, packed, packed) for dtype in STORAGE for packed in (False, True)),
    embedding_case(33, 16, 40, "float16", True, False),
    *(patches_case(*c) for c in [(1, 3, 28, 28, 14), (2, 3, 31, 31, 14), (3, 1, 7, 7, 3), (2, 3, 20, 45, 14)]),
    add_rows_case(3, 5, 70),
    attention_case(1, 257, 257, 2, 2, 88),
    attention_case(2, 33, 33, 4, 4, 80, causal=True),
    attention_case(3, 32, 50, 3, 3, 64),
    attention_case(2, 17, 40, 4, 2, 96, causal=True, masked="some"),
    attention_case(5, 29, 29, 2, 1, 7, causal=True, masked="left"),
    attention_case(2, 5, 21, 3, 3, 1, masked="all"),
    attention_case(3, 1, 100, 6, 2, 33, causal=True),
    attention_case(2, 0, 4, 1, 1, 8),
    attention_case(2, 45, 70, 4, 2, 20, causal=True, window=19),
    attention_case(3, 33, 33, 2, 2, 8, causal=True, masked="some", window=3),
    attention_case(3, 1, 100, 2, 1, 12, causal=True, window=40),
    attention_case(2, 9, 30, 2, 2, 8, window=7),
    rope_case(7, 3, 10, 10),
    rope_case(40, 2, 200, 200, 1.25),
    rope_case(5, 4, 24, 6),
    attention_case(2, 33, 33, 3, 3, 20, distances=9),
    attention_case(3, 21, 21, 4, 2, 9, causal=True, masked="some", distances=40),
    attention_case(2, 1, 40, 2, 2, 64, causal=True, masked="left", distances=1),
]


def arguments(case: Case) -> dict[str, Any]:
    return case.make(np.random.default_rng(len(case.name) * 7919 + sum(map(ord, case.name))))
