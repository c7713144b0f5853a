"""Where a model computes: the processor, or a CUDA device. docs/CUDA.md has what that takes."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from blip2c import _core
from blip2c._core import UnsupportedError

# What device_map and device may say for the processor: no model here is split over several places.
_PROCESSOR = ("None", "cpu", "auto", "balanced", "balanced_low_0", "sequential")


def read_device(device: Any) -> str:
    """ "cpu" or "cuda:0", "cuda:1" ... of a name, a number (torch's: of a CUDA device), a torch.device or a device_map.

    None, "auto" and the other names of accelerate's plans mean the processor. Raises UnsupportedError for another kind
    of device and for a map to several, ValueError for a CUDA device that is misspelt.
    """
    places = list(device.values()) if isinstance(device, Mapping) else [device]
    names = sorted({_name_of(place) for place in places}) or ["cpu"]
    if len(names) > 1:
        raise UnsupportedError(f"device_map: a model is in one place, found {', '.join(names)}")
    return names[0]


def _name_of(place: Any) -> str:
    if not isinstance(place, bool) and hasattr(place, "__index__"):
        index = operator.index(place)
        if index < 0:
            raise ValueError(f"device: expected a number of a CUDA device, found {index}")
        return f"cuda:{index}"
    name = str(place)
    if name in _PROCESSOR or name.split(":")[0] == "cpu":
        return "cpu"
    kind, colon, number = name.partition(":")
    if kind != "cuda":
        raise UnsupportedError(f"device {place!r}: blip2c computes on cpu and cuda")
    if not colon:
        return "cuda:0"
    if not number.isdecimal():
        raise ValueError(f"device: expected cuda or cuda:0, cuda:1 ..., found {name}")
    return f"cuda:{int(number)}"


def describe_devices() -> dict[str, Any]:
    """{"devices": list of dicts, "why_not": None or the reason why there is none}."""
    try:
        return {"devices": _core.cuda_devices(), "why_not": None}
    except (UnsupportedError, RuntimeError, MemoryError) as error:
        return {"devices": [], "why_not": str(error)}
