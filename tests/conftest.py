"""The tests import the installed blip2c, or the one built in place; never a source tree without its C part."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import pytest
import torch
import transformers

from cuda_build import backend_sources, host_library

ROOT = Path(__file__).resolve().parent.parent


def _leave_unbuilt_sources_alone() -> None:
    """`python -m pytest` puts this folder first; without a built _core its blip2c would hide the installed one."""
    if not any((ROOT / "blip2c").glob("_core.*.so")):
        sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]


_leave_unbuilt_sources_alone()

try:
    import blip2c
    from blip2c import _core
except ImportError as error:
    raise pytest.UsageError(f"blip2c does not import ({error}); build and install it: pip install '.[test]'") from error

# A runner that was started in the background may ignore Ctrl-C, and hands that on to every child.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ON_CARD = os.environ.get("BLIP2C_TEST_CARD") == "1"
# Another library on the same devices is one of the stand-in's.
collect_ignore = [
    p.name for p in Path(__file__).parent.glob("test_cuda_*.py") if ON_CARD and "cuda_callers" in p.read_text()
]

# The reference models are tiny: a second thread costs more than it brings, most of all on a busy machine.
torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Before any test runs, because a process keeps the first library that it opens. With BLIP2C_TEST_CARD=1 devices
    are the cards of this machine, through the library that was installed."""
    wanted = any("cuda" in getattr(item, "fixturenames", ()) for item in session.items)
    if wanted and not session.config.option.collectonly and not ON_CARD:
        os.environ["BLIP2C_CUDA_LIBRARY"] = str(host_library(backend_sources()))


@pytest.fixture(scope="session")
def cuda() -> str:
    """The device of tests that need one: the backend as compiled for the host, once per run, or a card."""
    return "cuda"


def pytest_report_header() -> str:
    info = _core.cpu_info()
    threads = _core.get_num_threads()
    return f"blip2c: {Path(blip2c.__file__).parent}, {info['isa']}, {threads} threads, {info['brand']}"
