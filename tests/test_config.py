"""Configurations: old and new files read as transformers reads them, every wrong value refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from blip2c import Blip2Config, CheckpointError, UnsupportedError
from blip2c.config import OPTConfig, core_config
from helpers import random_config

# Salesforce/blip2-opt-2.7b's config.json as it was before image tokens, cut to what says something.
OLD = {
    "architectures": ["Blip2ForConditionalGeneration"],
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "is_encoder_decoder": False,
    "model_type": "blip-2",
    "num_query_tokens": 32,
    "qformer_config": {"classifier_dropout": None, "model_type": "blip_2_qformer",
                       "position_embedding_type": "absolute"},
    "text_config": {
        "_name_or_path": "facebook/opt-2.7b",
        "activation_dropout": 0.0,
        "architectures": ["OPTForCausalLM"],
        "eos_token_id": 50118,
        "ffn_dim": 10240,
        "hidden_size": 2560,
        "model_type": "opt",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "prefix": "</s>",
        "torch_dtype": "float16",
        "word_embed_proj_dim": 2560,
    },
    "torch_dtype": "float32",
    "transformers_version": None,
    "use_decoder_only_language_model": True,
    "vision_config": {"dropout": 0.0, "initializer_factor": 1.0, "model_type": "blip_2_vision_model",
                      "num_channels": 3, "projection_dim": 512},
}  # fmt: skip
NEW = {**OLD, "image_token_index": 50265, "text_config": {**OLD["text_config"], "vocab_size": 50304}}  # type: ignore[dict-item]


def write(folder: Path, values: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "values", [OLD, NEW, {"model_type": "blip-2"}, random_config().to_dict()], ids=["old", "new", "bare", "random"]
)
def test_files_are_read_as_there(tmp_path: Path, values: dict[str, Any]) -> None:
    values = json.loads(json.dumps(values, default=str))
    ours, theirs = (
        Blip2Config.from_pretrained(write(tmp_path, values)),
        transformers.Blip2Config.from_dict(dict(values)),
    )
    for part in ("vision_config", "qformer_config", "text_config"):
        a, b = getattr(ours, part), getattr(theirs, part)
        for name in type(a)._defaults():
            if name not in ("dtype", "architectures", "transformers_version"):
                assert getattr(a, name) == getattr(b, name), (part, name)
        assert a.model_type == b.model_type
    for name in (
        "num_query_tokens",
        "image_token_index",
        "image_token_id",
        "image_text_hidden_size",
        "initializer_factor",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.use_decoder_only_language_model == theirs.use_decoder_only_language_model


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = Blip2Config(), transformers.Blip2Config()
    for a, b in (
        (ours, theirs),
        *((getattr(ours, p), getattr(theirs, p)) for p in ("vision_config", "qformer_config")),
    ):
        for name in type(a)._defaults():
            if not name.endswith("_config") and name != "transformers_version":
                assert getattr(a, name) == getattr(b, name), name
    opt = transformers.OPTConfig()
    assert all(
        getattr(OPTConfig(), name) == getattr(opt, name) for name in ("ffn_dim", "vocab_size", "word_embed_proj_dim")
    )


def test_unknown_keys_are_kept_and_files_go_back(tmp_path: Path) -> None:
    ours = Blip2Config.from_dict({**NEW, "my_own": [1, 2]})
    ours.text_config.also = "kept"
    ours.save_pretrained(tmp_path)
    again = Blip2Config.from_pretrained(tmp_path)
    assert again == ours
    assert again.my_own == [1, 2]
    assert again.text_config.also == "kept"
    assert again.dtype == again.torch_dtype == "float32"
    theirs = transformers.Blip2Config.from_pretrained(tmp_path)
    assert theirs.image_token_index == 50265
    assert theirs.text_config.eos_token_id == 50118
    assert Blip2Config.from_pretrained(tmp_path / "config.json") == ours
    ours.image_token_id = 7
    assert ours.image_token_index == 7


@pytest.mark.parametrize(("outer", "inner"), [(True, False), (False, True), (False, None), (None, False)])
def test_only_the_text_part_says_whether_the_head_is_tied(outer: bool | None, inner: bool | None) -> None:
    values: dict[str, Any] = {"text_config": {"model_type": "opt", "vocab_size": 300}}
    if outer is not None:
        values["tie_word_embeddings"] = outer
    if inner is not None:
        values["text_config"]["tie_word_embeddings"] = inner
    theirs = transformers.Blip2Config.from_dict(json.loads(json.dumps(values)))
    assert (
        core_config(Blip2Config.from_dict(values))["text"]["tie_word_embeddings"]
        == theirs.text_config.tie_word_embeddings
    )


def test_core_config_of_the_real_shapes() -> None:
    core = core_config(Blip2Config.from_dict(NEW))
    assert core["vision"] == {
        "image_size": 224, "patch_size": 14, "hidden_size": 1408, "num_hidden_layers": 39, "num_attention_heads": 16,
        "intermediate_size": 6144, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "qkv_bias": True, "num_channels": 3,
    }  # fmt: skip
    assert core["qformer"]["cross_attention_frequency"] == 2
    assert core["qformer"]["encoder_hidden_size"] == 1408
    assert core["text"]["model_type"] == "opt"
    assert core["image_token_id"] == 50265
    assert core_config(Blip2Config.from_dict(OLD))["image_token_id"] == -1


def changed(path: str, value: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(NEW))
    *parents, last = path.split(".")
    inner = values
    for parent in parents:
        inner = inner[parent]
    inner[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_config.hidden_size", 0),
        ("vision_config.hidden_size", -8),
        ("vision_config.hidden_size", 2**40),
        ("vision_config.hidden_size", "1408"),
        ("vision_config.hidden_size", 1408.5),
        ("vision_config.hidden_size", True),
        ("vision_config.hidden_size", None),
        ("vision_config.num_attention_heads", 17),
        ("vision_config.image_size", 14 * 1024),
        ("vision_config.image_size", 7),
        ("vision_config.layer_norm_eps", -1.0),
        ("vision_config.layer_norm_eps", "small"),
        ("vision_config.qkv_bias", "yes"),
        ("qformer_config.num_hidden_layers", 0),
        ("qformer_config.num_hidden_layers", 10**6),
        ("qformer_config.cross_attention_frequency", 0),
        ("text_config.ffn_dim", -1),
        ("text_config.vocab_size", 2**40),
        ("text_config.max_position_embeddings", 0),
        ("text_config.num_attention_heads", 3),
        ("num_query_tokens", 0),
        ("num_query_tokens", 10**6),
        ("image_token_index", 50304),
        ("image_token_index", -2),
        ("vision_config.layer_norm_eps", 10**400),
        ("text_config.model_type", ["opt"]),
        ("text_config", {"model_type": "qwen2", "num_hidden_layers": 10**12}),
        ("text_config", {"model_type": "qwen2", "num_hidden_layers": "3"}),
        ("text_config", {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": None}),
        ("to_dict", 1),
        ("vision_config.__class__", "Blip2Config"),
    ],
)
def test_wrong_values_are_refused_by_name(path: str, value: Any) -> None:
    with pytest.raises(CheckpointError, match=path.rsplit(".", maxsplit=1)[-1]):
        core_config(Blip2Config.from_dict(changed(path, value)))


@pytest.mark.parametrize(
    ("path", "value"),
    [("parts", [1, 2]), ("self", 1), ("vision_config.self", 1), ("text_config.attribute_map", {"vocab_size": "pad"})],
)
def test_keys_that_are_names_here_change_nothing(path: str, value: Any) -> None:
    assert core_config(Blip2Config.from_dict(changed(path, value))) == core_config(Blip2Config.from_dict(NEW))


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("text_config.model_type", "mt5", "'mt5'"),
        ("text_config.model_type", "gemma", "'gemma'"),
        ("text_config.model_type", "no_such_model", "'no_such_model'"),
        ("text_config.word_embed_proj_dim", 512, "word_embed_proj_dim 512"),
        ("text_config.activation_function", "tanh", "'tanh'"),
        ("vision_config.hidden_act", "mish", "'mish'"),
        ("vision_config.num_channels", 4, "num_channels 4"),
        ("vision_config.image_size", [224, 280], "image_size"),
        ("qformer_config.position_embedding_type", "relative_key", "'relative_key'"),
        ("model_type", "blip", "'blip'"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(path: str, value: Any, name: str) -> None:
    with pytest.raises(UnsupportedError, match=name):
        core_config(Blip2Config.from_dict(changed(path, value)))


@pytest.mark.parametrize(
    "values",
    [
        {"rope_type": ["linear"]},
        {"rope_type": "linear", "factor": 10**400},
        {"rope_type": "longrope", "original_max_position_embeddings": 1, "short_factor": [1.0], "long_factor": [1.0]},
        {"rope_type": "yarn", "factor": 1e-320},
    ],
    ids=str,
)
def test_positions_that_no_machine_turns_are_refused(values: dict[str, Any]) -> None:
    text = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "rope_scaling": values}
    with pytest.raises((CheckpointError, UnsupportedError), match="rope_parameters"):
        core_config(Blip2Config.from_dict({**NEW, "text_config": text}))


@pytest.mark.parametrize("values", [[], "x", {"vision_config": 3}, {"text_config": [1]}], ids=str)
def test_files_of_another_form_are_refused(tmp_path: Path, values: Any) -> None:
    with pytest.raises(CheckpointError, match=r"expected an object|must be an object"):
        Blip2Config.from_pretrained(write(tmp_path, values))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Blip2Config.from_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        Blip2Config.from_pretrained(tmp_path / "empty")
