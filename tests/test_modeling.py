"""The transformers spelling: what comes out of it, in what type, and how inputs that do not fit are refused."""

from __future__ import annotations

import copy
import pickle
import shutil
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import blip2c
from blip2c import Blip2ForConditionalGeneration, NumericError, UnsupportedError
from blip2c.config import core_config
from helpers import edit_config, prompt_ids, random_checkpoint, random_pixels, reference_model
from running import run_python

TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("modeling"), 1, tokenizer=True)


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    return reference_model(folder)


@pytest.fixture(scope="module")
def model(folder: Path) -> Blip2ForConditionalGeneration:
    return Blip2ForConditionalGeneration.from_pretrained(folder)


@pytest.fixture
def inputs(model: Any) -> tuple[np.ndarray, np.ndarray]:
    return random_pixels(model.config, 3), prompt_ids(model.config, 3, 5)


# -- results -------------------------------------------------------------------------------------------------------


def test_generate_returns_what_transformers_returns(model: Any, reference: Any, inputs: Any) -> None:
    pixels, ids = inputs
    for options in (
        {"max_new_tokens": 7},
        {"max_new_tokens": 6, "num_beams": 3, "num_return_sequences": 2},
        {"max_length": 14},
    ):
        want = reference.generate(torch.from_numpy(pixels), torch.from_numpy(ids), **options)
        found = model.generate(pixels, ids, **options)
        assert found.dtype == np.int64
        assert np.array_equal(found, want.numpy())
    want = reference.generate(torch.from_numpy(pixels), max_new_tokens=5)
    assert np.array_equal(model.generate(pixels, max_new_tokens=5), want.numpy())
    assert np.array_equal(model.generate(pixel_values=pixels, max_new_tokens=5), want.numpy())


def test_pictures_change_the_tokens(model: Any, inputs: Any) -> None:
    pixels, ids = inputs
    same_prompt = np.repeat(ids[:1], 3, axis=0)
    found = model.generate(pixels, same_prompt, max_new_tokens=8)
    assert len({tuple(row) for row in found.tolist()}) == 3


PADS = {"behind the image": slice(4, 6), "inside": slice(6, 8), "at the end": slice(-3, None), "everywhere": [4, 6, -1]}


@pytest.mark.parametrize("place", PADS)
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}, {"max_length": 14}],
    ids=str,
)
def test_a_padded_batch_as_there(model: Any, reference: Any, inputs: Any, place: str, options: dict[str, Any]) -> None:
    pixels, ids = inputs
    mask = np.ones_like(ids)
    ids[0, PADS[place]], mask[0, PADS[place]] = 1, 0
    options = options if "max_length" in options else {"max_new_tokens": 6, **options}
    want = reference.generate(torch.from_numpy(pixels), torch.from_numpy(ids), torch.from_numpy(mask), **options)
    for form in (mask, mask.astype(bool), mask.astype(np.float32), torch.from_numpy(mask), mask.tolist()):
        assert np.array_equal(model.generate(pixels, ids, form, **options), want.numpy())
    unmasked = model.generate(pixels, ids, **options)
    assert not np.array_equal(unmasked[0], want.numpy()[0])
    with torch.no_grad():
        logits = reference(torch.from_numpy(pixels), torch.from_numpy(ids), torch.from_numpy(mask)).logits
    assert np.allclose(model(pixels, ids, mask).logits, logits.numpy(), rtol=1e-4, atol=1e-4)


