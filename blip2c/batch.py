"""`BatchFeature`: what a processor returns, a dictionary whose entries are attributes too."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import numpy as np

from blip2c.images import is_torch


def torch_module() -> Any:
    """torch, imported: only for callers that asked for return_tensors="pt" or already handed a tensor."""
    try:
        import torch
    except ImportError:
        raise ImportError('return_tensors="pt" needs PyTorch; use "np" to stay without it') from None
    return torch


def is_torch_dtype(value: Any) -> bool:
    """Whether it is a torch.dtype; torch is never imported to find out."""
    return type(value).__module__ == "torch" and type(value).__name__ == "dtype"


def dtype_name(value: Any) -> str:
    """ "float32", "float16" or "bfloat16" of a string, a NumPy dtype or a torch dtype. Raises ValueError."""
    name = str(value).removeprefix("torch.") if is_torch_dtype(value) else None
    if name is None and isinstance(value, str):
        name = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16", "float": "float32"}.get(
            value.removeprefix("torch."), value.removeprefix("torch.")
        )
    if name is None:
        try:
            name = np.dtype(value).name
        except TypeError:
            name = repr(value)
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(f"dtype must be float32, float16 or bfloat16, found {name}")
    return name


class BatchFeature(UserDict[str, Any]):
    """pixel_values [B, 3, S, S], input_ids [B, T], attention_mask [B, T] by name, as lists, arrays or tensors.

    tensor_type: "np", "pt" or None (lists stay lists).
    """

    def __init__(self, data: dict[str, Any] | None = None, tensor_type: str | None = None) -> None:
        super().__init__(data or {})
        self.convert_to_tensors(tensor_type)

    def __getitem__(self, item: str) -> Any:
        if not isinstance(item, str):
            raise KeyError("indexing with integers is not available, name an entry")
        return self.data[item]

    def __getattr__(self, item: str) -> Any:
        if item == "data":  # not there yet while being unpickled
            raise AttributeError(item)
        try:
            return self.data[item]
        except KeyError:
            raise AttributeError(item) from None

    def convert_to_tensors(self, tensor_type: Any = None) -> BatchFeature:
        """Turn lists into arrays ("np") or tensors ("pt"). Raises ValueError for rows of unequal length."""
        if tensor_type is None:
            return self
        kind = str(getattr(tensor_type, "value", tensor_type))
        if kind not in ("np", "pt"):
            raise ValueError(f'return_tensors must be "np", "pt" or None, found {tensor_type!r}')
        for key, value in self.data.items():
            if is_torch(value) or (isinstance(value, str) or value is None):
                continue
            try:
                array = np.asarray(value)
            except ValueError:  # NumPy's "inhomogeneous shape"
                raise ValueError(
                    f"can not make an array of {key}: rows differ in length; pass padding=True for rows of one length,"
                    " or return_tensors=None for lists"
                ) from None
            self.data[key] = torch_module().from_numpy(array) if kind == "pt" else array
        return self

    def to(self, *args: Any, **kwargs: Any) -> BatchFeature:
        """Cast and move, in place: only floating entries are cast. (device), (dtype), (device, dtype), keywords.

        Tensors go through torch's own `to`. Arrays have no device: "cpu" is accepted; bfloat16, which NumPy lacks,
        leaves them in float32 with the values rounded to bfloat16.
        """
        device, dtype = kwargs.get("device"), kwargs.get("dtype")
        for argument in args:
            if is_torch_dtype(argument) or _names_dtype(argument):
                dtype = argument
            elif isinstance(argument, str | int) or type(argument).__name__ == "device":
                device = argument
            else:
                raise ValueError(f"can not cast a BatchFeature to {argument!r}")
        self.data = {key: self._moved(value, device, dtype, kwargs) for key, value in self.data.items()}
        return self

    def _moved(self, value: Any, device: Any, dtype: Any, kwargs: dict[str, Any]) -> Any:
        if is_torch(value):
            torch = torch_module()
            target: dict[str, Any] = {"non_blocking": bool(kwargs.get("non_blocking", False))}
            if device is not None:
                target["device"] = device
            if dtype is not None and value.is_floating_point():
                target["dtype"] = dtype if is_torch_dtype(dtype) else getattr(torch, dtype_name(dtype))
            return value.to(**target)
        if isinstance(value, np.ndarray):
            if device is not None and str(device).split(":")[0] != "cpu":
                raise ValueError(f'NumPy arrays are on the CPU: device {device!r} needs return_tensors="pt"')
            if dtype is not None and np.issubdtype(value.dtype, np.floating):
                name = dtype_name(dtype)
                return round_bfloat16(value) if name == "bfloat16" else value.astype(name)
        if isinstance(value, list | tuple):
            return type(value)(self._moved(item, device, dtype, kwargs) for item in value)
        return value


def _names_dtype(value: Any) -> bool:
    if isinstance(value, np.dtype | type):
        return True
    return isinstance(value, str) and value.removeprefix("torch.") in ("float32", "float16", "bfloat16", "float64")


def round_bfloat16(array: Any) -> Any:
    """float32 values rounded to the nearest bfloat16 (ties to even), still in float32."""
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)
    return np.where(np.isfinite(array), rounded, np.asarray(array, np.float32))
