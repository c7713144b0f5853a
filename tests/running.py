"""Runs Python code in a fresh interpreter that imports the same blip2c as this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import blip2c
from blip2c import _core

TESTS = Path(__file__).resolve().parent


def child_process(**environment: str) -> dict[str, Any]:
    """cwd and env of a child that imports the blip2c of this process, not a source tree that it happens to start in."""
    paths = [str(Path(blip2c.__file__).resolve().parent.parent), str(TESTS)]
    return {
        "cwd": os.path.dirname(sys.executable),
        "env": {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
    }


def run_python(
    code: str, *arguments: object, timeout: float = 60, **environment: str
) -> subprocess.CompletedProcess[str]:
    """`code` in a new process, away from the source tree; its output is captured, its status not checked."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        **child_process(**environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def set_threads(n: int) -> int:
    """In a child process, which must be able to import this function."""
    _core.set_num_threads(n)
    return _core.get_num_threads()
