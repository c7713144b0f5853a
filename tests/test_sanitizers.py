"""The parts that read untrusted files or share memory between threads, outside Python and under sanitizers."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import c_harness
from attacks.index_files import INDEXES
from attacks.safetensors_files import BAD, GOOD
from test_safetensors import mutate, ours, small_file

CORE = ["core/error.c", "core/memory.c", "core/cancel.c"]
IO = [*CORE, "io/json.c", "io/safetensors.c"]


def write_cases(path: Path, cases: list[bytes]) -> None:
    path.write_bytes(b"".join(struct.pack("<I", len(case)) + case for case in cases))


def test_readers_under_address_and_undefined(tmp_path: Path) -> None:
    """The attack corpus, its truncations and flips, and thousands of mutations: no finding, the same verdicts."""
    rng = random.Random(7)
    corpus = [data for data, _ in BAD.values()] + list(GOOD.values())
    cases = corpus + [content for content, _ in INDEXES.values()]
    for data in corpus:
        if len(data) < 2000:
            cases += [data[:size] for size in range(len(data))]
            cases += [
                data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for at in range(len(data)) for bit in (0, 5)
            ]
    for _ in range(5000):
        header, data = small_file(rng)
        cases.append(mutate(rng, header, data))
    program = tmp_path / "check_io"
    c_harness.build(program, "check_io.c", IO, "address,undefined")
    write_cases(tmp_path / "cases", cases)
    count, taken, _ = map(int, c_harness.run(program, tmp_path / "cases").split())
    assert count == len(cases)
    assert taken == sum(ours(case) is None for case in cases)


def test_writer_under_address_and_undefined(tmp_path: Path) -> None:
    program = tmp_path / "check_writer"
    c_harness.build(program, "check_writer.c", [*IO, "io/safetensors_writer.c"], "address,undefined")
    folder = tmp_path / "folder"
    folder.mkdir()
    c_harness.run(program, folder)
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]


def test_pool_under_thread_sanitizer(tmp_path: Path) -> None:
    program = tmp_path / "check_pool"
    c_harness.build(program, "check_pool.c", [*CORE, "core/pool.c"], "thread")
    c_harness.run(program)


def test_pool_survives_fork(tmp_path: Path) -> None:
    program = tmp_path / "check_pool"
    c_harness.build(program, "check_pool.c", [*CORE, "core/pool.c"], None)
    c_harness.run(program)
    c_harness.run(program, "fork")
