"""Folders, Hub ids and caches: what is found, what would be fetched, and that offline means no socket."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any, NoReturn

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import errors

import blip2c
from blip2c import hub
from helpers import prompt_ids, random_checkpoint, random_pixels

REPO = "owner/blip2-tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("hub") / "checkpoint", 3, tokenizer=True)


@pytest.fixture
def cache(checkpoint: Path, tmp_path: Path) -> Path:
    """A cache as huggingface_hub lays it out, holding one snapshot of REPO."""
    root = tmp_path / "cache" / f"models--{REPO.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    snapshot = root / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    for number, file in enumerate(sorted(checkpoint.iterdir())):
        shutil.copy(file, root / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    return tmp_path / "cache"


@pytest.fixture
def no_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any socket that is made fails the test."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def same_captions(model: Any, checkpoint: Path) -> None:
    other = blip2c.Blip2ForConditionalGeneration.from_pretrained(checkpoint)
    pixels, ids = random_pixels(other.config, 2), prompt_ids(other.config, 2, 3)
    assert np.array_equal(model.generate(pixels, ids, max_new_tokens=5), other.generate(pixels, ids, max_new_tokens=5))


@pytest.mark.usefixtures("no_sockets")
def test_local_files_only_opens_no_socket(cache: Path, checkpoint: Path) -> None:
    for revision in (None, "main", COMMIT):
        options = {"cache_dir": cache, "local_files_only": True, "revision": revision}
        model = blip2c.Blip2ForConditionalGeneration.from_pretrained(REPO, **options)
        same_captions(model, checkpoint)
        processor = blip2c.AutoProcessor.from_pretrained(REPO, **options)
        assert processor.num_query_tokens == 4
        assert blip2c.Blip2Config.from_pretrained(REPO, **options) == model.config
        assert blip2c.BlipImageProcessor.from_pretrained(REPO, **options).size == {"height": 28, "width": 28}
        assert blip2c.load(REPO, **options).model.config == model.config


@pytest.mark.usefixtures("no_sockets")
def test_offline_by_environment_opens_no_socket(cache: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    same_captions(blip2c.Blip2ForConditionalGeneration.from_pretrained(REPO, cache_dir=cache), checkpoint)
    with pytest.raises(FileNotFoundError, match=r"owner/other .*not in the cache"):
        blip2c.Blip2ForConditionalGeneration.from_pretrained("owner/other", cache_dir=cache)


@pytest.mark.usefixtures("no_sockets")
def test_folders_open_no_socket(checkpoint: Path) -> None:
    assert blip2c.load(checkpoint).processor.num_query_tokens == 4
    assert blip2c.load(str(checkpoint)).processor.num_query_tokens == 4


@pytest.mark.usefixtures("no_sockets")
def test_what_is_not_there_is_named(cache: Path, tmp_path: Path, checkpoint: Path) -> None:
    load = blip2c.Blip2ForConditionalGeneration.from_pretrained
    with pytest.raises(FileNotFoundError, match=r"owner/other \(revision v2\): not in the cache, and only local files"):
        load("owner/other", cache_dir=cache, local_files_only=True, revision="v2")
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        load(REPO, cache_dir=cache, local_files_only=True, revision="no-such-branch")
    for name in ("./nowhere", "/nowhere/at/all", "a/b/c", "", "owner/na..me/x", "~nobody", "sp ace/x"):
        with pytest.raises(FileNotFoundError, match="no such folder"):
            load(name, cache_dir=cache)
    with pytest.raises(NotADirectoryError, match="is a file"):
        load(checkpoint / "config.json")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load(tmp_path)
    shutil.copy(checkpoint / "config.json", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(FileNotFoundError, match="unpickled"):
        load(tmp_path)


def test_only_needed_files_are_asked_for(monkeypatch: pytest.MonkeyPatch, checkpoint: Path) -> None:
    calls: list[dict[str, Any]] = []

    def snapshot(name: str, **options: Any) -> str:
        calls.append({"name": name, **options})
        return str(checkpoint)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    blip2c.load(REPO, revision="v1", token="secret", cache_dir="/c", force_download=True)
    blip2c.Blip2Processor.from_pretrained(REPO)
    first, second = calls
    assert (first["name"], first["revision"], first["token"], first["cache_dir"]) == (REPO, "v1", "secret", "/c")
    assert first["force_download"] is True
    assert "model.safetensors" in first["allow_patterns"]
    assert not any("safetensors" in pattern for pattern in second["allow_patterns"])
    for pattern in first["allow_patterns"]:
        assert not pattern.endswith((".bin", ".pt", ".h5", ".msgpack", ".py", "*"))


@pytest.mark.parametrize(
    ("raised", "error", "message"),
    [
        (errors.GatedRepoError, PermissionError, "gated"),
        (errors.RevisionNotFoundError, FileNotFoundError, "revision"),
        (errors.RepositoryNotFoundError, FileNotFoundError, "no such repository"),
        (errors.HfHubHTTPError, OSError, "can not be fetched"),
        (ConnectionError, OSError, "can not be fetched"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    monkeypatch: pytest.MonkeyPatch, raised: type[Exception], error: type[Exception], message: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> NoReturn:
        exception = raised.__new__(raised)
        Exception.__init__(exception, "as the hub says it")
        raise exception

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(error, match=message):
        hub.resolve(REPO)


def test_options_of_old_scripts(checkpoint: Path) -> None:
    assert hub.pop_hub_options({"use_auth_token": "t", "proxies": None}) == {"token": "t"}
    with pytest.raises(TypeError, match="proxies"):
        hub.pop_hub_options({"proxies": {"http": "x"}})
    assert hub.resolve(checkpoint.parent, subfolder="checkpoint") == checkpoint
