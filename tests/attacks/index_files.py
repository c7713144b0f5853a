"""Sharded-checkpoint indexes and JSON files that must be refused."""

from __future__ import annotations

import json

# shard names that are no plain file name ending in .safetensors
SHARD_NAMES: list[object] = [
    "../outside.safetensors",
    "../../etc/passwd",
    "/etc/passwd",
    "/tmp/x.safetensors",
    "folder/x.safetensors",
    "folder\\x.safetensors",
    "..\\x.safetensors",
    "C:\\x.safetensors",
    "C:x.safetensors",
    "..",
    ".",
    "",
    ".safetensors",
    "..safetensors",
    "x.safetensors/",
    "x.safetensors\0",
    "x\0.safetensors",
    "x\n.safetensors",
    "x.bin",
    "x.safetensors.bin",
    "pytorch_model.bin",
    "https://example.com/x.safetensors",
    1,
    None,
    ["x.safetensors"],
    {"x": "x.safetensors"},
    True,
]

# name -> (index file, rule)
INDEXES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "json-syntax"),
    "array": (b"[]", "index-form"),
    "no weight_map": (b"{}", "index-form"),
    "weight_map is a list": (b'{"weight_map":[]}', "index-form"),
    "weight_map is empty": (b'{"weight_map":{}}', "index-form"),
    "weight_map twice": (b'{"weight_map":{"a":"x.safetensors"},"weight_map":{}}', "duplicate-key"),
    "key twice": (b'{"weight_map":{"a":"x.safetensors","a":"x.safetensors"}}', "duplicate-key"),
    "key twice, escaped": (b'{"weight_map":{"a":"x.safetensors","\\u0061":"y.safetensors"}}', "duplicate-key"),
    "not JSON": (b"weight_map: a", "json-syntax"),
    "NaN": (b'{"metadata":{"total_size":NaN},"weight_map":{"a":"x.safetensors"}}', "json-syntax"),
    "deep": (b'{"metadata":' + b"[" * 1_000_000, "json-depth"),
    "deep and closed": (b'{"metadata":' + b"[" * 101 + b"]" * 101 + b"}", "json-depth"),
    "not UTF-8": (b'{"weight_map":{"\xff":"x.safetensors"}}', "json-utf8"),
    "UTF-16": (json.dumps({"weight_map": {"a": "x.safetensors"}}).encode("utf-16"), "json-syntax"),
    "byte order mark": (b"\xef\xbb\xbf{}", "json-syntax"),
    "lone surrogate": (b'{"weight_map":{"\\ud800":"x.safetensors"}}', "json-escape"),
    "integer of 10000 digits": (b'{"x":' + b"1" * 10_000 + b"}", "integer-range"),
}
