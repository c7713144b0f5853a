"""Safetensors files that break one rule each, and legal ones at the edge."""

from __future__ import annotations

import json
import struct
from typing import Any


def assemble(header: bytes | str | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A file: header length (the true one unless given), header, data."""
    if isinstance(header, dict):
        header = json.dumps(header, separators=(",", ":"))
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(begin: int, end: int, dtype: str = "U8", shape: list[int] | None = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def _raw(entry_text: str, data: bytes = bytes(4)) -> bytes:
    """One tensor "a" whose description is `entry_text`."""
    return assemble('{"a":' + entry_text + "}", data)


_GOOD = '{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
_TWO = {"a": entry(0, 4), "b": entry(4, 8)}

# name -> (file, rule)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "file-too-small"),
    "seven bytes": (bytes(7), "file-too-small"),
    "header of 0 bytes": (bytes(8), "header-start"),
    "header past the end": (assemble("{}", length=3), "header-beyond-file"),
    "header of 100 MB + 1": (assemble("{}", length=100_000_001), "header-too-long"),
    "header length 2^63": (assemble("{}", length=2**63), "header-too-long"),
    "header length overflows with 8": (assemble("{}", length=2**64 - 8), "header-too-long"),
    "header length 2^64 - 1": (assemble("{}", length=2**64 - 1), "header-too-long"),
    "header length 2^32": (assemble("{}", length=2**32), "header-too-long"),
    "header cut short": (assemble('{"a":', bytes(4)), "json-syntax"),
    "leading space": (assemble(' {"a":' + _GOOD + "}", bytes(4)), "header-start"),
    "byte order mark": (assemble(b"\xef\xbb\xbf{}"), "header-start"),
    "array": (assemble("[]"), "header-start"),
    "text after the header": (assemble("{}x"), "json-syntax"),
    "NUL after the header": (assemble("{}\0"), "json-syntax"),
    "trailing comma": (assemble('{"a":' + _GOOD + ",}", bytes(4)), "json-syntax"),
    "no colon": (assemble('{"a"' + _GOOD + "}", bytes(4)), "json-syntax"),
    "key without quotes": (assemble("{a:" + _GOOD + "}", bytes(4)), "json-syntax"),
    "single quotes": (assemble("{'a':" + _GOOD + "}", bytes(4)), "json-syntax"),
    "comment": (assemble('{/**/"a":' + _GOOD + "}", bytes(4)), "json-syntax"),
    "raw control character": (assemble('{"a\n":' + _GOOD + "}", bytes(4)), "json-syntax"),
    "not UTF-8": (assemble(b'{"a\xff":' + _GOOD.encode() + b"}", bytes(4)), "json-utf8"),
    "overlong UTF-8": (assemble(b'{"\xc0\xaf":' + _GOOD.encode() + b"}", bytes(4)), "json-utf8"),
    "UTF-8 surrogate": (assemble(b'{"\xed\xa0\x80":' + _GOOD.encode() + b"}", bytes(4)), "json-utf8"),
    "UTF-8 past U+10FFFF": (assemble(b'{"\xf4\x90\x80\x80":' + _GOOD.encode() + b"}", bytes(4)), "json-utf8"),
    "UTF-8 cut by the end": (assemble(b'{"\xf0\x9f\x98'), "json-utf8"),
    "UTF-8 cut by a quote": (assemble(b'{"\xe2\x82":' + _GOOD.encode() + b"}", bytes(4)), "json-utf8"),
    "unknown escape": (assemble('{"\\x61":' + _GOOD + "}", bytes(4)), "json-escape"),
    "escape at the end": (assemble('{"\\'), "json-escape"),
    "short hex escape": (assemble('{"\\u00g1":' + _GOOD + "}", bytes(4)), "json-syntax"),
    "lone high surrogate": (assemble('{"\\ud800":' + _GOOD + "}", bytes(4)), "json-escape"),
    "lone low surrogate": (assemble('{"\\udc00":' + _GOOD + "}", bytes(4)), "json-escape"),
    "two high surrogates": (assemble('{"\\ud800\\ud800":' + _GOOD + "}", bytes(4)), "json-escape"),
    "NUL in a name": (assemble('{"a\\u0000b":' + _GOOD + "}", bytes(4)), "name-nul"),
    "NUL in metadata": (assemble('{"__metadata__":{"a":"\\u0000"}}'), "name-nul"),
    "deep array as header": (assemble("[" * 100_000), "header-start"),
    "deep array as tensor": (assemble('{"a":' + "[" * 100_000), "json-syntax"),
    "deep object as tensor": (assemble('{"a":' * 100_000), "tensor-form"),
    "deep shape": (assemble('{"a":{"shape":' + "[" * 100_000), "json-syntax"),
    "deep metadata": (assemble('{"__metadata__":' + '{"a":' * 100_000), "metadata-string"),
    "tensor twice": (assemble('{"a":' + _GOOD + ',"a":' + _GOOD + "}", bytes(4)), "duplicate-key"),
    "empty tensor twice": (assemble('{"a":%s,"a":%s}' % ((json.dumps(entry(0, 0)),) * 2)), "duplicate-key"),
    "tensor twice, escaped": (
        assemble('{"a":%s,"\\u0061":%s}' % (json.dumps(entry(0, 4)), json.dumps(entry(4, 8))), bytes(8)),
        "duplicate-key",
    ),
    "dtype twice": (_raw('{"dtype":"U8","dtype":"U8","shape":[4],"data_offsets":[0,4]}'), "duplicate-key"),
    "metadata twice": (assemble('{"__metadata__":{},"__metadata__":{}}'), "duplicate-key"),
    "metadata key twice": (assemble('{"__metadata__":{"a":"1","a":"1"}}'), "duplicate-key"),
    "metadata number": (assemble('{"__metadata__":{"a":1}}'), "metadata-string"),
    "metadata null value": (assemble('{"__metadata__":{"a":null}}'), "metadata-string"),
    "metadata object value": (assemble('{"__metadata__":{"a":{}}}'), "metadata-string"),
    "metadata list": (assemble('{"__metadata__":[]}'), "json-syntax"),
    "metadata null": (assemble('{"__metadata__":null}'), "json-syntax"),
    "tensor is a list": (_raw('["U8",[4],[0,4]]'), "json-syntax"),
    "tensor is null": (_raw("null"), "json-syntax"),
    "no dtype": (_raw('{"shape":[4],"data_offsets":[0,4]}'), "tensor-form"),
    "no shape": (_raw('{"dtype":"U8","data_offsets":[0,4]}'), "tensor-form"),
    "no offsets": (_raw('{"dtype":"U8","shape":[4]}'), "tensor-form"),
    "unknown field": (_raw('{"dtype":"U8","shape":[4],"data_offsets":[0,4],"x":1}'), "tensor-form"),
    "field with a NUL": (_raw('{"dtype\\u0000":"U8","shape":[4],"data_offsets":[0,4]}'), "tensor-form"),
    "unknown dtype": (_raw('{"dtype":"F12","shape":[4],"data_offsets":[0,4]}'), "unknown-dtype"),
    "long dtype": (_raw('{"dtype":"%s","shape":[4],"data_offsets":[0,4]}' % ("U8" * 1000)), "unknown-dtype"),
    "dtype with a NUL": (_raw('{"dtype":"U8\\u0000","shape":[4],"data_offsets":[0,4]}'), "unknown-dtype"),
    "lower-case dtype": (_raw('{"dtype":"u8","shape":[4],"data_offsets":[0,4]}'), "unknown-dtype"),
    "dtype is a number": (_raw('{"dtype":8,"shape":[4],"data_offsets":[0,4]}'), "json-syntax"),
    "rank 9": (assemble({"a": entry(0, 1, shape=[1] * 9)}, b"x"), "rank"),
    "rank 100000": (assemble({"a": entry(0, 1, shape=[1] * 100_000)}, b"x"), "rank"),
    "negative axis": (_raw('{"dtype":"U8","shape":[-4],"data_offsets":[0,4]}'), "json-syntax"),
    "two negative axes": (_raw('{"dtype":"U8","shape":[-2,-2],"data_offsets":[0,4]}'), "json-syntax"),
    "float axis": (_raw('{"dtype":"U8","shape":[4.0],"data_offsets":[0,4]}'), "json-syntax"),
    "exponent axis": (_raw('{"dtype":"U8","shape":[4e0],"data_offsets":[0,4]}'), "json-syntax"),
    "leading zero": (_raw('{"dtype":"U8","shape":[04],"data_offsets":[0,4]}'), "json-syntax"),
    "plus sign": (_raw('{"dtype":"U8","shape":[+4],"data_offsets":[0,4]}'), "json-syntax"),
    "hexadecimal": (_raw('{"dtype":"U8","shape":[0x4],"data_offsets":[0,4]}'), "json-syntax"),
    "string axis": (_raw('{"dtype":"U8","shape":["4"],"data_offsets":[0,4]}'), "json-syntax"),
    "axis 2^63": (_raw('{"dtype":"U8","shape":[%d],"data_offsets":[0,4]}' % 2**63), "integer-range"),
    "axis 2^64 + 4": (_raw('{"dtype":"U8","shape":[%d],"data_offsets":[0,4]}' % (2**64 + 4)), "integer-range"),
    "axis of 10000 digits": (
        _raw('{"dtype":"U8","shape":[%s],"data_offsets":[0,4]}' % ("1" * 10_000)),
        "integer-range",
    ),
    "product wraps to 4": (_raw('{"dtype":"U8","shape":[%d,4],"data_offsets":[0,4]}' % (2**62 + 1)), "shape-overflow"),
    "product overflows": (
        _raw('{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}'),
        "shape-overflow",
    ),
    "size wraps to 0": (_raw('{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}'), "shape-overflow"),
    "product overflows before 0": (
        _raw('{"dtype":"U8","shape":[4611686018427387904,4,0],"data_offsets":[0,0]}', b""),
        "shape-overflow",
    ),
    "32-bit product": (_raw('{"dtype":"F32","shape":[1073741825],"data_offsets":[0,4]}'), "byte-size"),
    "size too small": (_raw('{"dtype":"F32","shape":[4],"data_offsets":[0,4]}'), "byte-size"),
    "size too large": (_raw('{"dtype":"U8","shape":[1],"data_offsets":[0,4]}'), "byte-size"),
    "rank 0 without bytes": (_raw('{"dtype":"U8","shape":[],"data_offsets":[0,0]}', b""), "byte-size"),
    "end before begin": (_raw('{"dtype":"U8","shape":[4],"data_offsets":[4,0]}'), "offset-order"),
    "end wraps": (_raw('{"dtype":"U8","shape":[4],"data_offsets":[%d,3]}' % (2**63 - 1)), "offset-order"),
    "offset -1": (_raw('{"dtype":"U8","shape":[4],"data_offsets":[-1,3]}'), "json-syntax"),
    "offset 2^64 - 1": (_raw('{"dtype":"U8","shape":[4],"data_offsets":[%d,3]}' % (2**64 - 1)), "integer-range"),
    "one offset": (_raw('{"dtype":"U8","shape":[4],"data_offsets":[0]}'), "tensor-form"),
    "three offsets": (_raw('{"dtype":"U8","shape":[4],"data_offsets":[0,4,8]}'), "tensor-form"),
    "no data": (assemble(_TWO), "missing-data"),
    "truncated data": (assemble(_TWO, bytes(7)), "missing-data"),
    "tensor far past the end": (
        assemble({"a": entry(0, 2**62)}, bytes(8)),
        "missing-data",
    ),
    "ends add up past 2^64": (
        assemble({"a": entry(0, 2**63 - 1), "b": entry(2**63 - 1, 2**63 - 1)}, bytes(8)),
        "missing-data",
    ),
    "trailing byte": (assemble(_TWO, bytes(9)), "trailing-bytes"),
    "data without tensors": (assemble("{}", b"x"), "trailing-bytes"),
    "hole at the start": (assemble({"a": entry(1, 4)}, bytes(4)), "hole"),
    "hole between": (assemble({"a": entry(0, 4), "b": entry(5, 8)}, bytes(8)), "hole"),
    "overlap": (assemble({"a": entry(0, 4), "b": entry(3, 8)}, bytes(8)), "overlap"),
    "the same bytes": (assemble({"a": entry(0, 4), "b": entry(0, 4)}, bytes(4)), "overlap"),
    "empty tensor inside another": (assemble({"a": entry(0, 4), "b": entry(2, 2)}, bytes(4)), "overlap"),
    "empty tensor past the end": (assemble({"a": entry(0, 4), "b": entry(9, 9)}, bytes(4)), "hole"),
}

# name -> file: legal, though unusual
GOOD: dict[str, bytes] = {
    "no tensors": assemble("{}"),
    "no tensors, metadata": assemble('{"__metadata__":{}}'),
    "empty name": assemble({"": entry(0, 4)}, bytes(4)),
    "rank 0": assemble({"a": entry(0, 4, "F32", [])}, bytes(4)),
    "rank 8": assemble({"a": entry(0, 1, shape=[1] * 8)}, b"x"),
    "zero size": assemble({"a": entry(0, 0, "F32", [0, 3])}),
    "zero size between": assemble({"a": entry(0, 4), "z": entry(4, 4), "b": entry(4, 8)}, bytes(8)),
    "huge axes of nothing": assemble({"a": entry(0, 0, "U8", [0, 2**31, 2**31])}),
    "out of order in the header": assemble({"b": entry(4, 8), "a": entry(0, 4)}, bytes(8)),
    "padded": assemble('{"a":' + _GOOD + "}  \n\t\r ", bytes(4)),
    "spaces everywhere": assemble(
        ' { "a" : '.lstrip() + _GOOD.replace(",", " ,\n").replace(":", "\t: ") + " } ", bytes(4)
    ),
    "unaligned": assemble({"a": entry(0, 1), "b": entry(1, 5, "F32", [1])}, bytes(5)),
    "escaped": assemble('{"\\"\\\\\\/\\b\\f\\n\\r\\t\\u00e9\\ud83d\\ude00":' + _GOOD + "}", bytes(4)),
    "escaped field": _raw('{"d\\u0074ype":"\\u00558","shape":[4],"data_offsets":[0,4]}'),
    "metadata last": assemble('{"a":' + _GOOD + ',"__metadata__":{"format":"pt"}}', bytes(4)),
    "not ASCII": assemble({"ключ 😀": entry(0, 4)}, bytes(4)),
}