def test_forward_has_every_output_of_transformers(model: Any, reference: Any, inputs: Any) -> None:
    pixels, ids = (torch.from_numpy(x) for x in inputs)
    with torch.no_grad():
        want = reference(pixels, ids)
        features = reference.get_image_features(pixels)
    found = model(pixels, ids)
    assert list(found.keys()) == list(want.keys())
    assert torch.equal(found[0], found.logits)
    assert torch.equal(found["logits"], found.logits)
    assert found.loss is None
    for a, b in (
        (found.logits, want.logits),
        (found.vision_outputs.last_hidden_state, want.vision_outputs.last_hidden_state),
        (found.vision_outputs.pooler_output, want.vision_outputs.pooler_output),
        (found.vision_outputs[0], want.vision_outputs[0]),
        (found.qformer_outputs.last_hidden_state, want.qformer_outputs.last_hidden_state),
        (found.qformer_outputs.pooler_output, want.qformer_outputs.pooler_output),
        (found.language_model_outputs.logits, want.language_model_outputs.logits),
    ):
        assert a.shape == b.shape
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4)
    as_tuple = model(pixels, ids, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert torch.equal(as_tuple[0], found.logits)
    assert isinstance(as_tuple[1], tuple)
    mine = model.get_image_features(pixels)
    assert list(mine.keys()) == list(features.keys())
    assert torch.allclose(mine.pooler_output, features.pooler_output, rtol=1e-4, atol=1e-4)
    assert torch.allclose(mine[0], features[0], rtol=1e-4, atol=1e-4)
    with pytest.raises(AttributeError, match="no_such"):
        _ = mine.no_such


def test_arrays_give_arrays_and_tensors_tensors(model: Any, inputs: Any) -> None:
    pixels, ids = inputs
    plain = model(pixels, ids)
    assert isinstance(plain.logits, np.ndarray)
    assert plain.logits.dtype == np.float32
    tensor = model(torch.from_numpy(pixels), torch.from_numpy(ids))
    assert isinstance(tensor.logits, torch.Tensor)
    assert np.array_equal(tensor.logits.numpy(), plain.logits)
    sequences = model.generate(torch.from_numpy(pixels), torch.from_numpy(ids), max_new_tokens=4)
    assert sequences.dtype == torch.int64
    assert np.array_equal(sequences.numpy(), model.generate(pixels, ids, max_new_tokens=4))
    half = torch.from_numpy(pixels).to(torch.bfloat16)
    rounded = model.generate(half.float().numpy(), ids, max_new_tokens=4)
    assert np.array_equal(model.generate(half, torch.from_numpy(ids), max_new_tokens=4).numpy(), rounded)
    for form in (pixels.astype(np.float64), np.asfortranarray(pixels), pixels[::-1][::-1]):
        assert np.array_equal(model.generate(form, ids.astype(np.int32), max_new_tokens=4), sequences.numpy())
    frozen = pixels.copy()
    frozen.setflags(write=False)
    assert np.array_equal(model.generate(frozen, ids.tolist(), max_new_tokens=4), sequences.numpy())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_results_have_the_model_s_dtype(folder: Path, inputs: Any, dtype: str) -> None:
    pixels, ids = (torch.from_numpy(x) for x in inputs)
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype)
    assert model.dtype == TORCH_DTYPES[dtype]
    out = model(pixels.to(TORCH_DTYPES[dtype]), ids)
    assert out.logits.dtype == TORCH_DTYPES[dtype]
    assert out.vision_outputs.last_hidden_state.dtype == TORCH_DTYPES[dtype]
    theirs = transformers.Blip2ForConditionalGeneration.from_pretrained(folder, dtype=TORCH_DTYPES[dtype]).eval()
    with torch.no_grad():
        want = theirs(pixels.to(TORCH_DTYPES[dtype]), ids)
    assert out.qformer_outputs.last_hidden_state.dtype == want.qformer_outputs.last_hidden_state.dtype


