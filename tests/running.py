"""Runs Python code in a fresh interpreter that imports the same blip2c as this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import blip2c

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
