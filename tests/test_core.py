"""What the C part says of the machine, its threads and its life across fork, spawn and environment variables."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import blip2c
from blip2c import _core
from running import run_python, set_threads

ISAS = ("generic", "avx2", "avx512", "avx512_vnni", "avx512_bf16")
IMPORT = "from blip2c import _core; print(_core.cpu_info()['isa'], _core.get_num_threads())"


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    threads = _core.get_num_threads()
    yield
    _core.set_num_threads(threads)


def test_cpu_info() -> None:
    info = _core.cpu_info()
    assert info["isa"] in ISAS
    assert info["processors"] == len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else True
    if os.path.exists("/proc/cpuinfo") and info["brand"]:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = set(next((line for line in lines if line.startswith("flags")), "").split())
        assert info["avx2"] == {"avx2", "fma", "f16c"}.issubset(flags)
        assert info["avx512"] == {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}.issubset(flags)
        assert info["avx512_vnni"] == ("avx512_vnni" in flags)
        assert info["brand"] in Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set_is_forced_or_refused(isa: str) -> None:
    result = run_python(IMPORT, BLIP2C_ISA=isa)
    if isa == "generic" or _core.cpu_info()[isa]:
        assert result.stdout.split()[0] == isa, result.stderr
    else:
        assert f"UnsupportedError: BLIP2C_ISA={isa}" in result.stderr


def test_unknown_instruction_set() -> None:
    result = run_python(IMPORT, BLIP2C_ISA="sse9" * 100)
    assert result.returncode != 0
    assert "BLIP2C_ISA=sse9sse9" in result.stderr
    assert "expected generic, avx2, avx512, avx512_vnni or avx512_bf16" in result.stderr


def test_threads() -> None:
    for n in (1, 2, 7, 256):
        _core.set_num_threads(n)
        assert _core.get_num_threads() == n
    for bad in (0, -1, 257, 2**31, 2**32 + 1, -(2**40)):
        with pytest.raises(ValueError, match=f"threads: expected 1 to 256, found {bad}"):
            _core.set_num_threads(bad)
    with pytest.raises(OverflowError):
        _core.set_num_threads(2**100)
    with pytest.raises(TypeError):
        _core.set_num_threads("2")  # type: ignore[arg-type]
    assert _core.get_num_threads() == 256


if hasattr(os, "sched_setaffinity"):

    def test_threads_follow_affinity() -> None:
        result = run_python("import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]); " + IMPORT)
        assert result.stdout.split()[1:] == ["1"], result.stderr


@pytest.mark.parametrize("method", multiprocessing.get_all_start_methods())
def test_child_processes(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data loader's worker sets its threads first: no lock of the parent may hold it up."""
    paths = [str(Path(blip2c.__file__).resolve().parent.parent), str(Path(__file__).parent)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    stop = threading.Event()

    def keep_busy() -> None:
        while not stop.is_set():
            _core.set_num_threads(2)

    thread = threading.Thread(target=keep_busy)
    thread.start()
    try:
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map_async(set_threads, [1, 2, 3, 4]).get(timeout=60) == [1, 2, 3, 4]
    finally:
        stop.set()
        thread.join()


def test_import_leaves_signals_and_floating_point_alone() -> None:
    """No flush-to-zero by a linked start-up file, no changed handlers, no threads before the first computation."""
    result = run_python(
        """
import signal, threading, os
before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)]
from blip2c import _core
assert before == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE, signal.SIGCHLD)]
assert 5e-324 * 1.0 != 0.0 and 2.0**-1070 * 0.5 != 0.0
if os.path.isdir("/proc/self/task"):
    import numpy
    print(len(os.listdir("/proc/self/task")))
""",
        OPENBLAS_NUM_THREADS="1",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() in ("1", "")


SUBINTERPRETER = """
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
which = interpreters.create()
try:
    error = interpreters.run_string(which, "import blip2c._core")
except Exception as raised:
    error = raised
print(error)
"""

if sys.version_info >= (3, 12):  # before, a module could not refuse

    def test_subinterpreters_are_refused() -> None:
        result = run_python(SUBINTERPRETER)
        assert result.returncode == 0, result.stderr
        assert "does not support loading in subinterpreters" in result.stdout


if sys.platform == "linux":

    def test_private_openblas_is_not_shared() -> None:
        """The library beside the extension has a name of its own, found by a relative path: not SciPy's."""
        core = Path(_core.__file__)
        library = core.parent / ".libs" / "libblip2_openblas.so"
        assert library.exists()
        listed = subprocess.run(["ldd", core], capture_output=True, text=True, check=True).stdout
        (line,) = [line for line in listed.splitlines() if "openblas" in line]
        name, _, found = line.strip().partition(" => ")
        assert name == library.name
        assert Path(found.split(" (")[0]).resolve() == library.resolve()
        maps = run_python("import blip2c._core; print(open('/proc/self/maps').read())").stdout
        loaded = {Path(line.split()[-1]).name for line in maps.splitlines() if "scipy_openblas" in line}
        assert not {name for name in loaded if "64" not in name}  # NumPy's own is libscipy_openblas64_