# -- loading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
def test_dtype_is_as_stored_unless_asked_for(tmp_path: Path, stored: str) -> None:
    random_checkpoint(tmp_path, 2, dtype=stored)
    load = Blip2ForConditionalGeneration.from_pretrained
    for auto in ({}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": None}):
        assert load(tmp_path, **auto).dtype == TORCH_DTYPES[stored]
    for asked in ("float16", torch.float16, np.float16, np.dtype("float16"), "torch.float16", "fp16"):
        assert load(tmp_path, dtype=asked).dtype == torch.float16
        assert load(tmp_path, torch_dtype=asked).dtype == torch.float16
    for wrong in ("int7", torch.float64, np.int32, "single-ish"):
        with pytest.raises(ValueError, match="dtype: expected auto"):
            load(tmp_path, dtype=wrong)


def test_narrowing_rounds_for_good_as_in_torch(folder: Path, tmp_path: Path, inputs: Any) -> None:
    load = Blip2ForConditionalGeneration.from_pretrained
    pixels, ids = inputs
    exact = load(folder)(pixels, ids).logits
    there_and_back = load(folder).half().float()
    assert there_and_back.dtype == torch.float32
    found = there_and_back(pixels, ids).logits
    assert not np.array_equal(found, exact)
    there_and_back.save_pretrained(tmp_path)
    assert {t.dtype for t in load_file(tmp_path / "model.safetensors").values()} == {torch.float32}
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        if tensor.dim() > 1 and name.startswith("language_model.") and "embed_positions" not in name:
            assert torch.equal(tensor, tensor.half().float()), name
    load(folder).half().bfloat16().save_pretrained(tmp_path)
    stored, twice = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    name = "language_model.model.decoder.layers.0.fc1.weight"
    assert torch.equal(twice[name], stored[name].half().bfloat16())
    assert not torch.equal(twice[name], stored[name].bfloat16())
    assert np.array_equal(
        load(folder).half().half()(pixels, ids).logits, load(folder, dtype="float16")(pixels, ids).logits
    )
    assert np.array_equal(
        load(folder).to(torch.bfloat16)(pixels, ids).logits, load(folder).bfloat16()(pixels, ids).logits
    )
    assert np.array_equal(load(folder).to("cpu", torch.float32).float()(pixels, ids).logits, exact)


def test_what_scripts_call_on_a_model(model: Any, reference: Any) -> None:
    assert model.eval() is model
    assert model.train(False) is model
    assert model.to("cpu") is model
    assert model.to(torch.device("cpu")) is model
    assert model.cpu() is model
    assert model.requires_grad_(False) is model
    assert model.device == torch.device("cpu")
    assert model.training is False
    assert model.num_parameters() == sum(p.numel() for p in reference.parameters())
    assert model.get_memory_footprint() > 0
    assert model.generation_config.eos_token_id == model.language_model.generation_config.eos_token_id == 2
    assert "Blip2ForConditionalGeneration" in repr(model)
    for refused in (model.train, lambda: model.to("mps"), lambda: model.to("xpu:0")):
        with pytest.raises(UnsupportedError):
            refused()


@pytest.mark.parametrize(
    "options",
    [{"low_cpu_mem_usage": True}, {"use_safetensors": True}, {"device_map": "auto"}, {"device_map": {"": "cpu"}},
     {"attn_implementation": "sdpa"}, {"load_in_8bit": False}, {"device": "cpu"}, {"trust_remote_code": True}],
    ids=str,
)  # fmt: skip
def test_loading_options_that_change_nothing(folder: Path, options: dict[str, Any]) -> None:
    assert Blip2ForConditionalGeneration.from_pretrained(folder, **options).dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [{"load_in_8bit": True}, {"load_in_4bit": True}, {"quantization_config": object()}, {"use_safetensors": False},
     {"device_map": "mps"}, {"device_map": {"a": 0, "b": 1}}, {"device": "xpu:1"}, {"variant": "fp16"},
     {"attn_implementation": "flash_attention_2"}, {"max_memory": {0: "1GB"}}],
    ids=str,
)  # fmt: skip
def test_loading_options_that_are_refused_by_name(folder: Path, options: dict[str, Any]) -> None:
    name = next(iter(options)).removesuffix("_map")
    with pytest.raises(UnsupportedError, match=name):
        Blip2ForConditionalGeneration.from_pretrained(folder, **options)


def test_another_config_may_be_given(folder: Path, model: Any) -> None:
    theirs = transformers.Blip2Config.from_pretrained(folder)
    loaded = Blip2ForConditionalGeneration.from_pretrained(folder, config=theirs)
    assert core_config(loaded.config) == core_config(model.config)
    mine = blip2c.Blip2Config.from_pretrained(folder)
    mine.text_config.ffn_dim = 40
    with pytest.raises(blip2c.CheckpointError, match="fc1"):
        Blip2ForConditionalGeneration.from_pretrained(folder, config=mine)


