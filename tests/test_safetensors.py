"""The safetensors reader and writer against the reference implementation, and against bad files."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import struct
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.safetensors_files import BAD, GOOD, assemble, entry
from blip2c._core import (
    CheckpointError,
    SafetensorsFile,
    _check_json,
    _fail_allocation_after,
    parse_safetensors,
    write_safetensors,
)
from running import run_python

NUMPY_DTYPES = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "F16": np.float16,
    "U32": np.uint32, "I32": np.int32, "F32": np.float32, "U64": np.uint64, "I64": np.int64, "F64": np.float64,
}  # fmt: skip
# Dtypes of the reference that blip2c does not know (docs/FORMATS.md).
OTHER_DTYPES = {"F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "C64"}


def ours(data: bytes) -> str | None:
    """None if accepted, else the rule."""
    try:
        parse_safetensors(data)
    except CheckpointError as error:
        return str(error).split(": ")[1]
    return None


def reference(data: bytes) -> bool:
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


def stricter(data: bytes) -> bool:
    """Whether a file that the reference takes breaks a rule that only blip2c has.

    Works on the JSON alone, with Python's parser, so that it shares nothing with what it judges.
    """
    header = data[8 : 8 + struct.unpack("<Q", data[:8])[0]].decode()
    if not header.startswith("{"):
        return True
    found: list[bool] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        found.append(len(set(keys)) != len(keys))
        return dict(items)

    content = json.loads(header, object_pairs_hook=pairs)
    metadata = content.pop("__metadata__", {})
    if any(found) or metadata is None or "\0" in json.dumps([*content, metadata]).replace("\\u0000", "\0"):
        return True
    for info in content.values():
        if not isinstance(info, dict) or set(info) != {"dtype", "shape", "data_offsets"}:
            return True
        product = 1
        for axis in [*info["shape"], 8]:
            product *= axis
            if axis >= 2**63 or product >= 2**63:
                return True
        if len(info["shape"]) > 8 or not isinstance(info["dtype"], str) or info["dtype"] in OTHER_DTYPES:
            return True
    return False


def assert_alike(data: bytes) -> bool:
    """Both take it or both refuse it, but for the documented rules. Returns whether blip2c took it."""
    rule = ours(data)
    if rule is None:
        assert reference(data), data
    elif reference(data):
        assert stricter(data), (rule, data)
    return rule is None


# -- bad files ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_refused_by_name(name: str, tmp_path: Path) -> None:
    data, rule = BAD[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        SafetensorsFile(path)
    assert time.perf_counter() - start < 0.1
    assert str(caught.value).startswith(f"{path}: {rule}: ")
    assert ours(data) == rule


@pytest.mark.parametrize("name", GOOD)
def test_unusual_legal_file_is_read(name: str, tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD[name])
    file = SafetensorsFile(path)
    with safetensors.safe_open(path, framework="np") as expected:
        assert sorted(file.names()) == sorted(expected.keys())
        assert file.metadata() == (expected.metadata() or {})
        for tensor in file.names():
            np.testing.assert_array_equal(file.tensor(tensor), expected.get_tensor(tensor))


def test_bad_files_agree_with_reference() -> None:
    for data, _ in BAD.values():
        assert not assert_alike(data)
    for data in GOOD.values():
        assert assert_alike(data)


def test_message_names_tensor_found_and_expected() -> None:
    with pytest.raises(CheckpointError, match='<bytes>: hole: "b": begins at 5, expected 4'):
        parse_safetensors(BAD["hole between"][0])
    with pytest.raises(CheckpointError, match='byte-size: "a": F32 of this shape: expected 16 bytes, found 4'):
        parse_safetensors(BAD["size too small"][0])
    with pytest.raises(CheckpointError, match=r'unknown-dtype: "a": .*found "F12"'):
        parse_safetensors(BAD["unknown dtype"][0])


def test_names_of_bad_files_cannot_break_the_message() -> None:
    hostile = assemble({"x\n\x1b[31m%s%n" + "y" * 10_000: entry(1, 2)}, bytes(2))
    with pytest.raises(CheckpointError, match=r'hole: "x\?\?\[31m%s%ny+\.\.\.": begins') as caught:
        parse_safetensors(hostile)
    assert len(str(caught.value)) < 512


def test_refusal_is_small_and_fast(tmp_path: Path) -> None:
    """A 90 MB header of brackets, a 90 MB string, a terabyte-long sparse file, and the whole corpus."""
    brackets, string, sparse = (tmp_path / f"{i}.safetensors" for i in range(3))
    brackets.write_bytes(assemble('{"a":{"dtype":' + "[" * 90_000_000))
    string.write_bytes(struct.pack("<Q", 90_000_000) + b'{"a' + bytes(90_000_000))
    sparse.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    os.truncate(sparse, 2**40)
    result = run_python(
        """
