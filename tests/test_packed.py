"""Packed weights: the folder that quantize() writes, the file in it, and the cache; and what happens to bad ones."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import blip2c
from blip2c import _core, cache, cli
from blip2c._core import CheckpointError, SafetensorsFile
from blip2c.checkpoint import PACKED_WEIGHTS
from blip2c.config import Blip2Config, core_config
from blip2c.modeling import Blip2ForConditionalGeneration
from blip2c.packed import describe_packed, quantize
from helpers import edit_config, prompt_ids, random_checkpoint, random_pixels

load = Blip2ForConditionalGeneration.from_pretrained


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.SETTING, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("plain"), 1, dtype="float16", tokenizer=True)


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(plain, tmp_path_factory.mktemp("packed") / "int4", "int4")


def logits(model: Any) -> Any:
    config = Blip2Config.from_dict(model.config.to_dict())
    pixels = random_pixels(config, 2)
    if model._core_config["text"]["model_type"] == "t5":
        return model.get_image_features(pixels).pooler_output
    return model(pixels, prompt_ids(config, 2, 5)).logits


# -- what is packed is what was quantised ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "dtype", "options"),
    [
        ("opt", "int8", {}),
        ("opt", "int4", {"tied": False}),
        ("opt", {"vision": "int4", "language": "bfloat16"}, {"dtype": "float32"}),
        ("llama", "int4", {}),
        ("t5", "int8", {}),
    ],
)
def test_a_packed_folder_is_the_model_it_was_made_from(
    tmp_path: Path, family: str, dtype: Any, options: dict[str, Any]
) -> None:
    folder = random_checkpoint(tmp_path / "plain", 3, family=family, **{"dtype": "float16", **options})
    quantize(folder, tmp_path / "out", dtype)
    made, again = load(folder, dtype=dtype), load(tmp_path / "out")
    np.testing.assert_array_equal(logits(again), logits(made))
    assert again.dtypes == made.dtypes
    assert again._core.policies == made._core.policies
    assert again.num_parameters() == load(folder).num_parameters()
    assert again.get_memory_footprint() == made.get_memory_footprint()
    weights, expected = again._core.weights(), made._core.weights()
    assert weights.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(weights[name], array)


def test_every_block_is_aligned_and_described(packed: Path) -> None:
    path = packed / PACKED_WEIGHTS
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert (8 + size) % 64 == 0
    for name, tensor in header.items():
        assert tensor["dtype"] == "U8"
        assert all(offset % 64 == 0 for offset in tensor["data_offsets"])
        assert name in metadata
    assert metadata["blip2c.dtypes"] == "vision=int8,qformer=half,language=int4"
    head = metadata["language_model.model.decoder.embed_tokens.weight"]
    assert head == "I8 quads n=320 k=20 group=32 columns=1"  # rows of words stay int8
    described = describe_packed(SafetensorsFile(path))
    assert described == {"dtypes": metadata["blip2c.dtypes"], "parameters": load(packed).num_parameters()}


def test_the_folder_holds_what_the_checkpoint_has_beside_its_weights(plain: Path, packed: Path) -> None:
    names = {path.name for path in plain.iterdir()} - {"model.safetensors"}
    assert {path.name for path in packed.iterdir()} == names | {PACKED_WEIGHTS}
    captioner, reference = blip2c.load(packed), blip2c.load(plain, dtype="int4")
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    assert captioner.caption(picture) == reference.caption(picture)


def test_saving_a_quantised_model_packs_it(plain: Path, packed: Path, tmp_path: Path) -> None:
    model = load(plain, dtype="int4")
    model.save_pretrained(tmp_path / "a")
    load(packed).save_pretrained(tmp_path / "b")  # from mapped weights
    assert (tmp_path / "a" / PACKED_WEIGHTS).read_bytes() == (packed / PACKED_WEIGHTS).read_bytes()
    assert (tmp_path / "b" / PACKED_WEIGHTS).read_bytes() == (packed / PACKED_WEIGHTS).read_bytes()
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "blip2c"
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "a")


def test_what_quantize_refuses(plain: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="nothing to quantise"):
        quantize(plain, tmp_path / "x", "float16")
    with pytest.raises(ValueError, match="is packed already"):
        quantize(packed, tmp_path / "x")
    with pytest.raises(FileExistsError, match=r"holds model.safetensors; packed weights need a folder of their own"):
        quantize(plain, plain)
    with pytest.raises(ValueError, match="can be had from the plain checkpoint only"):
        load(packed, dtype="float16")
    assert load(packed, dtype="int4").is_quantized
    before = (packed / PACKED_WEIGHTS).read_bytes()
    with pytest.raises(FileExistsError, match=r"int4: holds model\.blip2c\.safetensors already"):
        quantize(plain, packed, "int8")
    assert (packed / PACKED_WEIGHTS).read_bytes() == before
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="out: expected a folder, found an empty name"):
        quantize(plain, "")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        quantize(plain, tmp_path / "file" / "x")
    assert not (tmp_path / "x").exists()


def test_packed_and_plain_weights_in_one_folder(plain: Path, packed: Path, tmp_path: Path) -> None:
    for source in (plain / "config.json", plain / "model.safetensors", packed / PACKED_WEIGHTS):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    with pytest.raises(CheckpointError, match="one folder, one model"):
        load(tmp_path)


def test_command_line(plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["quantize", str(plain), str(out), "--dtype", "vision=int8,language=int4"]) == 0
    assert load(out).dtypes == {"vision": "int8", "qformer": "float16", "language": "int4"}
    assert cli.main(["info", str(out), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert shown["model"]["stored_as"] == ["language=int4", "qformer=auto", "vision=int8"]
    assert shown["model"]["parameters"] == load(plain).num_parameters()
    assert shown["cache"] == {"folder": str(tmp_path / "cache"), "bytes": 0}
    assert cli.main(["quantize", str(plain), str(out), "--dtype", "float32"]) == 2
    assert "nothing to quantise" in capsys.readouterr().err
    for wrong in ("int3", "vision=int8,ears=int8", "vision=int8,vision=int4"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["quantize", str(plain), str(out), "--dtype", wrong])


# -- bad packed files --------------------------------------------------------------------------------------------------


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The file with another header over the same data (as long as before: `change` may not make it longer)."""
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    assert len(text) <= size + 64
    padded = text.ljust(max(size, (len(text) + 8 + 63) // 64 * 64 - 8))
    path.write_bytes(struct.pack("<Q", len(padded)) + padded + data[8 + size :])


LAYER = "language_model.model.decoder.layers.0.fc1.weight"
NORM = "vision_model.post_layernorm.weight"


def set_metadata(key: str, value: str | None) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header["__metadata__"].pop(key)
        if value is not None:
            header["__metadata__"][key] = value

    return change


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        header[new] = header.pop(old)
        header["__metadata__"][new] = header["__metadata__"].pop(old)

    return change


def set_dtype(header: dict[str, Any]) -> None:
    tensor = header[LAYER]
    tensor["dtype"], tensor["shape"] = "I8", tensor["shape"]


BAD: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another version": (set_metadata("blip2c.packed", "2"), "packed-version.*expected version 1, found 2"),
    "no dtypes": (set_metadata("blip2c.dtypes", None), "blip2c.dtypes"),
    "no config": (set_metadata("blip2c.config", None), "blip2c.config"),
    "a config that is no JSON": (set_metadata("blip2c.config", "{"), "blip2c.config"),
    "not described": (set_metadata(LAYER, None), f'packed-form: "{LAYER}"'),
    "described as nothing": (set_metadata(LAYER, ""), f'packed-form: "{LAYER}"'),
    "an unknown layout": (set_metadata(LAYER, "I4 heaps n=36 k=20 group=32 columns=1"), 'found "I4 heaps'),
    "an unknown dtype": (set_metadata(LAYER, "I2 quads n=36 k=20 group=32 columns=1"), 'found "I2'),
    "more behind it": (set_metadata(LAYER, "I4 quads n=36 k=20 group=32 columns=1 "), "packed-form"),
    "int4 as panels": (set_metadata(LAYER, "I4 panels n=36 k=20 group=0 columns=0"), "packed-form"),
    "int4 by 64": (set_metadata(LAYER, "I4 quads n=36 k=20 group=64 columns=1"), "packed-form"),
    "int8 by 0": (set_metadata(LAYER, "I8 quads n=36 k=20 group=0 columns=1"), "packed-form"),
    "an absurd size": (set_metadata(LAYER, "I4 quads n=99999999999999 k=20 group=32 columns=1"), "packed-form"),
    "no size": (set_metadata(LAYER, "I4 quads n=0 k=20 group=32 columns=1"), "packed-form"),
    "another shape": (
        set_metadata(LAYER, "I4 quads n=20 k=36 group=32 columns=1"),
        r"expected \[36, 20\] from the config",
    ),
    "sizes of another dtype": (set_metadata(LAYER, "I8 quads n=36 k=20 group=32 columns=1"), "expected 1856 bytes"),
    "a matrix for a norm": (set_metadata(NORM, "F32 panels n=24 k=1 group=0 columns=0"), "another layout"),
    "a norm for a matrix": (set_metadata(LAYER, "F32 rows n=36 k=20 group=0 columns=0"), "plain rows"),
    "no bytes": (set_dtype, f'packed-form: "{LAYER}": expected U8'),
    "a weight too few": (rename(LAYER, LAYER.replace("0", "7")), f"{LAYER}: missing"),
    "a weight of another name": (rename(NORM, "x"), f"{NORM}: missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_packed_file_is_refused_by_name(name: str, packed: Path, tmp_path: Path) -> None:
    change, message = BAD[name]
    for path in packed.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    rewritten(tmp_path / PACKED_WEIGHTS, change)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_packed_for_another_model(packed: Path, tmp_path: Path) -> None:
    def copy() -> None:
        for path in packed.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())

    copy()
    edit_config(tmp_path, vision_config__layer_norm_eps=0.5, qformer_config__num_hidden_layers=2)
    with pytest.raises(
        CheckpointError, match=r"packed for another config: qformer.num_hidden_layers 4 \(config.json: 2"
    ):
        load(tmp_path)
    edit_config(tmp_path, vision_config__layer_norm_eps=1e-6, qformer_config__num_hidden_layers=4, image_token_index=7)
    assert load(tmp_path).config.image_token_index == 7  # says nothing of the weights
    core = core_config(Blip2Config.from_pretrained(packed))
    core["qformer"]["num_hidden_layers"] = 2  # also where nobody compares configurations
    with pytest.raises(CheckpointError, match=r"packed from another model: the config has no qformer.encoder.layer.2"):
        _core.Model([str(packed / PACKED_WEIGHTS)], core)
    with pytest.raises(CheckpointError, match="beside other files"):
        _core.Model([str(packed / PACKED_WEIGHTS)] * 2, core)


def test_torn_and_mutated_files(packed: Path, tmp_path: Path) -> None:
    """Cut anywhere, or any bit of the header turned: refused, or the same model."""
    data = (packed / PACKED_WEIGHTS).read_bytes()
    core = core_config(Blip2Config.from_pretrained(packed))
    path, rng = tmp_path / "x.safetensors", random.Random(5)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    expected = load(packed)._core.weights()
    taken = 0
    for trial in range(400):
        if trial % 4 == 0:
            bad = data[: rng.randrange(len(data))]
        else:
            at = rng.randrange(header)
            bad = data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
        path.write_bytes(bad)
        try:
            found = _core.Model([str(path)], core).weights()
        except (ValueError, NotImplementedError):
            continue
        taken += 1
        for name, array in found.items():
            # A flip inside a description that still fits (columns=0) changes values, but reads nothing outside.
            assert array.shape == expected[name].shape
    assert taken < 100


def test_a_block_that_is_not_aligned_is_refused(packed: Path, tmp_path: Path) -> None:
    data = (packed / PACKED_WEIGHTS).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", size + 4) + data[8 : 8 + size] + b"    " + data[8 + size :])
    with pytest.raises(CheckpointError, match="not aligned"):
        _core.Model([str(path)], core_config(Blip2Config.from_pretrained(packed)))


# -- the cache ---------------------------------------------------------------------------------------------------------


def cached(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def test_the_second_load_uses_what_the_first_left(plain: Path, own_cache: Path) -> None:
    first = load(plain, dtype="int8", cache=True)
    (entry,) = cached(own_cache)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "write_packed", lambda *_, **__: pytest.fail("packed again"))
        second = load(plain, dtype="int8", cache=True)
    np.testing.assert_array_equal(logits(second), logits(first))
    assert cached(own_cache) == [entry]
    # It is really the entry that is read: turn a bit in it.
    data = bytearray(entry.read_bytes())
    size = struct.unpack("<Q", data[:8])[0]
    data[8 + size + json.loads(data[8 : 8 + size])[LAYER]["data_offsets"][0]] ^= 0x40
    entry.write_bytes(data)
    changed = load(plain, dtype="int8", cache=True)._core.weights()
    assert any(not np.array_equal(changed[name], array) for name, array in first._core.weights().items())


def test_an_entry_is_for_its_files_dtype_and_config(tmp_path: Path, own_cache: Path) -> None:
    folder = random_checkpoint(tmp_path / "plain", 1)
    load(folder, dtype="int8", cache=True)
    load(folder, dtype={"vision": "int8"}, cache=True)
    assert len(cached(own_cache)) == 2
    before = logits(load(folder, dtype="int8", cache=True))
    random_checkpoint(folder, 2)  # other weights of the same size under the same name
    after = logits(load(folder, dtype="int8", cache=True))
    assert np.abs(after - before).max() > 0.1
    assert len(cached(own_cache)) == 2  # that of the old weights has gone
    np.testing.assert_array_equal(after, logits(load(folder, dtype="int8", cache=False)))


def test_when_it_is_kept_without_being_asked(
    plain: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(plain, dtype="int8")
    assert cached(own_cache) == []  # small models are not worth it
    monkeypatch.setattr(cache, "WORTH_KEEPING", 0)
    load(plain)
    load(plain, dtype="float32")
    load(plain, dtype="int8", cache=False)
    assert cached(own_cache) == []
    load(plain, dtype={"language": "int4"})
    assert len(cached(own_cache)) == 1
    load(plain, dtype="int8", cache=tmp_path / "elsewhere")
    assert len(cached(tmp_path / "elsewhere")) == 1
    monkeypatch.setenv(cache.SETTING, "off")
    load(plain, dtype="int8")
    assert len(cached(own_cache)) == 1
    for wrong in (3, 1, 0):  # 1 and 0 equal True and False
        with pytest.raises(TypeError, match="cache must be"):
            load(plain, dtype="int8", cache=wrong)
    monkeypatch.delenv(cache.SETTING)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "blip2c"


@pytest.mark.parametrize("damage", ["torn", "empty", "another source"])
def test_a_bad_entry_is_made_anew_and_said_so(damage: str, plain: Path, own_cache: Path) -> None:
    expected = logits(load(plain, dtype="int8", cache=True))
    (entry,) = cached(own_cache)
    whole = entry.read_bytes()
    if damage == "another source":
        rewritten(entry, set_metadata("blip2c.source", "{}"))
    else:
        entry.write_bytes(whole[: len(whole) // 2] if damage == "torn" else b"")
    with pytest.warns(UserWarning, match=f"{entry.name}: this cache entry is not used, but made anew"):
        model = load(plain, dtype="int8", cache=True)
    np.testing.assert_array_equal(logits(model), expected)
    assert entry.read_bytes() == whole
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(plain, dtype="int8", cache=True)


def test_no_room_and_no_folder_are_said_once_and_do_no_harm(
    plain: Path, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"not kept for the next load.*BLIP2C_CACHE names another folder") as said:
        load(plain, dtype="int8", cache=tmp_path / "file" / "cache")
    assert len(said) == 1
    usage = type("Usage", (), {"total": 100 << 30, "free": 3 << 30})
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: usage)
    with pytest.warns(UserWarning, match="MiB are needed, and 5120 MiB are left free; there are 3072 MiB") as said:
        assert load(plain, dtype="int8", cache=True).is_quantized
    assert len(said) == 1
    assert cached(own_cache) == []


def test_a_full_disk_leaves_nothing(plain: Path, own_cache: Path) -> None:
    program = (
        "import resource, signal, sys, warnings; from blip2c import Blip2ForConditionalGeneration as Model\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        f"model = Model.from_pretrained({str(plain)!r}, dtype='int8', cache=True); print(model.is_quantized)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=Path(blip2c.__file__).parents[1]
    )
    assert done.stdout == "True\n", done.stderr
    assert "not kept for the next load" in done.stderr
    assert cached(own_cache) == []


def test_two_processes_at_once(plain: Path, own_cache: Path) -> None:
    program = (
        "from blip2c import Blip2ForConditionalGeneration as Model\n"
        f"for i in range(5): print(Model.from_pretrained({str(plain)!r}, dtype='int4', cache=True).is_quantized)"
    )
    here = Path(blip2c.__file__).parents[1]
    both = [subprocess.Popen([sys.executable, "-W", "error", "-c", program], cwd=here) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert len(cached(own_cache)) == 1


def test_listing_and_clearing(plain: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(plain, dtype="int8", cache=True)
    (entry,) = cache.entries()
    assert entry.sources == [str(plain / "model.safetensors")]
    assert entry.dtypes == "vision=int8,qformer=half,language=int8"
    (own_cache / "somebody-elses").write_text("")
    (own_cache / "packed-0.safetensors").write_text("junk")
    assert cli.main(["cache"]) == 0
    shown = capsys.readouterr().out
    assert str(plain / "model.safetensors") in shown
    assert str(own_cache) in shown
    assert cli.main(["cache", "--clear"]) == 0
    assert [path.name for path in cached(own_cache)] == ["somebody-elses"]
    assert cache.entries() == []


@pytest.mark.parametrize("source", ["3", '{"files": 3}', '{"files": [[]]}', '{"files": [{}]}', "[" * 100_000])
def test_a_source_that_says_nothing_is_listed_and_replaced(plain: Path, own_cache: Path, source: str) -> None:
    kept = own_cache / "packed-0.safetensors"
    own_cache.mkdir()
    _core.write_safetensors(kept, {"x": np.zeros(3, np.float32)}, {}, {cache.SOURCE_KEY: source})
    assert [(entry.path, entry.sources) for entry in cache.entries()] == [(kept, [])]
    assert load(plain, dtype="int8", cache=True).is_quantized
    assert len(cached(own_cache)) == 2


def test_files_that_others_take_away_meanwhile(plain: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporary file that another process renames between the listing and the look at it changes nothing."""
    gone = [own_cache / "packed-gone.tmp", own_cache / "packed-gone.safetensors"]
    listed = cache._files_of
    monkeypatch.setattr(cache, "_files_of", lambda folder: [*gone, *listed(folder)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(plain, dtype="int8", cache=True)
    (entry,) = cached(own_cache)
    assert cache.clear() > 0
    assert not entry.exists()