def test_copies_share_weights_and_nothing_else(folder: Path, reference: Any, inputs: Any) -> None:
    model = Blip2ForConditionalGeneration.from_pretrained(folder)
    theirs = copy.deepcopy(reference)
    pixels, ids = inputs
    twin = copy.deepcopy(model)
    assert isinstance(twin, Blip2ForConditionalGeneration)
    for one in (twin, theirs):
        one.language_model.generation_config.max_new_tokens = 3
    want = theirs.generate(torch.from_numpy(pixels), torch.from_numpy(ids)).numpy()
    assert np.array_equal(twin.generate(pixels, ids), want)
    assert model.language_model.generation_config.max_new_tokens is None
    assert copy.copy(model).half().dtype == torch.float16
    assert model.dtype == torch.float32
    whole = reference.generate(torch.from_numpy(pixels), torch.from_numpy(ids)).numpy()
    assert np.array_equal(model.generate(pixels, ids), whole)
    with pytest.raises(TypeError, match=r"can not be pickled.*from_pretrained"):
        pickle.dumps(model)


def test_resizing_the_vocabulary_is_refused_by_name(model: Any) -> None:
    for options in ({}, {"new_num_tokens": 320}, {"new_num_tokens": 300, "pad_to_multiple_of": 64}):
        model.resize_token_embeddings(**options)
    with pytest.raises(UnsupportedError, match=r"resize_token_embeddings: 384 tokens.* has 320"):
        model.resize_token_embeddings(321, pad_to_multiple_of=64)


def test_a_config_that_is_none_is_named(folder: Path) -> None:
    with pytest.raises(TypeError, match="config must be a Blip2Config, found dict"):
        Blip2ForConditionalGeneration.from_pretrained(folder, config={})


def test_loading_options_that_do_not_exist(folder: Path) -> None:
    with pytest.raises(TypeError, match="no option dtpye"):
        Blip2ForConditionalGeneration.from_pretrained(folder, dtpye="float16")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_files_are_loaded_by_transformers(tmp_path: Path, inputs: Any, dtype: str) -> None:
    random_checkpoint(tmp_path / "one", 4, dtype=dtype)
    model = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("one", "two"))
    assert set(after) >= set(before)
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor), name
    pixels, ids = inputs
    want = reference_model(tmp_path / "two").generate(torch.from_numpy(pixels), torch.from_numpy(ids), max_new_tokens=6)
    again = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "two")
    found = model.generate(pixels, ids, max_new_tokens=6)
    assert np.array_equal(again.generate(pixels, ids, max_new_tokens=6), found)
    if dtype == "float32":
        assert np.array_equal(found, want.numpy())


def test_unexpected_weights_are_listed_in_a_warning(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "itm_head.weight": torch.zeros(2, 16)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"itm_head\.weight"):
        Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Blip2ForConditionalGeneration.from_pretrained(folder)


def test_missing_and_misshapen_weights_raise(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in tensors.items() if k != "query_tokens"}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(blip2c.CheckpointError, match="query_tokens"):
        Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    edit_config(tmp_path, text_config__ffn_dim=40)
    with pytest.raises(blip2c.CheckpointError, match="fc1"):
        Blip2ForConditionalGeneration.from_pretrained(tmp_path)


# -- checkpoints of before image tokens ----------------------------------------------------------------------------


