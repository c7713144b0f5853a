"""`ModelOutput`, what models return: entries by name, by attribute or by number; `Like`: in whose type."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c._core import DeviceArray, Model
from blip2c.images import is_torch
from blip2c.inputs import is_on_cuda


class ModelOutput(dict[str, Any]):
    """An ordered dictionary of the entries that are not None (upstream: transformers.utils.ModelOutput).

    An entry that was left out (None) still answers as an attribute.
    """

    def __init__(self, **entries: Any) -> None:
        super().__init__({name: value for name, value in entries.items() if value is not None})
        object.__setattr__(self, "_names", frozenset(entries))

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return super().__getitem__(name)
        if name in self.__dict__.get("_names", ()):
            return None
        raise AttributeError(f"this output has no {name!r}, only {', '.join(self)}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __reduce__(self) -> Any:
        return _rebuild, (dict(self), sorted(self.__dict__["_names"]))

    def __iter__(self) -> Iterator[str]:
        return super().__iter__()

    def to_tuple(self) -> tuple[Any, ...]:
        """The entries in order; outputs inside become tuples too."""
        return tuple(v.to_tuple() if isinstance(v, ModelOutput) else v for v in self.values())


def _rebuild(entries: dict[str, Any], names: list[str]) -> ModelOutput:
    return ModelOutput(**{**dict.fromkeys(names), **entries})


class Like:
    """Gives results back as what came in: tensors where it was for a tensor, arrays for anything else.

    core: of the model. `stays`: what came in lies on its device, and so do the results: tensors over the same memory,
    or DeviceArrays for others.
    """

    def __init__(self, value: Any, dtype: str, core: Model | None = None) -> None:
        self.core = core
        self.stays = core is not None and core.device != "cpu" and is_on_cuda(value)
        self.torch = sys.modules["torch"] if is_torch(value) else None
        self.device = value.device if self.torch is not None else "cpu"
        self.dtype = dtype

    @classmethod
    def loaded(cls, dtype: str) -> Like:
        """For what is not an answer to an input: tensors where torch is loaded."""
        like = cls(None, dtype)
        like.torch = sys.modules.get("torch")
        return like

    def floats(self, array: NDArray[np.float32] | DeviceArray, keep: bool = False) -> Any:
        """float32 array; or a tensor of the model's dtype (float32 where `keep`)."""
        if self.torch is None:
            return self.core.put(array) if self.stays and self.core and isinstance(array, np.ndarray) else array
        if isinstance(array, DeviceArray):
            tensor = self.torch.from_dlpack(array)
        else:
            tensor = self.torch.from_numpy(np.ascontiguousarray(array)).to(self.device)
        return tensor if keep or self.dtype == "float32" else tensor.to(getattr(self.torch, self.dtype))

    def number(self, value: np.float32) -> Any:
        """A float32 scalar, of NumPy's or a tensor without axes."""
        return value if self.torch is None else self.torch.tensor(value, dtype=self.torch.float32, device=self.device)

    def ids(self, array: NDArray[np.int64]) -> Any:
        """int64 array or tensor."""
        return array if self.torch is None else self.torch.from_numpy(array).to(self.device)
