"""Builds the CUDA backend for the host: csrc/ops/cuda compiled by g++ against the stand-ins of tests/cuda_host.

With BLIP2C_TEST_CARD=1 what stands alone is built by nvcc instead, for the card of this machine.
"""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOST = ROOT / "tests" / "cuda_host"
CXX = shlex.split(os.environ.get("CXX") or "g++")
CC = shlex.split(os.environ.get("CC") or "gcc")
NVCC = shlex.split(os.environ.get("NVCC") or shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
COMMON = ["-O1", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-pthread", "-Wall", "-Wextra", "-Werror"]
INCLUDE = ["-I", str(HOST), "-I", str(ROOT / "csrc")]
# The checks call handlers of fibers.cpp, so that a misaligned address fails the launch and not the process.
KERNEL = ["-std=c++17", "-Wno-unknown-pragmas", "-fsanitize=alignment,bounds", "-x", "c++"]
KEPT_SECONDS = 3 * 24 * 3600


def backend_sources() -> list[Path]:
    """What the library of the CUDA backend is made of, whoever compiles it; setup.py names the same."""
    core = [ROOT / "csrc" / "core" / f"{name}.c" for name in ("arena", "cancel", "error", "memory")]
    ops = [ROOT / "csrc" / "ops" / "finite.c"]
    return sorted((ROOT / "csrc" / "ops" / "cuda").glob("*.c*")) + core + ops


@functools.cache
def cache_folder() -> Path:
    """Of this user alone; what nobody has used for days is removed."""
    folder = Path(tempfile.gettempdir()) / f"blip2c-cuda-host-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to somebody else")
    for file in folder.iterdir():
        if time.time() - file.stat().st_mtime > KEPT_SECONDS:
            file.unlink(missing_ok=True)
    return folder


@functools.cache
def headers_digest() -> bytes:
    digest = hashlib.sha256()
    for header in sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh"), *HOST.glob("*.h")]):
        digest.update(str(header.relative_to(ROOT)).encode() + header.read_bytes())
    return digest.digest()


def run(command: Sequence[str | Path]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(map(str, command))}\n{done.stderr}")


def made(suffix: str, digest: str, command: Sequence[str | Path]) -> Path:
    """The file that `command` plus `-o FILE` makes, once."""
    file = cache_folder() / f"{digest}{suffix}"
    if file.exists():
        os.utime(file)
        return file
    with tempfile.TemporaryDirectory(dir=cache_folder().parent) as folder:
        part = Path(folder, file.name)
        run([*command, "-o", part])
        shutil.move(part, file)
    return file


def compiled(source: Path) -> Path:
    if source.suffix == ".c":
        command = [*CC, "-std=c11", *COMMON, *INCLUDE, "-c", str(source)]
    else:
        kernel = KERNEL if source.suffix == ".cu" else ["-std=c++17"]
        command = [*CXX, *COMMON, *INCLUDE, *kernel, "-c", str(source)]
    told = [part.encode() for part in command] + [headers_digest(), source.read_bytes()]
    return made(".o", hashlib.sha256(b"\0".join(told)).hexdigest()[:32], command)


def card_library(sources: Sequence[Path], arch: str = "native") -> Path:
    """A shared library of `sources` (.cu, .c) for the card of this machine, or for `arch` ("sm_90")."""
    flags = ["-std=c++17", "-O3", f"-arch={arch}", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    objects = []
    for source in sources:
        if source.suffix == ".c":
            objects.append(compiled(source))
            continue
        command = [*NVCC, *flags, "-I", str(ROOT / "csrc"), "-c", str(source)]
        told = [part.encode() for part in command] + [headers_digest(), source.read_bytes()]
        objects.append(made(".card.o", hashlib.sha256(b"\0".join(told)).hexdigest()[:32], command))
    names = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:32]
    return made(".card.so", names, [*NVCC, f"-arch={arch}", "-shared", "-cudart", "static", *map(str, objects), "-ldl"])


def host_library(sources: Sequence[Path]) -> Path:
    """A shared library of `sources` (.cu, .cpp, .c) and the stand-in. RuntimeError with what the compiler says."""
    everything = [*sources, HOST / "fibers.cpp", HOST / "runtime.cpp", HOST / "callers.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, everything))
    names = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:32]
    command = [*CXX, "-shared", "-pthread", "-Wl,-z,defs", "-Wl,-Bsymbolic", *map(str, objects), "-ldl"]
    return made(".so", names, command)