def test_without_an_image_token_the_queries_go_in_front(
    tmp_path: Path, folder: Path, reference: Any, inputs: Any
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edit_config(tmp_path, image_token_index=None)
    old = Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    pixels, ids = inputs
    text = ids[:, 4:]
    with torch.no_grad():
        logits = reference(torch.from_numpy(pixels), torch.from_numpy(ids)).logits.numpy()
    assert np.allclose(old(pixels, text).logits, logits, rtol=1e-4, atol=1e-4)
    for options in ({"max_new_tokens": 6}, {"max_length": 15}, {"max_new_tokens": 6, "num_beams": 3}):
        want = reference.generate(torch.from_numpy(pixels), torch.from_numpy(ids), **options).numpy()
        assert np.array_equal(old.generate(pixels, text, **options), want[:, 4:])
    want = reference.generate(torch.from_numpy(pixels), max_new_tokens=5).numpy()
    assert np.array_equal(old.generate(pixels, max_new_tokens=5), want[:, 4:])
    mask = np.ones_like(text)
    text[0, :2], mask[0, :2] = 1, 0
    full = np.concatenate([ids[:, :4], text], axis=1)
    full_mask = np.concatenate([np.ones_like(ids[:, :4]), mask], axis=1)
    want = reference.generate(*(torch.from_numpy(x) for x in (pixels, full, full_mask)), max_new_tokens=5).numpy()
    assert np.array_equal(old.generate(pixels, text, mask, max_new_tokens=5), want[:, 4:])


def test_the_image_token_may_be_set_after_loading(tmp_path: Path, folder: Path, reference: Any, inputs: Any) -> None:
    """As transformers' hint for old checkpoints has it: config.image_token_index = ..."""
    shutil.copytree(folder, tmp_path / "old")
    edit_config(tmp_path / "old", image_token_index=None)
    old = Blip2ForConditionalGeneration.from_pretrained(tmp_path / "old")
    pixels, ids = (torch.from_numpy(array) for array in inputs)
    old.config.image_token_index = reference.config.image_token_index
    for options in ({"max_new_tokens": 6}, {"max_new_tokens": 6, "num_beams": 3}):
        assert torch.equal(old.generate(pixels, ids, **options), reference.generate(pixels, ids, **options))
        assert torch.equal(old.generate(pixels, **options), reference.generate(pixels, **options))
    old.config.image_token_index = 7
    with pytest.raises(ValueError, match=r"image placeholders \(token 7\)"):
        old.generate(pixels, ids)
    for wrong_token in (-1, 320, "319", True):
        old.config.image_token_index = wrong_token
        with pytest.raises(ValueError, match="image_token_index must be"):
            old.generate(pixels, ids)


# -- inputs that do not fit ----------------------------------------------------------------------------------------


def wrong(kind: str, pixels: np.ndarray, ids: np.ndarray) -> tuple[dict[str, Any], type[Exception], str]:
    """Arguments of generate() with one thing wrong, and what is to be said about it."""
    full = {"pixel_values": pixels, "input_ids": ids}
    changed = ids.copy()
    cases: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
        "no placeholders": ({**full, "input_ids": np.full_like(ids, 7)}, ValueError, r"row 0 holds 0 .* expected 4"),
        "ids of another batch": ({**full, "input_ids": ids[:2]}, ValueError, "2 rows, pixel_values has 3"),
        "small pictures": ({**full, "pixel_values": pixels[..., :14, :14]}, ValueError, "14x14.*28x28"),
        "wide pictures": ({**full, "pixel_values": pixels[..., :14]}, ValueError, "28x14.*28x28"),
        "one channel": ({**full, "pixel_values": pixels[:, :1]}, ValueError, "3, height, width"),
        "three axes": ({**full, "pixel_values": pixels[0]}, ValueError, "3, height, width"),
        "bytes": ({**full, "pixel_values": pixels.astype(np.uint8)}, TypeError, "uint8"),
        "no pictures": ({**full, "pixel_values": None}, ValueError, "pixel_values"),
        "empty batch": ({**full, "pixel_values": pixels[:0]}, ValueError, "empty"),
        "empty ids": ({**full, "input_ids": ids[:, :0]}, ValueError, "empty"),
        "flat ids": ({**full, "input_ids": ids[0]}, ValueError, r"\[batch, length\]"),
        "ragged ids": ({**full, "input_ids": [[7], [7, 8]]}, ValueError, r"input_ids must be .* one length"),
        "floats for ids": ({**full, "input_ids": ids * 1.0}, TypeError, "integers"),
        "wide mask": ({**full, "attention_mask": np.ones((3, 99))}, ValueError, r"\(3, 99\)"),
        "mask of twos": ({**full, "attention_mask": np.full_like(ids, 2)}, ValueError, "zeros and ones"),
        "mask of nothing": ({**full, "attention_mask": np.zeros_like(ids)}, ValueError, "row 0"),
        "embeddings": ({**full, "inputs_embeds": pixels}, ValueError, "inputs_embeds must be"),
        "tiny": (
            {**full, "pixel_values": pixels[..., :13], "interpolate_pos_encoding": True},
            ValueError,
            "28x13, expected",
        ),
        "typo": ({**full, "max_new_token": 3}, ValueError, "max_new_token"),
        "cold": ({**full, "do_sample": True, "temperature": 0.0}, ValueError, "temperature"),
        "too many new": ({**full, "max_new_tokens": 999}, ValueError, "999.*160 positions"),
    }
    if kind in cases:
        return cases[kind]
    if kind == "one placeholder too many":
        changed[1, -1] = 319
        return {**full, "input_ids": changed}, ValueError, r"row 1 holds 5 .*\(token 319\), expected 4"
    if kind in ("negative id", "large id"):
        changed[2, -1] = -1 if kind == "negative id" else 320
        return {**full, "input_ids": changed}, ValueError, r"input_ids\[2, 9\] is .*0\.\.319"
    if kind in ("nan", "infinity"):
        spoiled = pixels.copy()
        spoiled[1, 0, 3, 3] = np.nan if kind == "nan" else np.inf
        return {**full, "pixel_values": spoiled}, NumericError, "picture 1"
    assert kind == "long prompt"
    return (
        {**full, "input_ids": np.pad(ids, ((0, 0), (0, 160)), constant_values=7)},
        ValueError,
        "170 tokens.*160 positions",
    )