import os, resource, sys, time
from attacks.safetensors_files import BAD
from blip2c._core import CheckpointError, SafetensorsFile, parse_safetensors
def peak():  # kB
    if not os.path.exists("/proc/self/status"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
before, worst = peak(), 0.0
def refused(function, argument):
    global worst
    start = time.perf_counter()
    try:
        function(argument)
    except CheckpointError:
        worst = max(worst, time.perf_counter() - start)
        return
    raise SystemExit("accepted: %r" % (argument,))
for path in sys.argv[1:]:
    refused(SafetensorsFile, path)
for data, _ in BAD.values():
    refused(parse_safetensors, data)
print(worst, peak() - before, peak())
""",
        brackets, string, sparse,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    worst, grown, whole = map(float, result.stdout.split())
    assert worst < 0.1
    assert grown < 8000  # kB
    assert whole < 64000  # with the interpreter and NumPy


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.safetensors"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="regular-file"):
            SafetensorsFile(path)
    with pytest.raises(IsADirectoryError):
        SafetensorsFile(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"nothing.safetensors"):
        SafetensorsFile(tmp_path / "nothing.safetensors")
    with pytest.raises(TypeError):
        SafetensorsFile(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="null"):
        SafetensorsFile("a\0b")


def test_unknown_names(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(GOOD["rank 8"])
    file = SafetensorsFile(path)
    for name in ("", "b", "a\0", "a" * 1000):
        with pytest.raises(KeyError):
            file.tensor(name)
        with pytest.raises(KeyError):
            file.info(name)
    with pytest.raises(TypeError):
        file.tensor(b"a")  # type: ignore[arg-type]


# -- against the reference ---------------------------------------------------------------------------------------------


def random_tensors(rng: np.random.Generator, count: int) -> dict[str, torch.Tensor]:
    dtypes = [dtype for name, dtype in safetensors.torch._TYPES.items() if name not in OTHER_DTYPES]
    tensors = {}
    for i in range(count):
        shape = tuple(int(n) for n in rng.integers(0, 5, rng.integers(0, 9)))
        dtype = dtypes[int(rng.integers(len(dtypes)))]
        raw = rng.integers(0, 2 if dtype == torch.bool else 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8)
        tensor = torch.from_numpy(raw).view(dtype).reshape(shape) if raw.size else torch.empty(shape, dtype=dtype)
        tensors[f"{'ключ' if i % 3 == 0 else 'layer'}.{i}"] = tensor
    return tensors


def bits(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of a tensor in a NumPy dtype of the same size."""
    size = tensor.element_size()
    if tensor.numel() == 0:
        return np.empty(tuple(tensor.shape), f"u{size}")
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    return tensor.reshape(-1).view(view).numpy().view(f"u{size}").reshape(tensor.shape)


@pytest.mark.parametrize("seed", range(30))
def test_reads_what_the_reference_wrote(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(np.random.default_rng(seed), seed)
    metadata = {"format": "pt", "ü": '"\\\n\x01'} if seed % 2 else None
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file(tensors, path, metadata)
    file = SafetensorsFile(path)
    assert sorted(file.names()) == sorted(tensors)
    assert file.metadata() == (metadata or {})
    with safetensors.safe_open(path, "np") as expected:
        # Empty tensors begin where others do: their order is open.
        full = {name for name, tensor in tensors.items() if tensor.numel() > 0}
        assert [n for n in file.names() if n in full] == [n for n in expected.offset_keys() if n in full]
    for name, tensor in tensors.items():
        dtype, shape = file.info(name)
        assert (safetensors.torch._TYPES[dtype], shape) == (tensor.dtype, tuple(tensor.shape))
        found = file.tensor(name)
        assert found.shape == tuple(tensor.shape)
        assert found.dtype == NUMPY_DTYPES.get(dtype, {1: np.uint8, 2: np.uint16}[tensor.element_size()] if
                                               dtype not in NUMPY_DTYPES else None)  # fmt: skip
        np.testing.assert_array_equal(found.view(f"u{tensor.element_size()}"), bits(tensor))


@pytest.mark.parametrize("seed", range(30))
def test_reference_reads_what_we_wrote(seed: int, tmp_path: Path) -> None:
    tensors = random_tensors(np.random.default_rng(1000 + seed), seed)
    names = {dtype: name for name, dtype in safetensors.torch._TYPES.items()}
    arrays, dtypes = {}, {}
    for name, tensor in tensors.items():
        dtypes[name] = names[tensor.dtype]
        arrays[name] = bits(tensor).view(NUMPY_DTYPES.get(dtypes[name], f"u{tensor.element_size()}"))
    metadata = {"a": '"\\\n\x01/é😀', "": ""}
    path = tmp_path / "a.safetensors"
    write_safetensors(path, arrays, dtypes, metadata)
    loaded = safetensors.torch.load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        np.testing.assert_array_equal(bits(loaded[name]), bits(tensor))
    with safetensors.safe_open(path, "np") as file:
        assert file.metadata() == metadata
    assert SafetensorsFile(path).metadata() == metadata
    data = path.read_bytes()
    header = struct.unpack("<Q", data[:8])[0]
    assert (8 + header) % 64 == 0
    for info in json.loads(data[8 : 8 + header]).values():
        if "dtype" in info and "data_offsets" in info:  # every tensor is aligned to its elements
            assert info["data_offsets"][0] % safetensors.torch._TYPES[info["dtype"]].itemsize == 0


def mutate(rng: random.Random, header: bytes, data: bytes) -> bytes:
    """Something small goes wrong in the header, or in the sizes around it."""
    text = bytearray(header)
    pieces = [b"0", b"-1", b"1e0", b"18446744073709551615", b"9223372036854775808", b"{", b"}", b"[", b"]", b",", b":",
              b'"', b"\\", b"\\u0000", b"\\ud800", b"\xff", b"\xc3\xa9", b" ", b"\n", b"\0", b"null", b"true", b"[[[[",
              b'"F32"', b'"BF16"', b'"C64"', b'"F4"', b'"shape"', b'"__metadata__"', b'"dtype":"U8",',
              b"00"]  # fmt: skip
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text) + 1)
        kind = rng.randrange(6)
        if kind == 0:
            text[at:at] = rng.choice(pieces)
        elif kind == 1:
            del text[at : at + rng.randint(1, 4)]
        elif kind == 2 and at < len(text):
            text[at] ^= 1 << rng.randrange(8)
        elif kind == 3:
            start = rng.randrange(len(text) + 1)
            text[at:at] = text[start : start + rng.randint(1, 80)]
        elif kind == 4:  # a digit becomes another one
            digits = [i for i, byte in enumerate(text) if chr(byte).isdigit()]
            if digits:
                text[rng.choice(digits)] = ord(rng.choice("0123456789"))
        else:
            data = data[: rng.randrange(len(data) + 1)] + bytes(rng.randint(0, 2))
    length = len(text) + (rng.choice([-9, -1, 1, 2**32, 2**63]) if rng.random() < 0.05 else 0)
    return struct.pack("<Q", max(length, 0)) + bytes(text) + data


