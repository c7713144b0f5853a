"""Compiles the small C programs of tests/c with the compiler's sanitizers."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shlex.split(os.environ.get("CC") or "gcc")
WARNINGS = ["-Wall", "-Wextra", "-Werror"]


@functools.lru_cache
def has_sanitizer(sanitizer: str) -> bool:
    """Whether a program compiled with it runs here."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "a.c"), Path(folder, "a")
        source.write_text("int main(void) { return 0; }\n")
        try:
            subprocess.run(
                [*COMPILER, f"-fsanitize={sanitizer}", source, "-o", program], check=True, capture_output=True
            )
            return subprocess.run([program], capture_output=True).returncode == 0
        except (OSError, subprocess.CalledProcessError):
            return False


def build(program: Path, source: str, parts: list[str], sanitizer: str | None) -> None:
    """tests/c/`source` and `parts` of csrc into `program`. Skips the test where the compiler lacks the sanitizer."""
    if sanitizer and not has_sanitizer(sanitizer):
        pytest.skip(f"{COMPILER[0]} has no -fsanitize={sanitizer} here")
    flags = ["-std=c11", "-g", "-O1", "-pthread", *WARNINGS, "-I", str(ROOT / "csrc")]
    if sanitizer:
        flags += [f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    sources = [ROOT / "tests" / "c" / source, *(ROOT / "csrc" / part for part in parts)]
    done = subprocess.run([*COMPILER, *flags, *sources, "-lm", "-o", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def run(program: Path, *arguments: object, timeout: float = 120) -> str:
    """The output of a program that must end with status 0."""
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1:abort_on_error=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = subprocess.run(
        [program, *map(str, arguments)], capture_output=True, text=True, timeout=timeout, env=environment
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout
