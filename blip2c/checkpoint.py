"""The files of a checkpoint folder: which weights to map, and strict JSON.

Nothing here reads tensor data, unpickles or runs code of a checkpoint. docs/FORMATS.md has the rules.
"""

from __future__ import annotations

import json
import os
import stat
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from blip2c import _core
from blip2c._core import CheckpointError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PACKED_WEIGHTS = "model.blip2c.safetensors"
CONFIG = "config.json"
MAX_JSON_BYTES = 64 * 1024 * 1024
# What a folder with weights in formats that need unpickling, or another program, looks like.
_FOREIGN_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "flax_model.msgpack")


def _read_small_file(path: Path) -> bytes:
    """All bytes of a regular file of at most MAX_JSON_BYTES; a pipe or device is refused without waiting for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CheckpointError(f"{path}: regular-file: expected a regular file")
        data = file.read(MAX_JSON_BYTES + 1)
    if len(data) > MAX_JSON_BYTES:
        raise CheckpointError(f"{path}: json-size: expected at most {MAX_JSON_BYTES} bytes, found more")
    return data


def read_json(path: str | os.PathLike[str]) -> Any:
    """Reads a JSON file strictly: UTF-8, RFC 8259, no duplicate keys, nested at most 100 deep, at most 64 MiB.

    Raises:
        CheckpointError: the file breaks a rule; the message begins with the path and names the rule.
        OSError: the file cannot be read (FileNotFoundError, PermissionError, ...).
    """
    path = Path(path)
    data = _read_small_file(path)
    _core._check_json(data, str(path).encode(errors="replace").decode())

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(f'{path}: duplicate-key: the key "{twice}" comes twice in one object')
        return members

    try:
        return json.loads(data, object_pairs_hook=no_duplicates)
    except CheckpointError:
        raise
    except ValueError as error:  # an integer of more digits than Python converts
        raise CheckpointError(f"{path}: integer-range: {error}") from error


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """read_json() of a file that must hold an object; CheckpointError if it holds something else."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: json-form: expected an object, found {_kind(values)}")
    return values


def _require_folder(folder: Path) -> None:
    if not folder.exists():
        raise FileNotFoundError(f"{folder}: no such checkpoint folder")
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder}: expected a checkpoint folder, found a file")


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """The object in the folder's config.json.

    Raises:
        FileNotFoundError: there is no folder, or no config.json in it; the message names both.
        CheckpointError: config.json breaks a rule of read_json(), or is no object.
    """
    folder = Path(folder)
    _require_folder(folder)
    path = folder / CONFIG
    if not path.exists():
        raise FileNotFoundError(f"{folder}: no {CONFIG} in this folder")
    return read_object(path)


def _kind(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def resolve_files(folder: str | os.PathLike[str]) -> list[Path]:
    """The safetensors files that hold the folder's weights, in the order of their names.

    model.blip2c.safetensors (packed, see blip2c.packed) or model.safetensors if it is there, else the shards of
    model.safetensors.index.json (upstream: transformers.modeling_utils, which looks in the same order). Of a sharded
    checkpoint the headers are read: every key of the index must be in the shard that is named for it, and in no other.
    Tensors that the index does not list are reported with a UserWarning and stay: what the model does not know it
    reports again.

    Raises:
        FileNotFoundError: no folder, no weights in it (says what was looked for and what is there instead), or a shard
            is missing.
        CheckpointError: the index or a shard breaks a rule, or there are packed and plain weights.
    """
    folder = Path(folder)
    _require_folder(folder)
    if (folder / PACKED_WEIGHTS).exists():
        plain = [name for name in (WEIGHTS, WEIGHTS_INDEX) if (folder / name).exists()]
        if plain:
            raise CheckpointError(f"{folder}: holds {PACKED_WEIGHTS} and {plain[0]}: one folder, one model")
        return [folder / PACKED_WEIGHTS]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / WEIGHTS_INDEX).exists():
        return _resolve_index(folder)
    foreign = [name for name in _FOREIGN_WEIGHTS if (folder / name).exists()]
    hint = f"; {foreign[0]} is there, but unpickled weights are not loaded; convert to safetensors" if foreign else ""
    raise FileNotFoundError(f"{folder}: looked for {WEIGHTS} and {WEIGHTS_INDEX}, found neither{hint}")


def _check_shard_name(index: Path, key: str, name: object) -> str:
    if not isinstance(name, str):
        raise CheckpointError(f'{index}: shard-name: "{key}": expected a string, found {_kind(name)}')
    plain = name.isprintable() and not set(name) & set('/\\:"') and not name.startswith(".")
    if not plain or not name.endswith(".safetensors"):
        raise CheckpointError(
            f'{index}: shard-name: "{key}": expected a plain file name ending in .safetensors, found {name[:100]!r}'
        )
    return name


def _read_weight_map(index: Path) -> dict[str, str]:
    """Tensor name -> shard name, both checked."""
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f'{index}: index-form: expected an object with a "weight_map" that is not empty')
    return {key: _check_shard_name(index, key, name) for key, name in weight_map.items()}


def _resolve_index(folder: Path) -> list[Path]:
    index = folder / WEIGHTS_INDEX
    weight_map = _read_weight_map(index)
    shards = sorted(set(weight_map.values()))
    missing = [name for name in shards if not (folder / name).exists()]
    if missing:
        raise FileNotFoundError(f"{folder}: {_some(missing)} of {len(shards)} shards named in {index.name} not found")
    held_by = _tensors_by_name(folder, shards)
    for key, name in weight_map.items():
        if key not in held_by:
            raise CheckpointError(f'{index}: shard-keys: "{key}" is in no shard, expected it in {name}')
        if held_by[key] != name:
            raise CheckpointError(f'{index}: shard-keys: "{key}": expected it in {name}, found it in {held_by[key]}')
    extra = sorted(held_by.keys() - weight_map.keys())
    if extra:
        warnings.warn(f"{index}: does not list {_some(extra)}, which the shards hold", stacklevel=3)
    return [folder / name for name in shards]


def _tensors_by_name(folder: Path, shards: Iterable[str]) -> dict[str, str]:
    """Tensor name -> the one shard that holds it."""
    held_by: dict[str, str] = {}
    for shard in shards:
        for key in _core.SafetensorsFile(str(folder / shard)).names():
            if key in held_by:
                raise CheckpointError(f'{folder}: shard-keys: "{key}" is in {held_by[key]} and in {shard}')
            held_by[key] = shard
    return held_by


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
