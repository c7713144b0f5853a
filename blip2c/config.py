"""Configurations: config.json in its old and new forms, with the names and defaults of transformers 5.23.

`Blip2Config` holds what the file says and fills in what it leaves out; `core_config()` checks it and hands the numbers
to the C part. Nothing is computed or allocated from a number that was not bounded here first.
"""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

from blip2c._core import CheckpointError, UnsupportedError
from blip2c.checkpoint import read_json
from blip2c.rope import rope, standard_parameters

# Names of transformers' ACT2FN that the kernels compute, and what the C part calls them.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_fast": "gelu_new",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}

MAX_DIMENSION = 1 << 16
MAX_VOCABULARY = 1 << 22
MAX_LAYERS = 1024
MAX_IMAGE_TOKENS = 1 << 14


class PretrainedConfig:
    """Named values with defaults: the annotated attributes of a subclass; anything else it is given is kept as well."""

    model_type: ClassVar[str] = ""
    # What transformers calls by a second name.
    attribute_map: ClassVar[dict[str, str]] = {}

    dtype: str | None = None
    architectures: list[str] | None = None
    transformers_version: str | None = None

    def __init__(self, /, **values: Any) -> None:
        if "torch_dtype" in values:  # the name before transformers 4.56
            legacy = values.pop("torch_dtype")
            if values.get("dtype") is None:
                values["dtype"] = legacy
        if values.get("dtype") is not None:
            values["dtype"] = str(values["dtype"]).removeprefix("torch.")
        values.pop("model_type", None)
        for name, default in self._defaults().items():
            setattr(self, name, copy.copy(default))
        for name, value in values.items():
            _refuse_reserved(type(self), name)
            setattr(self, type(self).attribute_map.get(name, name), value)

    @classmethod
    def _defaults(cls) -> dict[str, Any]:
        """Annotated attributes with their defaults, base classes first."""
        return {
            name: getattr(cls, name)
            for base in reversed(cls.__mro__)
            for name, kind in inspect.get_annotations(base).items()
            if not str(kind).startswith("ClassVar")
        }

    def __getattr__(self, name: str) -> Any:
        target = type(self).attribute_map.get(name)
        if target is not None:
            return getattr(self, target)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        object.__setattr__(self, type(self).attribute_map.get(name, name), value)

    @property
    def torch_dtype(self) -> str | None:
        """The name of `dtype` before transformers 4.56."""
        return self.dtype

    @torch_dtype.setter
    def torch_dtype(self, value: Any) -> None:
        self.dtype = None if value is None else str(value).removeprefix("torch.")

    def get(self, name: str, default: Any = None) -> Any:
        """The value called `name`, or `default`."""
        return getattr(self, name, default)

    def to_dict(self) -> dict[str, Any]:
        """All values as plain Python objects, as they would stand in config.json."""
        values: dict[str, Any] = {"model_type": self.model_type}
        for name, value in self.__dict__.items():
            if isinstance(value, PretrainedConfig):
                values[name] = value.to_dict()
            elif value is not None or name not in PretrainedConfig._defaults():
                values[name] = copy.deepcopy(value)
        return values

    def to_json_string(self) -> str:
        """config.json's text."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str]) -> None:
        """Write config.json's text to `path`."""
        Path(path).write_text(self.to_json_string(), encoding="utf-8")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PretrainedConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {self.to_json_string()}"


def _refuse_reserved(kind: type, name: str) -> None:
    """What a class has methods for can not be a value of a file: it would take their place."""
    own = getattr(kind, name, None)
    if name.startswith("__") or callable(own) or isinstance(own, property):
        raise CheckpointError(f"config.json: {name} is no name for a value of a {kind.__name__}")


class Blip2VisionConfig(PretrainedConfig):
    """The vision transformer (transformers: Blip2VisionConfig). Sizes are of pixels and of channels."""

    model_type = "blip_2_vision_model"
    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int | list[int] = 224
    patch_size: int | list[int] = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float = 0.0
    initializer_range: float = 1e-10
    qkv_bias: bool = True


