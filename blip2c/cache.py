"""Packed weights that are kept for the next load.

Quantising a large checkpoint reads all of it and takes a while; its packed form is mapped at once. So the first load of
a plain checkpoint with a quantised dtype leaves its packed form behind, and later loads use that.

When: `cache=None` (the default) keeps what is quantised and comes from at least 256 MiB of weights, where it leaves
5 % of the disk (at least 1 GiB) free; unquantised weights are packed as fast as they are read, and would fill the disk
a second time. cache=True always keeps, cache=False never, a folder keeps there. The environment variable BLIP2C_CACHE
names another folder than $XDG_CACHE_HOME/blip2c (~/.cache/blip2c), or "off" for none.

An entry is used only for exactly the files it was made from (path, size, times), the same dtypes, architecture, version
of blip2c and of the layout; the layout is the same on every instruction set but for bfloat16 arithmetic, which the
dtypes' names show. Entries are written beside and renamed, so that two processes at once, a crash or a full disk leave
a whole file or none.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from blip2c import _core
from blip2c.dtypes import Dtype, asks_to_quantise
from blip2c.packed import flat_config, write_packed

SETTING = "BLIP2C_CACHE"
SOURCE_KEY = "blip2c.source"
SUFFIX = ".safetensors"
WORTH_KEEPING = 256 << 20
LEAVE_FREE, LEAVE_FREE_SHARE = 1 << 30, 0.05
_OFF = ("0", "off", "no", "false", "")
_ABANDONED_SECONDS = 24 * 3600

log = logging.getLogger("blip2c")


@dataclass(frozen=True)
class Entry:
    """One file of the cache: path, size in bytes, the files it was made from, how its parts are held."""

    path: Path
    size: int
    sources: list[str]
    dtypes: str


def cache_folder() -> Path | None:
    """Where entries are kept (it need not exist), or None where BLIP2C_CACHE says off."""
    setting = os.environ.get(SETTING)
    if setting is not None:
        return None if setting.lower() in _OFF else Path(setting).expanduser()
    return _default_folder()


def _default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base and Path(base).is_absolute() else Path("~/.cache").expanduser()) / "blip2c"


def _files_of(folder: Path) -> list[Path]:
    try:
        return sorted(p for p in folder.iterdir() if p.name.startswith("packed-") and p.is_file())
    except OSError:
        return []


def entries() -> list[Entry]:
    """What is in the cache."""
    folder, found = cache_folder(), []
    for path in _files_of(folder) if folder else []:
        if path.suffix != SUFFIX:
            continue
        try:
            metadata, size = _core.SafetensorsFile(path).metadata(), path.stat().st_size
            sources = [str(file[0]) for file in json.loads(metadata[SOURCE_KEY])["files"]]
        except (ValueError, LookupError, TypeError, RecursionError, OSError):  # anybody's file, or half of one
            metadata, size, sources = {}, 0, []
        found.append(Entry(path, size, sources, metadata.get("blip2c.dtypes", "")))
    return found


def clear() -> int:
    """Remove every entry, and what killed processes left. Returns the bytes that were freed.

    Models that are in use keep their mapped weights.
    """
    folder, freed = cache_folder(), 0
    for path in _files_of(folder) if folder else []:
        with suppress(FileNotFoundError):  # another process was faster
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


def _source_of(files: Sequence[str], core: Mapping[str, Any], dtype: Dtype) -> str:
    """All that an entry depends on. A replaced file has another time of change, whatever its other times say."""
    from blip2c import __version__

    stamps = []
    for file in files:
        real = os.path.realpath(file)
        info = os.stat(real)
        stamps.append([real, info.st_size, info.st_mtime_ns, info.st_ctime_ns])
    values = {
        "files": stamps,
        "config": flat_config(core),
        "dtypes": _core._policies(dtype),
        "blip2c": __version__,
        "packed": _core.PACKED_VERSION,
    }
    return json.dumps(values, sort_keys=True)


def _chosen_folder(files: Sequence[str], dtype: Dtype, cache: Any) -> Path | None:
    if isinstance(cache, str | os.PathLike):
        return Path(cache).expanduser()
    if cache is not None and not isinstance(cache, bool):
        raise TypeError(f"cache must be None, True, False or a folder, found {type(cache).__name__}")
    if cache is True:
        return cache_folder() or _default_folder()
    if cache is False or not asks_to_quantise(dtype) or sum(os.path.getsize(f) for f in files) < WORTH_KEEPING:
        return None
    return cache_folder()


def open_model(
    files: Sequence[str], core: Mapping[str, Any], dtype: Dtype, cache: Any = None, device: str = "cpu"
) -> _core.Model:
    """The model of plain weights: from its packed form in the cache, else packed now and perhaps left there.

    On another device than the processor the cache is read, but nothing is left in it.
    """
    folder = _chosen_folder(files, dtype, cache)
    if folder is None:
        return _core.Model(files, core, dtype, device)
    source = _source_of(files, core, dtype)
    path = folder / f"packed-{sha256(source.encode(errors='surrogateescape')).hexdigest()[:32]}{SUFFIX}"
    model = _open_entry(path, source, core, dtype, device)
    if model is None:
        model = _core.Model(files, core, dtype, device)
        if device == "cpu":
            _keep(model, path, source, core)
    return model


def _open_entry(path: Path, source: str, core: Mapping[str, Any], dtype: Dtype, device: str) -> _core.Model | None:
    try:
        if _core.SafetensorsFile(path).metadata().get(SOURCE_KEY) != source:
            raise ValueError("it was made from other files")
        return _core.Model([str(path)], core, dtype, device)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, OSError) as error:
        warnings.warn(f"{path}: this cache entry is not used, but made anew: {error}", stacklevel=5)
        return None


def _keep(model: _core.Model, path: Path, source: str, core: Mapping[str, Any]) -> None:
    """Never an error: a model that cannot be kept works all the same."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remove_abandoned(path.parent)
        disk = shutil.disk_usage(path.parent)
        reserve = max(LEAVE_FREE, int(LEAVE_FREE_SHARE * disk.total))
        if disk.free < model.nbytes + reserve:
            raise OSError(f"{model.nbytes >> 20} MiB are needed, and {reserve >> 20} MiB are left free;"
                          f" there are {disk.free >> 20} MiB")  # fmt: skip
        start = time.monotonic()
        write_packed(model, path, core, **{SOURCE_KEY: source})
        seconds = time.monotonic() - start
        log.info("packed weights for the next load: %s (%.1f MB, %.0f s)", path, model.nbytes / 1e6, seconds)
        _remove_outdated(path, source)
    except (OSError, MemoryError) as error:
        warnings.warn(
            f"packed weights are not kept for the next load: {path.parent}: {error} ({SETTING} names another folder,"
            f" {SETTING}=off or cache=False keeps none)",
            stacklevel=5,
        )


def _remove_abandoned(folder: Path) -> None:
    """Temporary files of processes that were killed long ago."""
    for path in _files_of(folder):
        with suppress(FileNotFoundError):  # another process has just renamed its own
            if path.suffix != SUFFIX and time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()


def _remove_outdated(path: Path, source: str) -> None:
    """Entries of the same files in an earlier state, held the same way: nobody will ask for them again."""

    def identity(text: str) -> Any:
        values = json.loads(text)
        return [file[0] for file in values["files"]], values["dtypes"], values["blip2c"]

    for other in _files_of(path.parent):
        if other == path or other.suffix != SUFFIX:
            continue
        try:
            outdated = identity(_core.SafetensorsFile(other).metadata()[SOURCE_KEY]) == identity(source)
        except (ValueError, LookupError, TypeError, RecursionError, OSError):
            continue
        if outdated:
            other.unlink(missing_ok=True)
