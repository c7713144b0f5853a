"""Runs Python code in a fresh interpreter that imports the same blip2c as this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import blip2c
from blip2c import _core

TESTS = Path(__file__).resolve().parent


def run_python(
    code: str, *arguments: object, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`code` in a new process, away from the source tree; its output is captured, its status not checked."""
    paths = [str(Path(blip2c.__file__).resolve().parent.parent), str(TESTS)]
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        cwd=os.path.dirname(sys.executable),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def set_threads(n: int) -> int:
    """In a child process, which must be able to import this function."""
    _core.set_num_threads(n)
    return _core.get_num_threads()