KINDS = ["no placeholders", "one placeholder too many", "ids of another batch", "small pictures", "wide pictures",
         "one channel", "three axes", "bytes", "no pictures", "empty batch", "empty ids", "flat ids", "ragged ids",
         "floats for ids", "negative id", "large id", "wide mask", "mask of twos", "mask of nothing", "nan", "infinity",
         "long prompt", "embeddings", "tiny", "typo", "cold", "too many new"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_do_not_fit_are_refused_and_the_model_goes_on(model: Any, inputs: Any, kind: str) -> None:
    pixels, ids = inputs
    before = model.generate(pixels, ids, max_new_tokens=3)
    arguments, error, message = wrong(kind, pixels, ids)
    with pytest.raises(error, match=message):
        model.generate(**{"max_new_tokens": 3, **arguments})
    if kind not in ("typo", "cold", "too many new"):
        with pytest.raises(error, match=message):
            model(**arguments)
    assert np.array_equal(model.generate(pixels, ids, max_new_tokens=3), before)


def test_threads_share_a_model(model: Any, inputs: Any) -> None:
    pixels, ids = inputs
    want = model.generate(pixels, ids, max_new_tokens=8)
    found: list[Any] = []
    threads = [
        threading.Thread(target=lambda: found.append(model.generate(pixels, ids, max_new_tokens=8))) for _ in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(np.array_equal(f, want) for f in found)


def test_torch_is_not_imported(folder: Path) -> None:
    code = (
        "import sys, numpy as np, blip2c\n"
        f"m = blip2c.Blip2ForConditionalGeneration.from_pretrained({str(folder)!r}, torch_dtype='float16')\n"
        "m = m.to('cpu').eval()\n"
        "out = m.generate(np.zeros((1, 3, 28, 28), np.float32), max_new_tokens=3)\n"
        "assert out.dtype == np.int64 and m.dtype == 'float16' and m.device == 'cpu'\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_the_script_of_clip_interrogator(folder: Path) -> None:
    """Change the import, keep the script."""
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8))

    def script(library: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        processor = library.AutoProcessor.from_pretrained(str(folder))
        if library is transformers:
            from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

            processor.image_processor = BlipImageProcessorPil.from_pretrained(folder)
        model = library.Blip2ForConditionalGeneration.from_pretrained(str(folder), torch_dtype=dtype)
        model.eval()
        model = model.to(device)
        inputs = processor(images=image, text="a photo of", return_tensors="pt").to(device)
        inputs = inputs.to(dtype)
        tokens = model.generate(**inputs, max_new_tokens=12)
        return str(processor.batch_decode(tokens, skip_special_tokens=True)[0].strip())

    found = script(blip2c)
    assert found.startswith("a photo of")
    assert found == script(transformers)
