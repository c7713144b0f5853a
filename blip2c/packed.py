"""Folders of packed weights: a checkpoint whose weights lie in one file as the kernels read them.

Such a file is mapped and used where it lies: loading reads none of it. docs/FORMATS.md has its form.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blip2c import _core
from blip2c._core import CheckpointError
from blip2c.checkpoint import CONFIG, PACKED_WEIGHTS, WEIGHTS, WEIGHTS_INDEX
from blip2c.dtypes import asks_to_quantise, read_dtype

CONFIG_KEY = "blip2c.config"
DTYPES_KEY = "blip2c.dtypes"
VERSION_KEY = "blip2c.packed"
# Keys that say nothing of the weights, and that scripts change in config.json.
_NOT_OF_THE_WEIGHTS = ("image_token_id",)
_DESCRIPTION = re.compile(r"^\w+ \w+ n=(\d+) k=(\d+) ")


def flat_config(core: Mapping[str, Any]) -> dict[str, Any]:
    """{"vision.hidden_size": 1408, ...}: what of core_config() a packed file was made for."""
    flat: dict[str, Any] = {}
    for key, value in core.items():
        if isinstance(value, Mapping):
            flat.update({f"{key}.{inner}": item for inner, item in value.items()})
        elif key not in _NOT_OF_THE_WEIGHTS:
            flat[key] = value
    return flat


def check_packed(path: str | os.PathLike[str], core: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming the keys, where a packed file was made for another configuration."""
    text = _core.SafetensorsFile(path).metadata().get(CONFIG_KEY)
    try:
        made_for = json.loads(text) if text is not None else None
    except ValueError:
        made_for = None
    if not isinstance(made_for, dict):
        raise CheckpointError(f"{path}: packed-form: {CONFIG_KEY} must hold the configuration that it was made for")
    found = json.loads(json.dumps(flat_config(core)))
    # A key that a later version added is no difference.
    differing = [
        f"{key} {value!r} (config.json: {found.get(key)!r})"
        for key, value in made_for.items()
        if found.get(key) != value
    ]
    if differing:
        more = f" and {len(differing) - 4} more" if len(differing) > 4 else ""
        raise CheckpointError(f"{path}: packed for another config: {', '.join(differing[:4])}{more}")


def write_packed(model: _core.Model, path: str | os.PathLike[str], core: Mapping[str, Any], **metadata: str) -> None:
    """All weights of `model` as they are held into the file `path`, all or nothing."""
    model.save_packed(path, {CONFIG_KEY: json.dumps(flat_config(core), sort_keys=True), **metadata})


def describe_packed(file: _core.SafetensorsFile) -> dict[str, Any] | None:
    """{"dtypes": "vision=int8,...", "parameters": int} of a packed file, None of another."""
    metadata = file.metadata()
    if VERSION_KEY not in metadata:
        return None
    sizes = [_DESCRIPTION.match(metadata.get(name, "")) for name in file.names()]
    return {
        "dtypes": metadata.get(DTYPES_KEY, ""),
        "parameters": sum(int(size[1]) * int(size[2]) for size in sizes if size),
    }


def refuse_other_weights(folder: Path) -> None:
    """FileExistsError where `folder` holds plain weights: one folder, one model."""
    for name in (WEIGHTS, WEIGHTS_INDEX):
        if (folder / name).exists():
            raise FileExistsError(f"{folder}: holds {name}; packed weights need a folder of their own")


def quantize(
    path_or_id: str | os.PathLike[str], out: str | os.PathLike[str], dtype: Any = "int8", **options: Any
) -> Path:
    """Write a packed copy of a checkpoint to the folder `out`, which load(), from_pretrained() and the CLI open.

    path_or_id: a folder or Hub id of a plain checkpoint. dtype: "int8", "int4" or a mapping of parts; some part must be
    quantised. options: as in from_pretrained (revision, local_files_only ...). The files of configuration, tokenizer
    and processor are copied. Returns `out`. Raises ValueError for a dtype that quantises nothing or an empty `out`,
    FileExistsError where `out` holds weights, plain or packed, OSError where it cannot be written: nothing is left of
    the weights then.
    """
    from blip2c.classes import model_class
    from blip2c.hub import pop_hub_options, resolve

    if not asks_to_quantise(read_dtype(dtype)):
        raise ValueError(f"dtype: expected int8 or int4 for some part, found {dtype!r}: there is nothing to quantise")
    if not os.fspath(out):
        raise ValueError("out: expected a folder, found an empty name")
    folder, target = resolve(path_or_id, **pop_hub_options(options)), Path(out)
    if (folder / PACKED_WEIGHTS).exists():
        raise ValueError(f"{folder}: is packed already; quantise the plain checkpoint")
    refuse_other_weights(target)
    if (target / PACKED_WEIGHTS).exists():
        raise FileExistsError(f"{target}: holds {PACKED_WEIGHTS} already; remove it, or name another folder")
    model_class(folder).from_pretrained(folder, dtype=dtype, cache=False, **options).save_pretrained(target)
    _copy_small_files(folder, target)
    return target


def _copy_small_files(source: Path, target: Path) -> None:
    """What stands beside the weights: json and txt files, and InstructBLIP's second tokenizer."""
    for folder in (source, source / "qformer_tokenizer"):
        for path in sorted(folder.glob("*.json")) + sorted(folder.glob("*.txt")):
            name = path.relative_to(source)
            if path.is_file() and not path.name.endswith(".index.json") and name != Path(CONFIG):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / name)