def small_file(rng: random.Random) -> tuple[bytes, bytes]:
    end, entries = 0, {}
    for i in range(rng.randint(0, 4)):
        size = rng.choice([0, 1, 2, 4, 8])
        shape = [[size], [1, size], [size, 1, 1], [2, size // 2] if size % 2 == 0 else [size]][rng.randrange(4)]
        entries["abcd"[i]] = entry(end, end + size, "U8", shape)
        end += size
    if rng.random() < 0.3:
        entries["__metadata__"] = {"format": "pt"}
    items = list(entries.items())
    rng.shuffle(items)
    return json.dumps(dict(items), separators=(",", ":")).encode(), bytes(end)


@pytest.mark.parametrize("seed", range(4))
def test_mutations_agree_with_reference(seed: int) -> None:
    rng = random.Random(seed)
    taken = 0
    for _ in range(5000):
        header, data = small_file(rng)
        assert assert_alike(struct.pack("<Q", len(header)) + header + data)
        taken += assert_alike(mutate(rng, header, data))
    assert 100 < taken < 4900  # the mutations are neither all fatal nor all harmless


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**65) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.sampled_from(["F32", "U8", "shape"]),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "x", "__metadata__"]), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), json_values, max_size=4), st.binary(max_size=16))
def test_any_json_agrees_with_reference(header: dict[str, Any], data: bytes) -> None:
    assert_alike(assemble(header, data))


