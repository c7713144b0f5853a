"""Comparing whole outputs of models, entry by entry, with transformers' ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


def entries(output: Any) -> list[tuple[str, Any]]:
    """What an output holds, by name; a cache, which blip2c gives to nobody, left out."""
    return [(name, output[name]) for name in output if name != "past_key_values" and output[name] is not None]


def pairs(found: Any, want: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(name, ours, theirs) of every tensor in two outputs; structure and names must be the same, in the same order."""
    if isinstance(want, torch.Tensor):
        yield where, found, want
    elif isinstance(want, tuple):
        assert isinstance(found, tuple), where
        assert len(found) == len(want), where
        for i, (a, b) in enumerate(zip(found, want, strict=True)):
            yield from pairs(a, b, f"{where}[{i}]")
    elif want is None:
        assert found is None, where
    else:
        ours, theirs = entries(found), entries(want)
        assert [name for name, _ in ours] == [name for name, _ in theirs], where
        for (name, a), (_, b) in zip(ours, theirs, strict=True):
            yield from pairs(a, b, f"{where}.{name}")


def assert_same(found: Any, want: Any, tolerance: float = 1e-4) -> int:
    """Every tensor of the same shape and dtype and within the tolerance; returns how many there were."""
    count = 0
    for where, a, b in pairs(found, want):
        assert isinstance(a, torch.Tensor), where
        assert a.shape == b.shape, (where, a.shape, b.shape)
        assert a.dtype == b.dtype, (where, a.dtype, b.dtype)
        difference = (a.double() - b.double()).abs().masked_fill(a == b, 0.0).max().item()  # where both are infinite
        assert difference <= tolerance, (where, difference)
        count += 1
    return count


def as_arrays(*values: Any) -> list[Any]:
    """Tensors as arrays; None stays."""
    return [None if value is None else np.asarray(value) for value in values]
