"""Which files of a folder are read, and that indexes and JSON files cannot lead elsewhere."""

from __future__ import annotations

import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import BertConfig, BertModel

from attacks.index_files import INDEXES, SHARD_NAMES
from blip2c._core import CheckpointError, SafetensorsFile, write_safetensors
from blip2c.checkpoint import MAX_JSON_BYTES, read_config, read_json, resolve_files

INDEX = "model.safetensors.index.json"


def write_shard(path: Path, *names: str) -> None:
    write_safetensors(path, {name: np.ones(2, np.float32) for name in names}, {})


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_one_file(tmp_path: Path) -> None:
    write_shard(tmp_path / "model.safetensors", "a")
    write_index(tmp_path, {"a": "other.safetensors"})  # as upstream, one file goes before an index
    assert resolve_files(tmp_path) == [tmp_path / "model.safetensors"]
    assert resolve_files(str(tmp_path)) == [tmp_path / "model.safetensors"]


def test_shards_that_transformers_wrote(tmp_path: Path) -> None:
    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64))
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    files = resolve_files(tmp_path)
    assert len(files) > 1
    found: dict[str, np.ndarray] = {}
    for path in files:
        file = SafetensorsFile(path)
        found |= {name: file.tensor(name) for name in file.names()}
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.numpy())


def test_shards_may_be_links(tmp_path: Path) -> None:
    """The Hub's cache holds links from a snapshot to blobs elsewhere."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    write_shard(tmp_path / "blobs" / "0123", "a")
    (tmp_path / "snapshot" / "x.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    write_index(tmp_path / "snapshot", {"a": "x.safetensors"})
    assert resolve_files(tmp_path / "snapshot") == [tmp_path / "snapshot" / "x.safetensors"]


@pytest.mark.parametrize("name", SHARD_NAMES, ids=repr)
def test_shard_name_stays_inside(name: object, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "folder").mkdir(parents=True)
    for place in (tmp_path / "outside", folder / "x", folder / "folder" / "x"):
        write_shard(place.with_suffix(".safetensors"), "a")
    write_index(folder, {"a": name})
    with pytest.raises(CheckpointError, match=r"index\.json: shard-name: \"a\": "):
        resolve_files(folder)


@pytest.mark.parametrize("name", INDEXES)
def test_bad_index(name: str, tmp_path: Path) -> None:
    content, rule = INDEXES[name]
    write_shard(tmp_path / "x.safetensors", "a")
    (tmp_path / INDEX).write_bytes(content)
    start = time.perf_counter()
    with pytest.raises(CheckpointError) as caught:
        resolve_files(tmp_path)
    assert time.perf_counter() - start < 0.1
    assert str(caught.value).startswith(f"{tmp_path / INDEX}: {rule}: ")


def test_keys_are_where_the_index_says(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a", "b")
    write_shard(tmp_path / "y.safetensors", "c")
    good = {"a": "x.safetensors", "b": "x.safetensors", "c": "y.safetensors"}
    write_index(tmp_path, good)
    assert resolve_files(tmp_path) == [tmp_path / "x.safetensors", tmp_path / "y.safetensors"]
    write_index(tmp_path, {**good, "d": "y.safetensors"})
    with pytest.raises(CheckpointError, match=r'shard-keys: "d" is in no shard, expected it in y.safetensors'):
        resolve_files(tmp_path)
    write_index(tmp_path, {**good, "b": "y.safetensors"})
    with pytest.raises(
        CheckpointError, match=r'shard-keys: "b": expected it in y.safetensors, found it in x.safetensors'
    ):
        resolve_files(tmp_path)
    write_shard(tmp_path / "y.safetensors", "c", "a")
    write_index(tmp_path, good)
    with pytest.raises(CheckpointError, match=r'shard-keys: "a" is in x.safetensors and in y.safetensors'):
        resolve_files(tmp_path)


def test_unlisted_tensor_is_reported(tmp_path: Path) -> None:
    write_shard(tmp_path / "x.safetensors", "a", "extra")
    write_index(tmp_path, {"a": "x.safetensors"})
    with pytest.warns(UserWarning, match="does not list extra, which the shards hold"):
        assert resolve_files(tmp_path) == [tmp_path / "x.safetensors"]
    write_shard(tmp_path / "x.safetensors", "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_files(tmp_path)


def test_missing_and_bad_shards(tmp_path: Path) -> None:
    write_index(tmp_path, {"a": "x.safetensors", "b": "y.safetensors"})
    write_shard(tmp_path / "x.safetensors", "a")
    with pytest.raises(FileNotFoundError, match=r"y.safetensors of 2 shards"):
        resolve_files(tmp_path)
    (tmp_path / "y.safetensors").write_bytes(b"oh")
    with pytest.raises(CheckpointError, match=r"y.safetensors: file-too-small"):
        resolve_files(tmp_path)
    (tmp_path / "y.safetensors").unlink()
    (tmp_path / "y.safetensors").symlink_to(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"y.safetensors of 2 shards"):
        resolve_files(tmp_path)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        resolve_files(tmp_path)
    assert str(caught.value) == f"{tmp_path}: looked for model.safetensors and {INDEX}, found neither"
    torch.save({"a": torch.ones(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match=r"pytorch_model.bin is there, but unpickled weights are not loaded"):
        resolve_files(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        resolve_files(tmp_path / "no")
    with pytest.raises(NotADirectoryError):
        resolve_files(tmp_path / "pytorch_model.bin")
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert resolve_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_read_config(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}: no config.json in this folder"):
        read_config(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint folder"):
        read_config(tmp_path / "no")
    (tmp_path / "config.json").write_text('{"a": [1, 2.5, true, null, "\\u00e9"]}')
    assert read_config(tmp_path) == {"a": [1, 2.5, True, None, "é"]}
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="json-form: expected an object, found an array"):
        read_config(tmp_path)


def test_read_json_bounds(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[" * 100 + b"]" * 100)
    value = read_json(path)
    for _ in range(99):
        (value,) = value
    assert value == []
    path.write_bytes(b"[" * 101 + b"]" * 101)
    with pytest.raises(CheckpointError, match=r"a.json: json-depth"):
        read_json(path)
    path.write_bytes(b" 1")
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"a.json: json-size"):
        read_json(path)
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(CheckpointError, match=r'a.json: duplicate-key: the key "b" comes twice'):
        read_json(path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "no.json")
    with pytest.raises(IsADirectoryError):
        read_json(tmp_path)
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(CheckpointError, match=r"pipe.json: regular-file"):
        read_json(tmp_path / "pipe.json")