@settings(max_examples=500, deadline=None, derandomize=True)
@given(json_values, st.binary(max_size=3), st.integers(0, 200))
def test_check_json_agrees_with_python(value: Any, noise: bytes, at: int) -> None:
    """RFC 8259 as Python's parser has it, told to refuse NaN and Infinity."""
    text = json.dumps(value, ensure_ascii=at % 2 == 0).encode("utf-8", "surrogatepass")
    _check_json(text, "f")
    text = text[:at] + noise + text[at:]
    try:
        json.loads(text.decode(), parse_constant=lambda name: 1 / 0)
        valid = True
    except (ValueError, ZeroDivisionError):
        valid = False
    try:
        _check_json(text, "f")
        taken = True
    except CheckpointError:
        taken = False
    assert taken == valid, text


# -- damage ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> bytes:
    path = tmp_path / "small.safetensors"
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(3, 4)).astype(np.float32), "b": np.arange(5, dtype=np.uint16), "é": np.array(1.5)}
    write_safetensors(path, arrays, {"b": "BF16"}, {"format": "pt"})
    return path.read_bytes()


def test_truncation_at_every_byte(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    for size in range(len(small)):
        path.write_bytes(small[:size])
        with pytest.raises(CheckpointError):
            SafetensorsFile(path)
        assert ours(small[:size]) is not None


def test_every_bit_flip_of_the_header(small: bytes, tmp_path: Path) -> None:
    end = 8 + struct.unpack("<Q", small[:8])[0]
    path = tmp_path / "flipped.safetensors"
    taken = 0
    for at in range(end):
        for bit in range(8):
            flipped = bytearray(small)
            flipped[at] ^= 1 << bit
            if assert_alike(bytes(flipped)):
                taken += 1
                path.write_bytes(flipped)
                file = SafetensorsFile(path)
                for name in file.names():
                    file.tensor(name)
    assert taken > 0  # a flipped letter of a name is another name


def test_every_allocation_may_fail(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    arrays = {"a": np.ones(3, np.float32)}
    attempts: dict[str, Any] = {
        "open": lambda: SafetensorsFile(path),
        "parse": lambda: parse_safetensors(small),
        "write": lambda: write_safetensors(path, arrays, {}, {"a": "b"}),
    }
    for name, attempt in attempts.items():
        failures = 0
        while failures < 100:
            _fail_allocation_after(failures + 1)
            try:
                attempt()
                break
            except MemoryError:
                failures += 1
            finally:
                _fail_allocation_after(0)
            assert path.read_bytes() == small
        assert 4 <= failures < 100, name
    assert os.listdir(tmp_path) == ["small.safetensors"]


# -- the writer --------------------------------------------------------------------------------------------------------


def test_layouts_of_arrays(tmp_path: Path) -> None:
    """Strided, Fortran-ordered and byte-swapped arrays are stored by value; the file holds row-major little-endian."""
    path = tmp_path / "a.safetensors"
    base = np.arange(24, dtype=np.int32).reshape(4, 6)
    arrays = {
        "strided": base[::2, ::-1], "fortran": np.asfortranarray(base), "swapped": base.astype(">i4"),
        "zero": np.zeros((0, 3), np.float32), "scalar": np.array(7, np.int64),
        "broadcast": np.broadcast_to(base[0], (3, 6)),
    }  # fmt: skip
    write_safetensors(path, arrays, {})
    for name, expected in safetensors.numpy.load_file(path).items():
        np.testing.assert_array_equal(expected, arrays[name])
        assert expected.shape == arrays[name].shape
        np.testing.assert_array_equal(SafetensorsFile(path).tensor(name), arrays[name])


def test_writer_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    one = np.ones(1, np.float32)
    cases: list[tuple[type[Exception], dict[Any, Any], dict[Any, Any], dict[Any, Any] | None]] = [
        (TypeError, {"a": [1.0]}, {}, None),
        (TypeError, {"a": np.ones(1, np.complex64)}, {}, None),
        (TypeError, {"a": np.array(["x"])}, {}, None),
        (TypeError, {"a": np.array([None])}, {}, None),
        (TypeError, {"a": one}, {"a": "BF16"}, None),
        (TypeError, {1: one}, {}, None),
        (TypeError, {"a": one}, {}, {"a": 1}),
        (TypeError, {"a": one}, {"a": 3}, None),
        (ValueError, {"a": one}, {"a": "F12"}, None),
        (ValueError, {"a\0": one}, {}, None),
        (ValueError, {"__metadata__": one}, {}, None),
        (ValueError, {"\ud800": one}, {}, None),
        (ValueError, {"a": np.ones([1] * 9)}, {}, None),
    ]
    for error, tensors, dtypes, metadata in cases:
        with pytest.raises(error):
            write_safetensors(path, tensors, dtypes, metadata)
        assert os.listdir(tmp_path) == []


def test_failed_write_keeps_the_old_file(small: bytes, tmp_path: Path) -> None:
    """The file grows past the process's limit in the middle of a tensor: EFBIG, as a full disk gives ENOSPC."""
    path = tmp_path / "small.safetensors"
    result = run_python(
        """
import resource, sys
import numpy as np
from blip2c._core import write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    write_safetensors(sys.argv[1], {"a": np.ones(60_000, np.uint8), "b": np.ones(60_000, np.uint8)}, {})
except OSError as error:
    print(error.errno, error)
""",
        path,
    )
    assert result.returncode == 0, result.stderr
    assert "[Errno 27]" in result.stdout
    assert str(path) in result.stdout
    assert path.read_bytes() == small
    assert os.listdir(tmp_path) == ["small.safetensors"]


def test_symbolic_link_is_replaced_not_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "blob", tmp_path / "link.safetensors"
    target.write_bytes(b"precious")
    link.symlink_to(target)
    write_safetensors(link, {"a": np.ones(2)}, {})
    assert target.read_bytes() == b"precious"
    assert not link.is_symlink()
    np.testing.assert_array_equal(SafetensorsFile(link).tensor("a"), np.ones(2))


def test_write_where_one_may_not(small: bytes, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_safetensors(tmp_path / "no" / "a.safetensors", {"a": np.ones(1)}, {})
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_safetensors(tmp_path / "folder", {"a": np.ones(1)}, {})
    assert sorted(os.listdir(tmp_path)) == ["folder", "small.safetensors"]
    if os.geteuid() != 0:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError):
            write_safetensors(tmp_path / "small.safetensors", {"a": np.ones(1)}, {})
        tmp_path.chmod(0o700)
    assert (tmp_path / "small.safetensors").read_bytes() == small


def test_killed_writer_leaves_whole_files(tmp_path: Path) -> None:
    """SIGKILL at random times: the file is always one of the two whole ones."""
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.zeros(300_000)}, {})
    rng = random.Random(0)
    code = """
import os, sys, threading, time, signal
import numpy as np
from blip2c._core import write_safetensors
arrays = [np.full(300_000, value) for value in (1.0, 2.0)]
threading.Timer(float(sys.argv[2]), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
for i in range(10**9):
    write_safetensors(sys.argv[1], {"a": arrays[i % 2]}, {})
"""
    for _ in range(8):
        assert run_python(code, path, rng.uniform(0.01, 0.15)).returncode == -9
        found = SafetensorsFile(path).tensor("a")
        assert (found == found[0]).all()
    assert found[0] in (1.0, 2.0)


def test_threads_write_and_read_one_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"a": np.zeros(10_000)}, {})
    problems: list[str] = []

    def work(value: float) -> None:
        try:
            for _ in range(20):
                write_safetensors(path, {"a": np.full(10_000, value)}, {})
                found = SafetensorsFile(path).tensor("a")
                if not (found == found[0]).all():
                    problems.append("torn")
        except Exception as error:
            problems.append(repr(error))

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_nothing_leaks(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"

    def round_of_everything() -> None:
        file = SafetensorsFile(path)
        for name in file.names():
            file.tensor(name), file.info(name), file.metadata()
        with pytest.raises(FileNotFoundError):
            write_safetensors(tmp_path / "no" / "a", {"a": np.ones(10)}, {"a": "F64"}, {"k": "v"})
        for data in (BAD["overlap"][0], BAD["tensor twice"][0], small):
            ours(data)

    for _ in range(50):
        round_of_everything()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(1000):
        round_of_everything()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2000  # kB
    if descriptors:
        assert len(os.listdir("/proc/self/fd")) == descriptors
