"""What the machine at hand can do at most, measured, and how much work a model is: for floors and shares of them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from blip2c import _core, kernels

# Bytes of a weight, with its share of the scales.
HELD = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "int8": 1.0, "int4": 0.5625}


def cpu_name() -> str:
    """ "AMD EPYC (family 26, model 2)": the name alone says little on a rented machine."""
    with open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    return f"{_core.cpu_info()['brand']} (family {values.get('cpu family')}, model {values.get('model')})"


def title() -> str:
    """The processor, the instruction set in use, the threads."""
    return f"{cpu_name()}, {_core.cpu_info()['isa']}, {_core.get_num_threads()} threads"


def read_rate(passes: int = 5, megabytes: int = 512) -> float:
    """Bytes per second at which all threads read memory, the best of some passes of the check for NaN."""
    memory = np.ones((megabytes * 16, 16384), np.float32)
    times = []
    for _ in range(passes):
        start = time.perf_counter()
        kernels.first_bad_row(memory)
        times.append(time.perf_counter() - start)
    return memory.nbytes / min(times)


def peak(arithmetic: str) -> float:
    """Operations per second of products in registers, the best of five: "float32", "bfloat16" or "int8".

    bfloat16 is computed in float32 by processors that have no products of it.
    """
    found = {"float32": _core._fma_peak, "bfloat16": _core._bf16_peak, "int8": _core._int8_peak}[arithmetic]
    return max(found() for _ in range(5))


def arithmetic_of(dtype: str) -> str:
    """What pictures and prompts are computed with in a dtype of `model.dtypes`: a name that peak() takes."""
    if dtype == "bfloat16":
        return "bfloat16" if _core.cpu_info()["isa"] == "avx512_bf16" else "float32"
    return "int8" if dtype in ("int8", "int4") else "float32"


def vision_weights(vision: Any) -> float:
    """Weights in the layers of a vision encoder, of its configuration."""
    layer = 4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size
    return float(vision.num_hidden_layers * layer)


def vision_products(vision: Any, pictures: int = 1, side: int | None = None) -> float:
    """Operations of the products with weights, with the patches'."""
    patches = ((side or vision.image_size) // vision.patch_size) ** 2
    patch = 2.0 * patches * 3 * vision.patch_size**2 * vision.hidden_size
    return float(pictures * (2 * vision_weights(vision) * (patches + 1) + patch))


def vision_operations(vision: Any, pictures: int = 1, side: int | None = None) -> float:
    """Of the products with weights and of attention."""
    tokens = ((side or vision.image_size) // vision.patch_size) ** 2 + 1
    attention = 4.0 * tokens**2 * vision.hidden_size * vision.num_hidden_layers
    return float(vision_products(vision, pictures, side) + pictures * attention)


def layer_weights(text: Any) -> float:
    """Weights that the layers of a language model read for a token; of an encoder-decoder, the decoder's."""
    if text.model_type == "t5":  # keys and values of the encoder's rows are there already
        inner = text.num_heads * text.d_kv
        return float(text.num_decoder_layers * text.d_model * (6 * inner + 3 * text.d_ff))
    width = text.hidden_size
    if text.model_type == "opt":
        return float(text.num_hidden_layers * (4 * width**2 + 2 * width * text.ffn_dim))
    grouped = text.num_key_value_heads / text.num_attention_heads
    return float(text.num_hidden_layers * width * ((2 + 2 * grouped) * width + 3 * text.intermediate_size))


def head_weights(text: Any) -> float:
    return float(text.vocab_size * (text.d_model if text.model_type == "t5" else text.hidden_size))


def token_bytes(text: Any, dtype: str) -> float:
    """Bytes of weights that one decoded token reads (keys and values are 1 to 2 % of that)."""
    head = "int8" if dtype == "int4" else dtype
    return layer_weights(text) * HELD[dtype] + head_weights(text) * HELD[head]


def past_bytes(text: Any) -> float:
    """Of one token's keys and values in all layers, float32; not of an encoder-decoder."""
    heads = text.num_attention_heads
    grouped = getattr(text, "num_key_value_heads", heads) / heads
    return float(8 * text.num_hidden_layers * text.hidden_size * grouped)
