"""The tests import the installed blip2c, or the one built in place; never a source tree without its C part."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _leave_unbuilt_sources_alone() -> None:
    """`python -m pytest` puts the current folder first; without a built _core its blip2c would hide the installed one."""
    if not any((ROOT / "blip2c").glob("_core.*.so")):
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


_leave_unbuilt_sources_alone()

try:
    import blip2c
    from blip2c import _core
except ImportError as error:
    raise pytest.UsageError(f"blip2c does not import ({error}); build and install it: pip install '.[test]'") from error


def pytest_report_header() -> str:
    info = _core.cpu_info()
    threads = _core.get_num_threads()
    return f"blip2c: {Path(blip2c.__file__).parent}, {info['isa']}, {threads} threads, {info['brand']}"
