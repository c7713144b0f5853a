"""What dtype= means, part by part, and how exact each dtype is: docs/DTYPES.md's promises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blip2c
from blip2c import _core
from blip2c.dtypes import parse_dtype
from blip2c.modeling import Blip2ForConditionalGeneration
from helpers import calm_queries, plant_outliers, prompt_ids, random_checkpoint, random_pixels

load = Blip2ForConditionalGeneration.from_pretrained
PAIRS = _core.cpu_info()["isa"] == "avx512_bf16"
WIDE: dict[str, Any] = {
    "vision": {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4},
    "qformer": {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4},
    "text": {"hidden_size": 160, "ffn_dim": 640, "num_attention_heads": 4},
}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("half"), 1, dtype="float16", **WIDE)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("full"), 1, **WIDE)


def logits(model: Any) -> np.ndarray:
    ids = prompt_ids(model.config, 4, 24)
    is_t5 = model.config.text_config.model_type == "t5"
    decoded = {"decoder_input_ids": ids[:, model.config.num_query_tokens :]} if is_t5 else {}
    found: np.ndarray = model(random_pixels(model.config, 4), ids, **decoded).logits
    return found


def held(model: Any) -> tuple[str, str, str]:
    return model.dtypes["vision"], model.dtypes["qformer"], model.dtypes["language"]


# -- meaning -----------------------------------------------------------------------------------------------------------


def test_what_a_name_means_for_each_part(half: Path, full: Path) -> None:
    expected = {
        "auto": ("float16", "float16", "float16"),
        "float32": ("float16", "float16", "float16"),  # the same products from half the memory
        "float16": ("float16", "float16", "float16"),
        "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
        "int8": ("int8", "float16", "int8"),
        "int4": ("int8", "float16", "int4"),
    }
    for name, parts in expected.items():
        assert held(load(half, dtype=name)) == parts
    assert held(load(full)) == ("float32", "float32", "float32")
    assert held(load(full, dtype="float16")) == ("float16", "float32", "float16")  # as transformers keeps it
    assert held(load(full, dtype="int8")) == ("int8", "float16", "int8")
    assert held(load(full, dtype={"language": "int4"})) == ("float32", "float32", "int4")
    everything = {"vision": "int4", "qformer": np.float16, "language": torch.bfloat16}
    assert held(load(full, dtype=everything)) == ("int4", "float16", "bfloat16")
    assert load(half, dtype="int8")._core.policies == "vision=int8,qformer=half,language=int8"


def test_names_for_parts_are_checked(half: Path) -> None:
    for wrong, message in (
        ({"ears": "int8"}, "expected the parts vision, qformer, language, found 'ears'"),
        ({"vision": "int2"}, r"dtype\['vision'\]: expected auto"),
        ({"vision": 8}, r"dtype\['vision'\]: expected auto"),
        ("int2", "dtype: expected auto, float32, float16, bfloat16, int8, int4, found 'int2'"),
        (torch.int8, "dtype: expected auto"),
    ):
        with pytest.raises(ValueError, match=message):
            load(half, dtype=wrong)
    for wrong in ("half", {"vision": "half"}, {"ears": "int8"}):
        with pytest.raises(ValueError, match="dtype"):
            _core._policies(wrong)
    with pytest.raises(TypeError, match="expected a name, found int"):
        _core._policies({"vision": 8})
    assert parse_dtype("vision=int8, language=int4") == {"vision": "int8", "language": "int4"}


def test_what_a_quantised_model_says_of_itself(half: Path) -> None:
    model, plain = load(half, dtype="int4"), load(half)
    assert model.is_quantized
    assert not plain.is_quantized
    assert model.dtype == torch.float32  # what it takes and gives is not rounded
    assert "language int4" in repr(model)
    assert model.num_parameters() == plain.num_parameters()
    assert model.get_memory_footprint() < 0.75 * plain.get_memory_footprint()
    for convert in (model.half, model.float, model.bfloat16, lambda: model.to(torch.float16)):
        with pytest.raises(ValueError, match=r"a quantised model \(vision int8, .*\) can not be converted"):
            convert()
    assert model.to("cpu") is model


def test_bfloat16_by_name_is_bfloat16_arithmetic_where_the_processor_has_it(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, 4, dtype="bfloat16", **WIDE)
    stored = load(folder)
    if PAIRS:
        named = load(folder, dtype="bfloat16")
        assert named._core.policies.count("-pairs") == 3
        assert not np.array_equal(logits(named), logits(stored))
    else:
        with pytest.warns(UserWarning, match=r"computed with in float32.*AVX512_BF16"):
            named = load(folder, dtype="bfloat16")
        np.testing.assert_array_equal(logits(named), logits(stored))
    assert named.dtype == torch.bfloat16
    # What float() asks for is float32 arithmetic on the weights as they are.
    np.testing.assert_array_equal(logits(named.float()), logits(stored))


def test_a_value_that_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    folder = random_checkpoint(tmp_path, 4)
    weights = _core.SafetensorsFile(folder / "model.safetensors")
    arrays = {name: weights.tensor(name) for name in weights.names()}
    name = "qformer.encoder.layer.1.attention.output.dense.weight"
    arrays[name][2, 3] = 1e5
    _core.write_safetensors(folder / "model.safetensors", arrays, {}, {"format": "pt"})
    with pytest.raises(blip2c.NumericError, match=f"{name}: 1 values of F32 are too large for F16"):
        load(folder, dtype="int8")
    assert load(folder, dtype={"vision": "int8", "language": "int8"}).is_quantized
    arrays[name][2, 3] = np.nan
    _core.write_safetensors(folder / "model.safetensors", arrays, {}, {"format": "pt"})
    with pytest.raises(blip2c.NumericError, match=name):
        load(folder, dtype={"qformer": "int8"})


# -- exactness ---------------------------------------------------------------------------------------------------------

# Relative error of the logits of random models (no redundancy to hide behind): what was measured, and a third more.
# What follows from a rounding differs by architecture: float16 shows it as the others do.
BOUNDS = {
    "opt": {"float16": 0.0015, "bfloat16": 0.015, "int8": 0.035, "int4": 0.2},
    "llama": {"float16": 0.0018, "bfloat16": 0.02, "int8": 0.07, "int4": 0.38},
    "t5": {"float16": 0.003, "bfloat16": 0.044, "int8": 0.13, "int4": 0.74},
}
TEXTS: dict[str, dict[str, Any]] = {
    "opt": WIDE["text"],
    "llama": {"hidden_size": 160, "intermediate_size": 448, "num_attention_heads": 4, "num_key_value_heads": 4},
    "t5": {"d_model": 160, "d_ff": 448, "num_heads": 4, "d_kv": 40},
}


@pytest.fixture(scope="module", params=list(BOUNDS))
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, Path]:
    """A family, a random model of it, and the same function with outliers."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = random_checkpoint(folder / "plain", 1, family=request.param, **{**WIDE, "text": TEXTS[request.param]})
    if request.param == "t5":
        calm_queries(plain)
    planted = Path(shutil.copytree(plain, folder / "planted"))
    plant_outliers(planted)
    return request.param, plain, planted


