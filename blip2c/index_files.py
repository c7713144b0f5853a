"""The files of a picture index: what stands in its folder, how it grows and how it is read back.

An index is a folder of three files. `vectors.bin` is one record a picture, in the order in which pictures came, as the
search reads them (csrc/ops/ops.h, b2_records). `pictures.jsonl` is one line of JSON a picture: its path, and size and
time of the file. `index.json` says how much of both counts, with a checksum of each and of itself, and what the index
was made with. Both others only ever grow at their end, and index.json is replaced as a whole after them: whatever
happens, an index holds what its last index.json says, and what stands behind that is cut off by the next writer.
"""

from __future__ import annotations

import fcntl
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c._core import CheckpointError
from blip2c.checkpoint import read_object

FORMAT, VERSION = "blip2c-index", 1
HEADER, VECTORS, PICTURES, LOCK = "index.json", "vectors.bin", "pictures.jsonl", "lock"
DTYPES = ("float16", "int8")
PANEL, BLOCK = 16, 32
_CHUNK = 16 << 20


def record_bytes(queries: int, width: int, dtype: str) -> int:
    """Bytes of a picture's record (b2_record_bytes)."""
    panels = -(-queries // PANEL)
    each = 2 * width if dtype == "float16" else -(-width // BLOCK) * BLOCK + 4
    return panels * PANEL * each


def pack_records(vectors: NDArray[np.float32], dtype: str) -> NDArray[np.uint8]:
    """[N, Q, P] -> records uint8 [N, bytes]: float16, or int8 with a scale a vector, rounded to nearest even."""
    n, queries, width = vectors.shape
    panels = -(-queries // PANEL)
    full = np.concatenate([vectors, np.repeat(vectors[:, :1], panels * PANEL - queries, axis=1)], axis=1)
    if dtype == "float16":
        halves = full.astype(np.float16).reshape(n, panels, PANEL, width).transpose(0, 1, 3, 2)
        return np.ascontiguousarray(halves).view(np.uint8).reshape(n, -1)
    blocks = -(-width // BLOCK)
    scales = (np.abs(full).max(axis=-1) / np.float32(127)).astype(np.float32)
    whole = np.full((n, panels * PANEL, blocks * BLOCK), 128, np.uint8)
    whole[:, :, :width] = np.rint(full / np.maximum(scales, np.float32(1e-30))[..., None]).astype(np.int16) + 128
    quads = whole.reshape(n, panels, PANEL, blocks * BLOCK // 4, 4).transpose(0, 1, 3, 2, 4)
    return np.concatenate([quads.reshape(n, -1), scales.view(np.uint8).reshape(n, -1)], axis=1)


def unpack_records(records: NDArray[np.uint8], queries: int, width: int, dtype: str) -> NDArray[np.float32]:
    """The vectors [N, Q, P] of records uint8 [N, bytes]."""
    n, panels = len(records), -(-queries // PANEL)
    records = np.ascontiguousarray(records)
    if dtype == "float16":
        halves = records.view(np.float16).reshape(n, panels, width, PANEL).transpose(0, 1, 3, 2)
        return halves.reshape(n, panels * PANEL, width)[:, :queries].astype(np.float32)
    blocks, scales = -(-width // BLOCK), np.ascontiguousarray(records[:, -4 * panels * PANEL :]).view(np.float32)
    quads = records[:, : -4 * panels * PANEL].reshape(n, panels, blocks * BLOCK // 4, PANEL, 4).transpose(0, 1, 3, 2, 4)
    whole = quads.reshape(n, panels * PANEL, blocks * BLOCK)[:, :queries, :width].astype(np.float32) - 128
    return whole * scales[:, :queries, None]


@dataclass(frozen=True)
class Extent:
    """A beginning of a file that counts: bytes, and their CRC-32."""

    size: int = 0
    crc32: int = 0

    def grown(self, data: bytes) -> Extent:
        return Extent(self.size + len(data), zlib.crc32(data, self.crc32))


@dataclass(frozen=True)
class Header:
    """index.json. model: {"name", "fingerprint", "dtypes"}; dtype, queries Q, width P: of a picture's vectors."""

    model: Mapping[str, str]
    dtype: str
    queries: int
    width: int
    count: int = 0
    vectors: Extent = Extent()
    pictures: Extent = Extent()

    @property
    def record(self) -> int:
        return record_bytes(self.queries, self.width, self.dtype)

    def to_json(self) -> str:
        values: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model": dict(self.model),
            "dtype": self.dtype,
            "queries": self.queries,
            "width": self.width,
            "count": self.count,
            "vectors": [self.vectors.size, self.vectors.crc32],
            "pictures": [self.pictures.size, self.pictures.crc32],
        }
        return json.dumps({**values, "sha256": _digest(values)}, indent=1) + "\n"


def _digest(values: Mapping[str, Any]) -> str:
    return sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _extent(value: Any) -> Extent:
    size, crc = value
    if type(size) is not int or type(crc) is not int or size < 0:
        raise ValueError(f"expected a size and a checksum, found {value!r}")
    return Extent(size, crc)


def read_header(folder: Path) -> Header:
    """Raises FileNotFoundError where there is no index, CheckpointError for a header that is damaged or newer."""
    path = folder / HEADER
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: is no index: it holds no {HEADER}")
    try:
        values = read_object(path)
        if values.get("format") != FORMAT:
            raise ValueError(f"is not of the format {FORMAT}")
        if values.get("version") != VERSION:
            raise ValueError(f"is of version {values.get('version')!r}; this blip2c reads {VERSION}")
        found = values.pop("sha256", None)
        if found != _digest(values):
            raise ValueError("its checksum does not fit: it is damaged or was edited")
        model = {key: str(values["model"][key]) for key in ("name", "fingerprint", "dtypes")}
        queries, width, count = (values[key] for key in ("queries", "width", "count"))
        sizes = [type(size) is int for size in (queries, width, count)]
        if not all(sizes) or count < 0 or not (1 <= queries <= 65536 and 1 <= width <= 65536):
            raise ValueError(f"holds {count!r} pictures of {queries!r} vectors of {width!r}")
        if values["dtype"] not in DTYPES:
            raise ValueError(f"holds vectors of {values['dtype']!r}, expected one of {', '.join(DTYPES)}")
        vectors, pictures = _extent(values["vectors"]), _extent(values["pictures"])
        header = Header(model, values["dtype"], queries, width, count, vectors, pictures)
        if header.vectors.size != header.count * header.record:
            raise ValueError(f"{header.count} pictures do not fit {header.vectors.size} bytes of vectors")
        return header
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {error}") from None


def write_header(folder: Path, header: Header) -> None:
    """All or nothing, and on the disk when it returns."""
    temporary = folder / f"{HEADER}.new"
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(header.to_json())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / HEADER)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def append(folder: Path, header: Header, records: NDArray[np.uint8], entries: Sequence[Mapping[str, Any]]) -> Header:
    """Adds records [N, bytes] with an entry each; returns the new header. Whoever dies in between added nothing."""
    # ensure_ascii: a name that is no UTF-8 has lone surrogates, which come back as they were.
    lines = "".join(json.dumps(entry, ensure_ascii=True) + "\n" for entry in entries).encode()
    data = np.ascontiguousarray(records).tobytes()
    for name, extent, added in ((VECTORS, header.vectors, data), (PICTURES, header.pictures, lines)):
        with open(folder / name, "r+b" if (folder / name).exists() else "w+b") as file:
            file.truncate(extent.size)
            file.seek(extent.size)
            file.write(added)
            file.flush()
            os.fsync(file.fileno())
    grown = Header(
        header.model,
        header.dtype,
        header.queries,
        header.width,
        header.count + len(records),
        header.vectors.grown(data),
        header.pictures.grown(lines),
    )
    write_header(folder, grown)
    return grown


def check_file(path: Path, extent: Extent) -> None:
    """Raises CheckpointError where the file is shorter than what counts of it, or its bytes are not those written."""
    size = path.stat().st_size if path.is_file() else 0
    if size < extent.size:
        raise CheckpointError(f"{path}: has {size} bytes of {extent.size}: it is damaged")
    left, crc = extent.size, 0
    if left == 0:
        return
    with open(path, "rb") as file:
        while left:
            data = file.read(min(left, _CHUNK))
            if not data:  # it has become shorter meanwhile
                raise CheckpointError(f"{path}: ends {left} bytes early: it is damaged")
            left, crc = left - len(data), zlib.crc32(data, crc)
    if crc != extent.crc32:
        raise CheckpointError(f"{path}: its checksum does not fit: it is damaged")


def read_entries(folder: Path, header: Header) -> list[dict[str, Any]]:
    """The lines of pictures.jsonl that count: [{"path": str, "stamp": [size, time in ns] or None}]."""
    check_file(folder / PICTURES, header.pictures)
    if not header.count:
        return []
    with open(folder / PICTURES, "rb") as file:
        lines = file.read(header.pictures.size).splitlines()
    try:
        entries = [json.loads(line) for line in lines]
        if len(entries) != header.count or not all(isinstance(entry["path"], str) for entry in entries):
            raise ValueError(f"{len(entries)} lines for {header.count} pictures")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{folder / PICTURES}: {error}") from None
    return entries


def map_records(folder: Path, header: Header, check: bool = True) -> NDArray[np.uint8]:
    """The records uint8 [N, bytes], mapped. check: compare their checksum, which reads all of them once."""
    if not header.count:
        return np.zeros((0, header.record), np.uint8)
    path = folder / VECTORS
    check_file(path, header.vectors if check else Extent())
    if path.stat().st_size < header.vectors.size:
        raise CheckpointError(f"{path}: has {path.stat().st_size} bytes of {header.vectors.size}: it is damaged")
    return np.memmap(path, np.uint8, "r", shape=(header.count, header.record))


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """BlockingIOError where another process is adding to this index."""
    with open(folder / LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BlockingIOError(f"{folder}: another process is adding pictures to this index") from None
        yield
