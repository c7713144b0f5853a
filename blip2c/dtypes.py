"""What `dtype=` may say, here and on the command line. docs/DTYPES.md has what each computes, and how exactly."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from blip2c import _core
from blip2c.batch import dtype_name

PARTS = ("vision", "qformer", "language")
QUANTISED = ("int8", "int4")
NAMES = ("auto", "float32", "float16", "bfloat16", *QUANTISED)
# A name for the whole model, or one for each part that is named.
Dtype = str | dict[str, str]


def _one(value: Any, where: str) -> str:
    if value is None:
        return "auto"
    if isinstance(value, str) and value in NAMES:
        return value
    try:
        return dtype_name(value)
    except ValueError as error:
        raise ValueError(f"{where}: expected {', '.join(NAMES)}, found {value!r}") from error


def read_dtype(dtype: Any) -> Dtype:
    """`dtype` as the C part takes it: a name, a NumPy or torch dtype, or a mapping from PARTS to those.

    None is "auto". Raises ValueError for an unknown name or part.
    """
    if not isinstance(dtype, Mapping):
        return _one(dtype, "dtype")
    for part in dtype:
        if part not in PARTS:
            raise ValueError(f"dtype: expected the parts {', '.join(PARTS)}, found {part!r}")
    return {part: _one(value, f"dtype[{part!r}]") for part, value in dtype.items()}


def parse_dtype(text: str) -> Dtype:
    """The command line's spelling: "int8", or "vision=int8,language=int4". Raises ValueError."""
    if "=" not in text:
        return read_dtype(text)
    pairs = [item.partition("=") for item in text.split(",")]
    parts = [part.strip() for part, _, _ in pairs]
    if len(set(parts)) != len(parts):
        raise ValueError(f"dtype: a part comes twice in {text!r}")
    return read_dtype({part.strip(): name.strip() for part, _, name in pairs})


def names_of(dtype: Dtype) -> set[str]:
    """The names in it."""
    return {dtype} if isinstance(dtype, str) else set(dtype.values())


def asks_to_quantise(dtype: Dtype) -> bool:
    """Whether any part is to be int8 or int4."""
    return not names_of(dtype).isdisjoint(QUANTISED)


def warn_of_missing_instructions(dtype: Dtype, stacklevel: int) -> None:
    """Says where bfloat16 was asked for by name and this processor, or BLIP2C_ISA, has no arithmetic in it."""
    cpu = _core.cpu_info()
    if "bfloat16" in names_of(dtype) and cpu["isa"] != "avx512_bf16":
        why = f"BLIP2C_ISA={cpu['isa']} leaves them out" if cpu["avx512_bf16"] else f"{cpu['brand']} has not"
        warnings.warn(
            "dtype bfloat16: weights are held in bfloat16, but computed with in float32: arithmetic in bfloat16 needs"
            f" the AVX512_BF16 instructions, which {why}".replace("which BLIP2C", "and BLIP2C"),
            stacklevel=stacklevel + 1,
        )
