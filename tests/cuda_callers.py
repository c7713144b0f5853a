"""Another library on the stand-in's devices, for tests: its arrays and streams, the capsules it makes and reads."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cuda_build import backend_sources, host_library

HOST_TO_DEVICE, DEVICE_TO_HOST, DEVICE_TO_DEVICE = 1, 2, 3
MANAGED = 13
CODES = {"float32": (2, 32), "float16": (2, 16), "float64": (2, 64), "int64": (0, 64), "bfloat16": (4, 16)}
_api = ctypes.pythonapi
_api.PyCapsule_New.restype = ctypes.py_object
_api.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_api.PyCapsule_GetPointer.restype = ctypes.c_void_p
_api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
_api.PyCapsule_SetName.argtypes = [ctypes.py_object, ctypes.c_void_p]


class Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("offset", ctypes.c_uint64),
    ]  # fmt: skip


class Old(ctypes.Structure):
    pass


class Versioned(ctypes.Structure):
    pass


Old._fields_ = [("tensor", Tensor), ("owner", ctypes.c_void_p), ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p))]
Versioned._fields_ = [
    ("major", ctypes.c_uint32), ("minor", ctypes.c_uint32), ("owner", ctypes.c_void_p),
    ("deleter", ctypes.CFUNCTYPE(None, ctypes.c_void_p)), ("flags", ctypes.c_uint64), ("tensor", Tensor),
]  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The one that blip2c has opened too."""
    found = ctypes.CDLL(str(host_library(backend_sources())))
    found.caller_allocations_refused.restype = ctypes.c_long
    for name in ("caller_bytes_copied", "caller_free_bytes", "caller_pinned_bytes"):
        getattr(found, name).restype = ctypes.c_size_t
    return found


def check(status: int) -> None:
    assert status == 0, f"CUDA says {status}"


def copied(kind: int) -> int:
    """Bytes so far."""
    return int(library().caller_bytes_copied(kind))


def free_bytes(device: int = 0) -> int:
    return int(library().caller_free_bytes(device))


def pinned_bytes() -> int:
    return int(library().caller_pinned_bytes())


@contextmanager
def no_memory_after(allocations: int) -> Iterator[Callable[[], int]]:
    """So many more succeed, of devices and of pinned memory, and none after them; gives how many have failed."""
    library().caller_fail_allocations_after(ctypes.c_long(allocations))
    try:
        yield library().caller_allocations_refused
    finally:
        library().caller_fail_allocations_after(ctypes.c_long(-1))


class Stream:
    def __init__(self, device: int = 0) -> None:
        self.handle = ctypes.c_void_p()
        check(library().caller_stream(device, ctypes.byref(self.handle)))


class CallerArray:
    """An array in device memory that its own library has made, filled by work that its stream has not begun yet.

    kind: DLPack's, of a device's own memory or MANAGED. wrong: what DLPack's tensor says otherwise.
    """

    def __init__(
        self,
        values: Any,
        device: int = 0,
        *,
        dtype: str | None = None,
        versioned: bool = True,
        kind: int = 2,
        wrong: dict[str, Any] | None = None,
    ) -> None:
        self.values = np.ascontiguousarray(values)
        self.dtype = dtype or str(self.values.dtype)
        self.shape: tuple[int, ...] = self.values.shape
        self.strides: Sequence[int] = [s // self.values.itemsize for s in self.values.strides]
        self.device, self.versioned, self.flags, self.offset = device, versioned, 0, 0
        self.kind, self.major, self.deleted, self.wrong = kind, 1, 0, wrong or {}
        self.asked: list[int] = []
        self.stream, self.data = Stream(device), ctypes.c_void_p()
        alloc = library().caller_alloc_managed if kind == MANAGED else library().caller_alloc
        check(alloc(device, ctypes.c_size_t(max(self.values.nbytes, 1)), ctypes.byref(self.data)))
        check(library().caller_fill(self.data, self.values.ctypes.data_as(ctypes.c_void_p),
                                    ctypes.c_size_t(self.values.nbytes), self.stream.handle))  # fmt: skip
        self.kept: list[Any] = []

    def view(self, shape: Sequence[int], strides: Sequence[int], offset: int = 0) -> CallerArray:
        self.shape, self.strides, self.offset = tuple(shape), strides, offset
        return self

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, self.device

    def delete(self, _: Any) -> None:
        """Memory that is used after it is freed fails the launch."""
        self.deleted += 1
        check(library().caller_free(self.data))

    def tensor(self) -> Tensor:
        axes = ctypes.c_int64 * len(self.shape)
        shape, strides = axes(*self.shape), axes(*self.strides)
        self.kept += [shape, strides]
        code, bits = CODES[self.dtype]
        tensor = Tensor(self.data, self.kind, self.device, len(self.shape), code, bits, 1, shape, strides, self.offset)
        for name, value in self.wrong.items():
            setattr(tensor, name, value)
        return tensor

    def read(self) -> np.ndarray:
        """All of its memory, when its stream has come so far."""
        out = np.empty_like(self.values)
        check(library().caller_read(out.ctypes.data_as(ctypes.c_void_p), self.data, ctypes.c_size_t(out.nbytes),
                                    self.stream.handle))  # fmt: skip
        return out

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if dl_device == (1, 0):
            assert copy
            return self.read().__dlpack__()
        if not self.versioned and max_version is not None:
            raise TypeError("unexpected keyword max_version")
        assert stream is not None
        self.asked.append(stream)
        check(library().caller_order(ctypes.c_void_p(stream), self.stream.handle))
        deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.delete)
        managed: Any
        if self.versioned:
            managed, name = Versioned(self.major, 1, None, deleter, self.flags, self.tensor()), b"dltensor_versioned"
        else:
            managed, name = Old(self.tensor(), None, deleter), b"dltensor"
        self.kept += [deleter, managed]
        self.capsule = _api.PyCapsule_New(ctypes.addressof(managed), name, None)
        return self.capsule


class Pinned:
    """Memory of the host that a device can reach, kDLCUDAHost."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def __dlpack_device__(self) -> tuple[int, int]:
        return 3, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self.values.__dlpack__(**{k: v for k, v in options.items() if k != "stream"})


class Taken:
    """What a consumer holds of an array that was exported to it, until drop()."""

    def __init__(self, array: Any, versioned: bool = True, stream: int | None = 1, **options: Any) -> None:
        capsule = array.__dlpack__(stream=stream, max_version=(1, 0) if versioned else None, **options)
        name = b"dltensor_versioned" if versioned else b"dltensor"
        pointer = _api.PyCapsule_GetPointer(capsule, name)
        self.managed: Any = ctypes.cast(pointer, ctypes.POINTER(Versioned if versioned else Old)).contents
        self.address = pointer
        self.used_name = ctypes.create_string_buffer(b"used_" + name)  # a capsule only points to its name
        _api.PyCapsule_SetName(capsule, ctypes.addressof(self.used_name))
        self.tensor: Tensor = self.managed.tensor
        self.shape = tuple(self.tensor.shape[i] for i in range(self.tensor.ndim))

    def read(self) -> np.ndarray:
        """The numbers, from an array in order, by way of the consumer's own stream."""
        out, stream = np.empty(self.shape, np.float32), Stream(self.tensor.device_id)
        check(library().caller_read(out.ctypes.data_as(ctypes.c_void_p), ctypes.c_void_p(self.tensor.data),
                                    ctypes.c_size_t(out.nbytes), stream.handle))  # fmt: skip
        return out

    def drop(self) -> None:
        self.managed.deleter(self.address)
