"""The stand-in for a card that the CUDA tests run on: it computes what a card would, and says what a card would not."""

import ctypes
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cuda_build import HOST, host_library

F32 = np.float32


@pytest.fixture(scope="module")
def library_path() -> Path:
    return host_library([HOST / "samples.cu"])


@pytest.fixture(scope="module")
def samples(library_path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(library_path))
    for name in ("block_sums", "leave_early", "read_shared", "wrong", "race", "warp_words", "convert", "graph",
                 "sync_in_capture", "other_device"):  # fmt: skip
        getattr(library, f"run_{name}").restype = ctypes.c_char_p
    return library


def call(function, array: np.ndarray, *arguments: int) -> str:
    return function(array.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), *arguments).decode()


def test_blocks_shuffles_and_shared_memory(samples: ctypes.CDLL) -> None:
    x = np.arange(1000, dtype=F32)
    expected = np.concatenate([np.full(len(part), part.sum(), F32) for part in np.split(x, range(96, 1000, 96))])
    assert call(samples.run_block_sums, x, 1000, 96) == ""
    np.testing.assert_array_equal(x, expected)


@pytest.mark.parametrize(("n", "threads"), [(1, 32), (31, 32), (40, 64), (64, 64), (5, 3 * 32 + 7)])
def test_threads_that_leave_are_not_waited_for(samples: ctypes.CDLL, n: int, threads: int) -> None:
    out = np.zeros(n, F32)
    assert call(samples.run_leave_early, out, n, threads) == ""
    i = np.arange(n)
    np.testing.assert_array_equal(out, np.where(i % 32 == 0, -1, i - 1))


def test_shared_memory_is_nan_before_every_block(samples: ctypes.CDLL) -> None:
    out = np.zeros(10, F32)
    assert call(samples.run_read_shared, out, 10) == ""
    assert np.isnan(out).all()


def test_warp_operations(samples: ctypes.CDLL) -> None:
    out = np.zeros(193, F32)
    assert call(samples.run_warp_words, out) == ""
    words = out.view(np.uint32)
    lane = np.arange(32)
    assert (words[:32] == sum(1 << i for i in range(0, 32, 3))).all()
    assert (words[32:64].view(np.int32) == -16).all()
    assert (words[64:96].view(np.int32) == 0).all()
    assert (words[96:128] == np.where(lane % 8 < 5, lane + 3, lane)).all()
    assert (words[128:160] == np.where(lane < 4, 2, 99)).all()
    assert (words[160:192] == 7).all()
    assert words[192] == lane.sum()


@pytest.mark.parametrize(
    ("which", "words"),
    [
        (0, "two_barriers: block (0, 0, 0): threads wait at different barriers: thread 0 at samples.cu"),
        (1, "barrier_and_shuffle: block (0, 0, 0): threads wait at different barriers"),
        (2, "different_shuffles: block (0, 0, 0): lanes of one warp are at different operations"),
        (3, "behind_shared: block (0, 0, 0): wrote behind its 124 bytes of dynamic shared memory"),
        (4, "behind_allocation: wrote 0 bytes behind an allocation of 128 bytes"),
        (5, "misaligned: block (0, 0, 0): thread 0 at samples.cu"),
        (6, "stopped: block (0, 0, 0): thread 5 stopped at samples.cu"),
        (7, "add: argument 1: a pointer of the host"),
        (8, "invalid configuration argument"),
        (9, "invalid argument"),
        (10, "invalid configuration argument"),
        (11, "invalid argument"),
        (12, "invalid copy direction"),
        (13, "out of memory"),
    ],
)
def test_what_is_wrong_is_said(samples: ctypes.CDLL, which: int, words: str) -> None:
    out = np.zeros(32, F32)
    assert words in call(samples.run_wrong, out, which)
    assert call(samples.run_block_sums, out, 32, 32) == "", "the next launch works"


def test_both_orders_of_threads_show_races(samples: ctypes.CDLL) -> None:
    out = np.zeros(256, F32)
    assert call(samples.run_race, out) == ""
    assert np.isnan(out).any()


@pytest.mark.parametrize("bfloat16", [0, 1])
def test_conversions_are_torchs(samples: ctypes.CDLL, bfloat16: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2**32, 20000, dtype=np.uint64).astype(np.uint32).view(F32)
    x = np.concatenate([x, rng.standard_normal(20000).astype(F32) * F32(1e-6), rng.standard_normal(20000).astype(F32)])
    expected = torch.from_numpy(x).to(torch.bfloat16 if bfloat16 else torch.float16).float().numpy()
    out = x.copy()
    assert call(samples.run_convert, out, len(out), bfloat16) == ""
    np.testing.assert_array_equal(out, expected)


def test_graphs_are_replayed_with_what_pinned_memory_holds_then(samples: ctypes.CDLL) -> None:
    out = np.zeros(4, F32)
    assert call(samples.run_graph, out, 4, 0) == ""
    np.testing.assert_array_equal(out, [1, 2, 3, 4])
    assert call(samples.run_graph, out, 4, 1) == ""
    np.testing.assert_array_equal(out, [-99, -99, -99, -99])


def test_waiting_spoils_a_capture(samples: ctypes.CDLL) -> None:
    assert "capture" in samples.run_sync_in_capture().decode()


def test_memory_of_another_device(samples: ctypes.CDLL) -> None:
    assert "argument 0: a pointer into another device" in call(samples.run_other_device, np.zeros(32, F32))


def test_the_host_cannot_read_device_memory(library_path: Path) -> None:
    code = (
        "import ctypes, sys; library = ctypes.CDLL(sys.argv[1]); library.device_address.restype = ctypes.c_void_p\n"
        "address = library.device_address(); assert address; print('allocated', flush=True)\n"
        "ctypes.string_at(address, 4); print('read')"
    )
    done = subprocess.run([sys.executable, "-c", code, library_path], capture_output=True, text=True, check=False)
    assert done.stdout == "allocated\n"
    assert done.returncode != 0