class QFormerConfig(PretrainedConfig):
    """What every Q-Former has."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408


class Blip2QFormerConfig(QFormerConfig):
    """The Q-Former (transformers: Blip2QFormerConfig)."""

    model_type = "blip_2_qformer"
    use_qformer_text_input: bool = False


class InstructBlipVisionConfig(Blip2VisionConfig):
    """The same vision transformer (transformers: InstructBlipVisionConfig)."""

    model_type = "instructblip_vision_model"


class InstructBlipQFormerConfig(QFormerConfig):
    """The Q-Former that reads an instruction too (transformers: InstructBlipQFormerConfig)."""

    model_type = "instructblip_qformer"


class OPTConfig(PretrainedConfig):
    """The OPT language model (transformers: OPTConfig)."""

    model_type = "opt"
    is_encoder_decoder: ClassVar[bool] = False
    vocab_size: int = 50272
    hidden_size: int = 768
    num_hidden_layers: int = 12
    ffn_dim: int = 3072
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.0
    num_attention_heads: int = 12
    activation_function: str = "relu"
    layerdrop: float = 0.0
    init_std: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = 1
    bos_token_id: int | None = 2
    eos_token_id: int | list[int] | None = 2
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)
        if self.word_embed_proj_dim is None:
            self.word_embed_proj_dim = self.hidden_size


class T5Config(PretrainedConfig):
    """The T5 and Flan-T5 language model (transformers: T5Config).

    dense_act_fn and is_gated_act are read off feed_forward_proj ("gated-gelu" means gelu_new), scale_decoder_outputs
    off tie_word_embeddings, unless the file says them; afterwards tie_word_embeddings is True always, and the head is
    the file's own where it differs from the embedding.
    """

    model_type = "t5"
    is_encoder_decoder: ClassVar[bool] = True
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "num_heads",
        "num_hidden_layers": "num_layers",
        "head_dim": "d_kv",
    }
    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    initializer_factor: float = 1.0
    feed_forward_proj: str = "relu"
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 1
    decoder_start_token_id: int | None = None
    classifier_dropout: float = 0.0

    def __init__(self, /, **values: Any) -> None:
        tied = values.pop("tie_word_embeddings", None)
        values.pop("is_encoder_decoder", None)
        aliases = {name: values.pop(name) for name in list(values) if name in self.attribute_map}
        super().__init__(**values)
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_layers
        for name, value in aliases.items():  # only now: num_hidden_layers says nothing about the decoder upstream
            setattr(self, name, value)
        parts = str(self.feed_forward_proj).split("-")
        act = "gelu_new" if self.feed_forward_proj == "gated-gelu" else parts[-1]
        self.dense_act_fn = values.get("dense_act_fn", act)
        self.is_gated_act = values.get("is_gated_act", parts[0] == "gated")
        self.scale_decoder_outputs = values.get("scale_decoder_outputs", tied is not False)
        self.tie_word_embeddings = True


class LlamaConfig(PretrainedConfig):
    """A LLaMA or Vicuna language model (transformers: LlamaConfig).

    rope_parameters hold what files of before transformers 5 call rope_theta and rope_scaling.
    """

    model_type = "llama"
    is_encoder_decoder: ClassVar[bool] = False
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = False
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    mlp_bias: bool = False
    head_dim: int | None = None

    def __init__(self, /, **values: Any) -> None:
        parameters = standard_parameters(
            values, values.get("max_position_embeddings", self._defaults()["max_position_embeddings"])
        )
        super().__init__(**values)
        self.rope_parameters = parameters
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None and isinstance(self.hidden_size, int) and isinstance(self.num_attention_heads, int):
            self.head_dim = self.hidden_size // max(self.num_attention_heads, 1)


class MistralConfig(LlamaConfig):
    """A Mistral language model (transformers: MistralConfig): every layer looks back over sliding_window tokens."""

    model_type = "mistral"
    intermediate_size: int = 14336
    num_key_value_heads: int | None = 8
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096


class Qwen2Config(LlamaConfig):
    """A Qwen2 language model (transformers: Qwen2Config).

    Layers from max_window_layers on have a sliding window where use_sliding_window is set; layer_types overrules it.
    """

    model_type = "qwen2"
    vocab_size: int = 151936
    intermediate_size: int = 22016
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None

    def __init__(self, /, **values: Any) -> None:
        super().__init__(**values)
        if not self.use_sliding_window:
            self.sliding_window = None
        first = self.num_hidden_layers if self.sliding_window is None else self.max_window_layers
        if self.layer_types is None and _is_count(self.num_hidden_layers) and isinstance(first, int):
            self.layer_types = [
                "sliding_attention" if layer >= first else "full_attention" for layer in range(self.num_hidden_layers)
            ]


class Qwen3Config(Qwen2Config):
    """A Qwen3 language model (transformers: Qwen3Config): queries and keys are normed, head by head."""

    model_type = "qwen3"
    head_dim: int | None = 128


def _is_count(value: Any) -> bool:
    """Whether it is a number of layers that core_config() would take; it says so itself where it is not."""
    return isinstance(value, int) and 0 <= value <= MAX_LAYERS


class UnknownTextConfig(PretrainedConfig):
    """A language model of a kind that blip2c does not compute: its values are kept, loading it is refused."""

    def __init__(self, /, model_type: str = "", **values: Any) -> None:
        super().__init__(**values)
        object.__setattr__(self, "model_type", model_type)


TEXT_CONFIGS: dict[str, type[PretrainedConfig]] = {
    kind.model_type: kind for kind in (OPTConfig, T5Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config)
}


def _part(kind: type[PretrainedConfig], name: str, values: Any) -> PretrainedConfig:
    if isinstance(values, PretrainedConfig):
        return values
    if values is None:
        return kind()
    if not isinstance(values, Mapping):
        raise CheckpointError(f"config.json: {name} must be an object, found {type(values).__name__}")
    return kind(**values)


def _text_part(values: Any) -> PretrainedConfig:
    model_type = values.get("model_type") or "opt" if isinstance(values, Mapping) else "opt"
    if not isinstance(model_type, str):
        raise CheckpointError(f"config.json: text_config.model_type must be a string, found {model_type!r}")
    if model_type in TEXT_CONFIGS or not isinstance(values, Mapping):
        return _part(TEXT_CONFIGS.get(model_type, OPTConfig), "text_config", values)
    return UnknownTextConfig(**dict(values))


class Blip2Config(PretrainedConfig):
    """A whole BLIP-2: `vision_config`, `qformer_config`, `text_config` and what joins them (transformers: Blip2Config).

    image_token_index (also image_token_id) is None in checkpoints of before transformers 4.46. The text part is an
    config of TEXT_CONFIGS, or holds the file's values unread where its model_type is another one.
    """

    model_type = "blip-2"
    attribute_map: ClassVar[dict[str, str]] = {"image_token_id": "image_token_index"}
    # Annotated in the order in which they are filled.
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    image_token_index: int | None = None
    initializer_factor: float = 1.0
    initializer_range: float = 0.02

    vision_config: Any = None
    qformer_config: Any = None
    text_config: Any = None
    parts: ClassVar[tuple[type[PretrainedConfig], type[PretrainedConfig]]] = (Blip2VisionConfig, Blip2QFormerConfig)

    def __init__(
        self,
        /,
        vision_config: Mapping[str, Any] | PretrainedConfig | None = None,
        qformer_config: Mapping[str, Any] | PretrainedConfig | None = None,
        text_config: Mapping[str, Any] | PretrainedConfig | None = None,
        **values: Any,
    ) -> None:
        super().__init__(**values)
        self.vision_config = _part(type(self).parts[0], "vision_config", vision_config)
        self.qformer_config = _part(type(self).parts[1], "qformer_config", qformer_config)
        self.text_config = _text_part(text_config)
        # transformers overrides whatever the file says here.
        self.qformer_config.encoder_hidden_size = self.vision_config.hidden_size
        self.use_decoder_only_language_model = self.text_config.model_type not in ENCODER_DECODERS

    @property
    def is_encoder_decoder(self) -> bool:
        """True for T5 and its like."""
        return not self.use_decoder_only_language_model

    def get_text_config(self, decoder: bool = False) -> Any:
        """The language model's configuration."""
        return self.text_config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> Self:
        """From config.json's object. Raises CheckpointError if it is of another model."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"config.json: expected an object, found {type(values).__name__}")
        model_type = values.get("model_type", cls.model_type)
        if model_type != cls.model_type:
            raise UnsupportedError(
                f"config.json: model_type is {model_type!r}; this class reads {cls.model_type!r} only"
            )
        known = {k: v for k, v in values.items() if k not in ("model_type", "is_encoder_decoder")}
        return cls(**{**known, **changes})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str]) -> Self:
        """From a config.json."""
        return cls.from_dict(read_json(path))

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str], **options: Any) -> Self:
        """From a folder, a config.json or a Hub id; options as in `Blip2ForConditionalGeneration.from_pretrained`."""
        from blip2c.hub import pop_hub_options, resolve

        hub = pop_hub_options(options)
        path = Path(path_or_id)
        if not path.is_file():
            path = resolve(path_or_id, weights=False, **hub) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path.parent}: no config.json, so this is not a checkpoint")
        return cls.from_dict(read_json(path), **options)

    @classmethod
    def from_vision_qformer_text_configs(
        cls, vision_config: PretrainedConfig, qformer_config: PretrainedConfig, text_config: Any, **values: Any
    ) -> Self:
        """From its three parts."""
        return cls(vision_config, qformer_config, text_config, **values)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write directory/config.json."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / "config.json")


class InstructBlipConfig(Blip2Config):
    """A whole InstructBLIP (transformers: InstructBlipConfig): a BLIP-2 whose Q-Former reads the instruction too."""

    model_type = "instructblip"
    parts = (InstructBlipVisionConfig, InstructBlipQFormerConfig)


ENCODER_DECODERS = frozenset({"t5", "mt5", "umt5", "bart", "mbart", "pegasus", "longt5", "switch_transformers"})


def _integer(name: str, value: Any, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json: {name} must be an integer, found {value!r}")
    if not low <= value <= high:
        raise CheckpointError(f"config.json: {name} must be in {low}..{high}, found {value}")
    return value


def _epsilon(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise CheckpointError(f"config.json: {name} must be a number in 0..1, found {value!r}")
    return float(value)


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {name} must be true or false, found {value!r}")
    return value


def _activation(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in ACTIVATIONS:
        raise UnsupportedError(f"config.json: {name} {value!r} is not one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[value]


def _square(name: str, value: Any) -> int:
    """A side in pixels: an integer, or a pair of the same integer twice."""
    if isinstance(value, list | tuple) and len(value) == 2:
        if value[0] != value[1]:
            raise UnsupportedError(f"config.json: {name} {list(value)} is not a square; blip2c computes squares only")
        value = value[0]
    return _integer(name, value, 1, MAX_DIMENSION)


def _sizes(part: str, config: PretrainedConfig, feed_forward: str) -> dict[str, int]:
    sizes = {
        "hidden_size": _integer(f"{part}.hidden_size", config.get("hidden_size"), 1, MAX_DIMENSION),
        "num_hidden_layers": _integer(f"{part}.num_hidden_layers", config.get("num_hidden_layers"), 1, MAX_LAYERS),
        "num_attention_heads": _integer(f"{part}.num_attention_heads", config.get("num_attention_heads"), 1, 1024),
        feed_forward: _integer(f"{part}.{feed_forward}", config.get(feed_forward), 1, 4 * MAX_DIMENSION),
    }
    if sizes["hidden_size"] % sizes["num_attention_heads"]:
        raise CheckpointError(
            f"config.json: {part}.hidden_size {sizes['hidden_size']} is not a multiple of"
            f" num_attention_heads {sizes['num_attention_heads']}"
        )
    return sizes


def _vision_core(config: Blip2VisionConfig) -> dict[str, Any]:
    image = _square("vision_config.image_size", config.image_size)
    patch = _square("vision_config.patch_size", config.patch_size)
    if patch > image:
        raise CheckpointError(f"config.json: vision_config.patch_size {patch} is larger than image_size {image}")
    if (image // patch) ** 2 > MAX_IMAGE_TOKENS:
        raise CheckpointError(
            f"config.json: image_size {image} with patch_size {patch} makes {(image // patch) ** 2} patches,"
            f" more than {MAX_IMAGE_TOKENS}"
        )
    channels = _integer("vision_config.num_channels", config.get("num_channels", 3), 1, 1024)
    if channels != 3:
        raise UnsupportedError(
            f"config.json: vision_config.num_channels {channels}; only pictures of 3 channels are read"
        )
    return {
        **_sizes("vision_config", config, "intermediate_size"),
        "image_size": image,
        "patch_size": patch,
        "num_channels": channels,
        "layer_norm_eps": _epsilon("vision_config.layer_norm_eps", config.layer_norm_eps),
        "hidden_act": _activation("vision_config.hidden_act", config.hidden_act),
        "qkv_bias": _flag("vision_config.qkv_bias", config.qkv_bias),
    }


def _qformer_core(config: QFormerConfig, text_side: str) -> dict[str, Any]:
    """text_side: "none", "beside" (InstructBLIP: a text with each picture) or "apart" (retrieval: texts alone, too)."""
    position = config.get("position_embedding_type", "absolute")
    if position not in ("absolute", None):
        raise UnsupportedError(f"config.json: qformer_config.position_embedding_type {position!r}; only 'absolute'")
    return {
        **_sizes("qformer_config", config, "intermediate_size"),
        "layer_norm_eps": _epsilon("qformer_config.layer_norm_eps", config.layer_norm_eps),
        "hidden_act": _activation("qformer_config.hidden_act", config.hidden_act),
        "cross_attention_frequency": _integer(
            "qformer_config.cross_attention_frequency", config.cross_attention_frequency, 1, MAX_LAYERS
        ),
        "encoder_hidden_size": _integer(
            "qformer_config.encoder_hidden_size", config.encoder_hidden_size, 1, MAX_DIMENSION
        ),
        "text_side": text_side,
        "vocab_size": _integer("qformer_config.vocab_size", config.vocab_size, 1, MAX_VOCABULARY),
        "max_position_embeddings": _integer(
            "qformer_config.max_position_embeddings", config.max_position_embeddings, 1, MAX_VOCABULARY
        ),
    }


def _opt_core(config: Any) -> dict[str, Any]:
    sizes = _sizes("text_config", config, "ffn_dim")
    if config.word_embed_proj_dim != config.hidden_size:
        raise UnsupportedError(
            f"config.json: text_config.word_embed_proj_dim {config.word_embed_proj_dim} differs from hidden_size"
            f" {config.hidden_size} (OPT-350m): BLIP-2's projection does not fit such a model"
        )
    return {
        "model_type": "opt",
        **sizes,
        "vocab_size": _integer("text_config.vocab_size", config.vocab_size, 1, MAX_VOCABULARY),
        "max_position_embeddings": _integer(
            "text_config.max_position_embeddings", config.max_position_embeddings, 1, MAX_VOCABULARY
        ),
        "activation_function": _activation("text_config.activation_function", config.activation_function),
        "do_layer_norm_before": _flag("text_config.do_layer_norm_before", config.do_layer_norm_before),
        "remove_final_layer_norm": _flag("text_config._remove_final_layer_norm", config._remove_final_layer_norm),
        "enable_bias": _flag("text_config.enable_bias", config.enable_bias),
        "layer_norm_elementwise_affine": _flag(
            "text_config.layer_norm_elementwise_affine", config.layer_norm_elementwise_affine
        ),
        # Only the text part's own flag counts in transformers 5.23: the one beside it at the top is not looked at.
        "tie_word_embeddings": _flag("text_config.tie_word_embeddings", config.tie_word_embeddings),
    }


def _text_integer(config: Any, name: str, high: int, low: int = 1) -> int:
    return _integer(f"text_config.{name}", config.get(name), low, high)


def _t5_core(config: Any) -> dict[str, Any]:
    size = partial(_text_integer, config)
    proj = config.feed_forward_proj
    parts = proj.split("-") if isinstance(proj, str) else []
    if not parts or len(parts) > 2 or (len(parts) == 2 and parts[0] != "gated"):
        raise CheckpointError(
            "config.json: text_config.feed_forward_proj must be the name of an activation, or 'gated-' and one,"
            f" found {proj!r}"
        )
    buckets = size("relative_attention_num_buckets", MAX_DIMENSION, 4)
    return {
        "model_type": "t5",
        "hidden_size": size("d_model", MAX_DIMENSION),
        "num_hidden_layers": size("num_layers", MAX_LAYERS),
        "num_decoder_layers": size("num_decoder_layers", MAX_LAYERS),
        "num_attention_heads": size("num_heads", 1024),
        "d_kv": size("d_kv", MAX_DIMENSION),
        "d_ff": size("d_ff", 4 * MAX_DIMENSION),
        "vocab_size": size("vocab_size", MAX_VOCABULARY),
        "relative_attention_num_buckets": buckets,
        # At or below the half of the buckets that count single tokens, the logarithm that spaces the others fails.
        "relative_attention_max_distance": size("relative_attention_max_distance", MAX_DIMENSION, buckets // 2 + 1),
        "layer_norm_epsilon": _epsilon("text_config.layer_norm_epsilon", config.layer_norm_epsilon),
        "dense_act_fn": _activation("text_config.dense_act_fn", config.dense_act_fn),
        "is_gated_act": _flag("text_config.is_gated_act", config.is_gated_act),
        "scale_decoder_outputs": _flag("text_config.scale_decoder_outputs", config.scale_decoder_outputs),
        "tie_word_embeddings": _flag("text_config.tie_word_embeddings", config.tie_word_embeddings),
    }


def _windows(config: Any, layers: int) -> tuple[int, list[int]]:
    """(sliding window or 0, for each layer whether it has it)."""
    window = config.get("sliding_window")
    window = 0 if window is None else _integer("text_config.sliding_window", window, 1, 1 << 30)
    if config.model_type == "llama":
        return 0, [0] * layers
    if config.model_type == "mistral":
        return window, [int(window > 0)] * layers
    types = config.layer_types
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != layers or not all(kind in known for kind in types):
        raise CheckpointError(
            f"config.json: text_config.layer_types must name one of {known} for each of {layers} layers,"
            f" found {types!r}"
        )
    slides = [int(kind == "sliding_attention") for kind in types]
    if any(slides) and not window:
        raise CheckpointError("config.json: text_config.layer_types has sliding layers, but there is no sliding_window")
    return window, slides


def _llama_core(config: Any) -> dict[str, Any]:
    kind = config.model_type
    size = partial(_text_integer, config)
    heads, layers = size("num_attention_heads", 1024), size("num_hidden_layers", MAX_LAYERS)
    key_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", 1024)
    if heads % key_heads:
        raise CheckpointError(
            f"config.json: text_config.num_attention_heads {heads} is not a multiple of num_key_value_heads {key_heads}"
        )
    window, slides = _windows(config, layers)
    found = rope(config.rope_parameters, head_dim, size("max_position_embeddings", MAX_VOCABULARY))
    # Mistral's and Qwen2's products have the biases they have, whatever the file says.
    biased = _flag("text_config.attention_bias", config.attention_bias) if kind in ("llama", "qwen3") else False
    return {
        "model_type": kind,
        "hidden_size": size("hidden_size", MAX_DIMENSION),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "head_dim": head_dim,
        "intermediate_size": size("intermediate_size", 4 * MAX_DIMENSION),
        "vocab_size": size("vocab_size", MAX_VOCABULARY),
        "rms_norm_eps": _epsilon("text_config.rms_norm_eps", config.rms_norm_eps),
        "hidden_act": _activation("text_config.hidden_act", config.hidden_act),
        "qkv_bias": biased or kind == "qwen2",
        "o_bias": biased,
        "mlp_bias": kind == "llama" and _flag("text_config.mlp_bias", config.mlp_bias),
        "qk_norm": kind == "qwen3",
        "sliding_window": window,
        "slides": slides,
        "inv_freq": found.frequencies.tolist(),
        **({} if found.positions is None else {"max_position_embeddings": found.positions}),
        "rope_scaling": found.scaling,
        "tie_word_embeddings": _flag("text_config.tie_word_embeddings", config.tie_word_embeddings),
    }


TEXT_CORES = {
    "opt": _opt_core,
    "t5": _t5_core,
    "llama": _llama_core,
    "mistral": _llama_core,
    "qwen2": _llama_core,
    "qwen3": _llama_core,
}


def core_config(config: Blip2Config) -> dict[str, Any]:
    """The checked numbers that the C part needs.

    Raises CheckpointError for a value that is wrong and UnsupportedError for one that is right but not computed here;
    both name the key. image_token_id is -1 where the checkpoint has none.
    """
    text = config.text_config
    if text.model_type not in TEXT_CORES:
        raise UnsupportedError(
            f"config.json: text_config.model_type {text.model_type!r} is not computed by this version;"
            f" known: {', '.join(sorted(TEXT_CORES))}"
        )
    core: dict[str, Any] = {
        "num_query_tokens": _integer("num_query_tokens", config.num_query_tokens, 1, 4096),
        "vision": _vision_core(config.vision_config),
        "qformer": _qformer_core(
            config.qformer_config,
            "beside" if config.qformer_config.model_type == InstructBlipQFormerConfig.model_type else "none",
        ),
        "text": TEXT_CORES[text.model_type](text),
    }
    vocabulary = core["text"]["vocab_size"]
    image_token = config.image_token_index
    core["image_token_id"] = (
        -1 if image_token is None else _integer("image_token_index", image_token, 0, vocabulary - 1)
    )
    return core


def retrieval_core(config: Blip2Config, *, vision: bool, text: bool, match: bool, heads: bool = True) -> dict[str, Any]:
    """As core_config(), of a model without a language model: what it reads and whether it tells pairs that match."""
    qformer = config.qformer_config
    if text and not _flag("qformer_config.use_qformer_text_input", qformer.get("use_qformer_text_input", False)):
        raise UnsupportedError(
            "config.json: qformer_config.use_qformer_text_input is false: this Q-Former reads no texts, only pictures"
        )
    core: dict[str, Any] = {
        "num_query_tokens": _integer("num_query_tokens", config.num_query_tokens, 1, 4096),
        "qformer": _qformer_core(qformer, "apart" if text else "none"),
    }
    if vision:
        core["vision"] = _vision_core(config.vision_config)
    if heads:
        size = _integer("image_text_hidden_size", config.image_text_hidden_size, 1, MAX_DIMENSION)
        core["heads"] = {"projection_size": size, "vision": vision, "text": text, "match": match}
    # No table has a row for it: on the Hub it is the first id behind the Q-Former's vocabulary.
    token = config.image_token_index
    core["image_token_id"] = -1 if token is None else _integer("image_token_index", token, 0, MAX_VOCABULARY - 1)
    return core