@pytest.mark.filterwarnings("ignore:dtype bfloat16")
@pytest.mark.parametrize("dtype", BOUNDS["opt"])
def test_error_of_each_dtype_with_and_without_outliers(dtype: str, both: tuple[str, Path, Path]) -> None:
    """Channels of norms 100 times larger, and what reads them smaller: the same function, as exact in every dtype."""
    family, full, planted = both
    reference = logits(load(full))
    scale = np.linalg.norm(reference)
    np.testing.assert_allclose(logits(load(planted)), reference, atol=1e-4 * float(np.abs(reference).max()))
    plain = np.linalg.norm(logits(load(full, dtype=dtype)) - reference) / scale
    hurt = np.linalg.norm(logits(load(planted, dtype=dtype)) - reference) / scale
    assert 0 < plain < BOUNDS[family][dtype]
    assert hurt < 1.2 * plain + 1e-4


@pytest.mark.filterwarnings("ignore:dtype bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_rounded_models_do_not_depend_on_threads_or_neighbours(dtype: str, half: Path) -> None:
    """Few rows of a product meet finer activations than many: prompts of 6 tokens and 21 running rows tell."""
    model = load(half, dtype=dtype)
    pixels, ids = random_pixels(model.config, 7), prompt_ids(model.config, 7, 6)
    options = {"max_new_tokens": 6, "num_beams": 3, "return_dict_in_generate": True, "output_scores": True}
    together, threads = model.generate(pixels, ids, **options), _core.get_num_threads()
    try:
        _core.set_num_threads(1)
        for i in range(7):
            alone = model.generate(pixels[i : i + 1], ids[i : i + 1], **options)
            np.testing.assert_array_equal(together.sequences[i : i + 1, : alone.sequences.shape[1]], alone.sequences)
            np.testing.assert_array_equal(together.sequences_scores[i : i + 1], alone.sequences_scores)
            logits = model(pixels[i : i + 1], ids[i : i + 1]).logits
            np.testing.assert_array_equal(model(pixels, ids).logits[i : i + 1], logits)
    finally:
        _core.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:dtype bfloat16")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_the_sample_says_the_same_in_every_dtype(dtype: str) -> None:
    """1,000 scenes are in docs/DTYPES.md; these are the pictures in the package."""
    model = blip2c.load(dtype=dtype)
    folder = blip2c.sample_path() / "pictures"
    for name, text in json.loads((folder / "captions.json").read_text()).items():
        assert model.caption(folder / name) == text["caption"]
        assert model.ask(folder / name, text["question"]) == text["answer"]
