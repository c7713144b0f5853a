"""`Blip2ForConditionalGeneration`: the transformers spelling over the C engine. Change the import, keep the script.

NumPy in, NumPy out; torch in, torch out. torch is only touched when a tensor was handed over. What is not computed here
raises UnsupportedError naming the option; no option is silently dropped.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c import _core
from blip2c._core import CheckpointError, UnsupportedError
from blip2c.batch import dtype_name, is_torch_dtype
from blip2c.checkpoint import read_json, resolve_files
from blip2c.config import Blip2Config, core_config
from blip2c.generation import GenerationConfig, core_options
from blip2c.images import is_torch
from blip2c.inputs import PackedRows, check_ids, check_mask, check_pixels, check_positions, pack
from blip2c.outputs import ModelOutput

# Options of from_pretrained in transformers, with the values that ask for nothing but what happens here anyway.
LOADING_OPTIONS: dict[str, tuple[Any, ...]] = {
    "low_cpu_mem_usage": (None, True, False),
    "use_safetensors": (None, True),
    "trust_remote_code": (None, True, False),
    "attn_implementation": (None, "eager", "sdpa"),
    "variant": (None,),
    "load_in_8bit": (None, False),
    "load_in_4bit": (None, False),
    "quantization_config": (None,),
    "offload_folder": (None,),
    "offload_state_dict": (None, False),
    "max_memory": (None,),
    "output_loading_info": (None, False),
    "ignore_mismatched_sizes": (None, False),
    "state_dict": (None,),
    "tp_plan": (None,),
    "key_mapping": (None,),
    "device_mesh": (None,),
    "gguf_file": (None,),
    "adapter_kwargs": (None,),
}
FORWARD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "decoder_input_ids": (None,),
    "decoder_attention_mask": (None,),
    "inputs_embeds": (None,),
    "labels": (None,),
    "interpolate_pos_encoding": (None, False),
    "mm_encoder_outputs": (None,),
    "output_attentions": (None, False),
    "output_hidden_states": (None, False),
    "use_cache": (None, True, False),
    "logits_to_keep": (None, 0),
    "past_key_values": (None,),
    "position_ids": (None,),
}
FILE_DTYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def refuse_options(where: str, options: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    """Raises TypeError for a name not in `known` and UnsupportedError for a value not in its tuple."""
    for name, value in options.items():
        if name not in known:
            raise TypeError(f"{where} has no option {name}")
        # Arrays and tensors do not compare to one truth value.
        plain = isinstance(value, str | bool | int | None)
        if not any(value is neutral or (plain and value == neutral) for neutral in known[name]):
            shown = repr(value) if plain else f"<{type(value).__name__}>"
            raise UnsupportedError(f"{where}: option {name}={shown} is not supported by this version of blip2c")


def check_device(device: Any) -> None:
    """Accepts what means the CPU ("cpu", "auto", {"": "cpu"}, torch.device("cpu")); else UnsupportedError."""
    places = set(device.values()) if isinstance(device, Mapping) else {device}
    for place in places:
        name = str(place).split(":")[0]
        if name not in ("None", "cpu", "auto", "balanced", "balanced_low_0", "sequential"):
            raise UnsupportedError(f"device {place!r}: this version of blip2c computes on the CPU only")


def _requested_dtype(dtype: Any, torch_dtype: Any) -> str:
    wanted = torch_dtype if dtype is None else dtype
    if wanted is None or (isinstance(wanted, str) and wanted == "auto"):
        return "auto"
    return dtype_name(wanted)


class LanguageModel:
    """What of `model.language_model` scripts look at: its config and the generation defaults that really count."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.generation_config = GenerationConfig.from_model_config(config)


class Blip2ForConditionalGeneration:
    """BLIP-2 that writes text about pictures (upstream: transformers' class of the same name).

    Made by `from_pretrained`. Weights are immutable and may be shared by threads. `generation_config` is what the
    folder's generation_config.json says; as in transformers 5.23 it has no effect on generate(), which takes its
    defaults from `language_model.generation_config` (made from text_config).
    """

    main_input_name = "pixel_values"

    def __init__(self, config: Blip2Config, files: list[str], *, dtype: str = "auto") -> None:
        """config: checked here. files: safetensors paths. dtype: "auto" (as stored), float32, float16 or bfloat16."""
        self.config = config
        self._core_config = core_config(config)
        self._files = [str(file) for file in files]
        self._core = _core.Model(self._files, self._core_config, dtype)
        # Keeps a folder of converted weights, where the files no longer hold the values (see `to`).
        self._converted: tempfile.TemporaryDirectory[str] | None = None
        # What it goes by. The C part holds matrices that were stored in half precision so, whatever is asked for.
        self._dtype = self._core.dtype if dtype == "auto" else dtype
        self._rounded = self._dtype != "float32" and dtype != "auto"
        self._lock = threading.Lock()
        self.training = False
        self.name_or_path = ""
        self.language_model = LanguageModel(config.text_config)
        self.generation_config = GenerationConfig.from_model_config(config.text_config)
        if self._core.unexpected:
            names = sorted(self._core.unexpected)
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            warnings.warn(f"weights that this architecture does not have were left out: {shown}", stacklevel=3)

    # -- loading and saving --------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        config: Any = None,
        dtype: Any = None,
        torch_dtype: Any = None,
        device: Any = None,
        device_map: Any = None,
        **options: Any,
    ) -> Blip2ForConditionalGeneration:
        """Load a folder or Hub id; of the latter only json, txt and safetensors files are fetched.

        config: a Blip2Config (blip2c's or transformers') instead of the folder's config.json.
        dtype (torch_dtype): how matrices are held: None or "auto" as stored, else float32, float16 or bfloat16 as a
        string, NumPy or torch dtype; arithmetic is float32 always. revision, cache_dir, local_files_only, token,
        force_download, subfolder: as in huggingface_hub. device, device_map: what means the CPU.

        Raises FileNotFoundError or OSError where there is no checkpoint, CheckpointError where it is damaged or
        disagrees with its config, UnsupportedError (naming it) for an architecture or option that is not computed here.
        """
        from blip2c.hub import pop_hub_options, resolve

        hub = pop_hub_options(options)
        refuse_options("from_pretrained", options, LOADING_OPTIONS)
        check_device(device)
        check_device(device_map)
        requested = _requested_dtype(dtype, torch_dtype)
        folder = resolve(pretrained_model_name_or_path, **hub)
        if config is None:
            config = Blip2Config.from_pretrained(folder)
        elif not isinstance(config, Blip2Config):  # transformers' own
            if not hasattr(config, "to_dict"):
                raise TypeError(f"config must be a Blip2Config, found {type(config).__name__}")
            config = Blip2Config.from_dict(config.to_dict())
        core_config(config)  # refuse what can not be computed before looking for its weights
        model = cls(config, [str(file) for file in resolve_files(folder)], dtype=requested)
        model.name_or_path = str(pretrained_model_name_or_path)
        file = folder / "generation_config.json"
        if file.is_file():
            values = read_json(file)
            if not isinstance(values, dict):
                raise CheckpointError(f"{file}: expected an object, found {type(values).__name__}")
            model.generation_config = GenerationConfig.from_dict(values)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write config.json, generation_config.json and model.safetensors, which transformers loads."""
        refuse_options("save_pretrained", options, {"safe_serialization": (None, True), "push_to_hub": (None, False)})
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._write_weights(folder / "model.safetensors")
        values = self.config.to_dict()
        values["architectures"] = ["Blip2ForConditionalGeneration"]
        values["dtype"] = self._dtype
        type(self.config).from_dict(values).save_pretrained(folder)
        self.generation_config.save_pretrained(folder)

    def _write_weights(self, path: Path) -> None:
        weights = {name: _stored_as(array, self._dtype) for name, array in self._core.weights().items()}
        dtypes = {name: FILE_DTYPES[str(array.dtype)] for name, array in weights.items()}
        _core.write_safetensors(str(path), weights, dtypes, {"format": "pt"})

    # -- dtype and device ----------------------------------------------------------------------------------------

    @property
    def dtype(self) -> Any:
        """What the model goes by and gives tensors in: a torch.dtype where torch is loaded, else its name."""
        torch = sys.modules.get("torch")
        return self._dtype if torch is None else getattr(torch, self._dtype)

    @property
    def device(self) -> Any:
        """The CPU: a torch.device where torch is loaded, else "cpu"."""
        torch = sys.modules.get("torch")
        return "cpu" if torch is None else torch.device("cpu")

    def to(self, *args: Any, **kwargs: Any) -> Blip2ForConditionalGeneration:
        """In place, as in torch: (device), (dtype), (device, dtype), keywords. Returns self.

        A conversion to a narrower dtype rounds the weights for good: `.half().float()` gives float32 matrices of
        float16 values, as in torch. Load again for the values of the file.
        """
        device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
        kwargs.pop("non_blocking", None)
        if kwargs:
            raise TypeError(f"to has no option {', '.join(kwargs)}")
        for argument in args:
            if (
                is_torch_dtype(argument)
                or isinstance(argument, np.dtype | type)
                or (isinstance(argument, str) and argument in ("float32", "float16", "bfloat16"))
            ):
                dtype = argument
            elif argument is not None:
                device = argument
        check_device(device)
        if dtype is not None:
            self._convert(dtype_name(dtype))
        return self

    def _convert(self, dtype: str) -> None:
        with self._lock:
            # Arithmetic is float32 always, so widening changes no value and needs no other copy of the weights.
            if dtype not in ("float32", self._core.dtype):
                if self._rounded:
                    self._core, self._converted = self._from_current(dtype)
                else:
                    self._core = _core.Model(self._files, self._core_config, dtype)
                self._rounded = True
            self._dtype = dtype

    def _from_current(self, dtype: str) -> tuple[_core.Model, tempfile.TemporaryDirectory[str]]:
        """A model of the weights as they are now, which an earlier conversion rounded away from the files."""
        folder = tempfile.TemporaryDirectory(prefix="blip2c-")
        path = Path(folder.name) / "model.safetensors"
        self._write_weights(path)
        return _core.Model([str(path)], self._core_config, dtype), folder

    def half(self) -> Blip2ForConditionalGeneration:
        """to(float16)."""
        return self.to(dtype="float16")

    def bfloat16(self) -> Blip2ForConditionalGeneration:
        """to(bfloat16)."""
        return self.to(dtype="bfloat16")

    def float(self) -> Blip2ForConditionalGeneration:
        """to(float32)."""
        return self.to(dtype="float32")

    def cpu(self) -> Blip2ForConditionalGeneration:
        """It is there already."""
        return self

    def cuda(self, device: Any = None) -> Blip2ForConditionalGeneration:
        """Raises UnsupportedError."""
        return self.to("cuda")

    def eval(self) -> Blip2ForConditionalGeneration:
        """It always is."""
        return self

    def train(self, mode: bool = True) -> Blip2ForConditionalGeneration:
        """train(False) is eval(); True raises UnsupportedError."""
        if mode:
            raise UnsupportedError("train(): this version of blip2c does not train")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Blip2ForConditionalGeneration:
        """False is what holds anyway; True raises UnsupportedError."""
        if requires_grad:
            raise UnsupportedError("requires_grad_(True): this version of blip2c does not train")
        return self

    def parameters(self, recurse: bool = True) -> Any:
        """Raises UnsupportedError: weights are packed in the C part. See `dtype`, `device`, `num_parameters`."""
        raise UnsupportedError(
            "parameters(): the weights live packed in the C part; use .dtype, .device, .num_parameters() or"
            " .save_pretrained(folder)"
        )

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the weights are, a tied head counted once."""
        unexpected = set(self._core.unexpected)
        sizes: dict[str, int] = {}
        for path in self._files:
            file = _core.SafetensorsFile(path)
            for name in file.names():
                if name not in unexpected:
                    sizes[name] = int(np.prod(file.info(name)[1], dtype=np.int64))
        if (
            self._core_config["text"]["tie_word_embeddings"]
            and "language_model.model.decoder.embed_tokens.weight" in sizes
        ):
            sizes.pop("language_model.lm_head.weight", None)
        return sum(sizes.values())

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None) -> None:
        """Nothing where the vocabulary has that size already; UnsupportedError where rows would be made up."""
        size = int(self._core_config["text"]["vocab_size"])
        wanted = size if new_num_tokens is None else int(new_num_tokens)
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != size:
            raise UnsupportedError(
                f"resize_token_embeddings: {wanted} tokens are asked for, the vocabulary has {size}; new rows would be"
                " random (checkpoints without an image token work as they are: the picture is put in front)"
            )

    def __copy__(self) -> Blip2ForConditionalGeneration:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _lock=threading.Lock())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Blip2ForConditionalGeneration:
        twin = copy.copy(self)  # weights are immutable, so they are shared
        memo[id(self)] = twin
        for name in ("config", "generation_config", "language_model"):
            setattr(twin, name, copy.deepcopy(getattr(self, name), memo))
        return twin

    def __getstate__(self) -> Any:
        raise TypeError(
            f"{type(self).__name__} can not be pickled: its weights live in the C part; call from_pretrained() in each"
            " process"
        )

    def get_memory_footprint(self) -> int:
        """Bytes of all weights as held."""
        return int(self._core.nbytes)

    # -- computing -----------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """See forward()."""
        return self.forward(*args, **kwargs)

    def forward(
        self,
        pixel_values: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """logits [B, T, V] of every position, with vision_outputs, qformer_outputs and language_model_outputs.

        pixel_values [B, 3, S, S]; input_ids [B, T] with num_query_tokens image tokens a row (without an image token in
        the config the queries go in front, and T grows by them); attention_mask [B, T]. NumPy results are float32;
        tensors have the model's dtype. return_dict=False gives a tuple. Raises as generate() does.
        """
        refuse_options("forward", options, FORWARD_OPTIONS)
        pixels = self._pixels(pixel_values)
        if input_ids is None:
            raise ValueError("input_ids must be given: forward() gives logits for them")
        rows = self._rows(input_ids, attention_mask, pixels.shape[0])
        check_positions(rows, self._positions)
        stages = self._core.encode_stages(pixels)
        out = self._core.forward(stages["image_features"], rows.ids, rows.offsets, rows.mask)
        like = _Like(pixel_values, self._dtype)
        logits = like.floats(out["logits"].reshape(pixels.shape[0], -1, out["logits"].shape[-1]))
        vision, qformer = self._stage_outputs(stages, like)
        result = ModelOutput(
            loss=None,
            logits=logits,
            vision_outputs=vision,
            qformer_outputs=qformer,
            language_model_outputs=ModelOutput(
                logits=logits, past_key_values=None, hidden_states=None, attentions=None
            ),
        )
        return result if return_dict is None or return_dict else result.to_tuple()

    def get_image_features(
        self,
        pixel_values: Any,
        interpolate_pos_encoding: bool | None = False,
        return_dict: bool | None = None,
        **options: Any,
    ) -> Any:
        """The projected queries as pooler_output [B, Q, D_lm]; last_hidden_state [B, T, Dv] is the vision model's.

        Beside them vision_outputs and qformer_outputs, as transformers 5.23 returns it.
        """
        options["interpolate_pos_encoding"] = interpolate_pos_encoding
        refuse_options("get_image_features", options, FORWARD_OPTIONS)
        like = _Like(pixel_values, self._dtype)
        stages = self._core.encode_stages(self._pixels(pixel_values))
        vision, qformer = self._stage_outputs(stages, like)
        result = ModelOutput(
            last_hidden_state=vision.last_hidden_state,
            pooler_output=like.floats(stages["image_features"]),
            hidden_states=None,
            attentions=None,
            vision_outputs=vision,
            qformer_outputs=qformer,
        )
        return result if return_dict is None or return_dict else result.to_tuple()

    def generate(
        self,
        pixel_values: Any,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        interpolate_pos_encoding: bool = False,
        **generate_kwargs: Any,
    ) -> Any:
        """Ids [B * num_return_sequences, T + new] int64: the prompt with its image tokens, then what was generated.

        Without input_ids the prompt is the image tokens and bos. Options: see `blip2c.generation.GenerationConfig`.
        Rows that end early are filled with the pad id. In checkpoints without an image token the result has no ids for
        the picture, but max_length counts it.

        Raises ValueError for inputs that do not fit (placeholders, sizes, masks, ids, positions), NumericError for
        pixels that are not finite, UnsupportedError for options that are not computed here.
        """
        refuse_options(
            "generate",
            {"inputs_embeds": inputs_embeds, "interpolate_pos_encoding": interpolate_pos_encoding},
            FORWARD_OPTIONS,
        )
        pixels = self._pixels(pixel_values)
        ids = self._start_ids(pixels.shape[0]) if input_ids is None else self._ids(input_ids)
        rows = self._rows(ids, attention_mask, pixels.shape[0])
        length = int(rows.offsets[1])
        options = self._options(generate_kwargs, [length])
        check_positions(rows, self._positions, new_tokens(options, length))
        features = self._core.encode(pixels)
        out = self._core.generate(features, rows.ids, rows.offsets, rows.mask, rows.rule_ids, options)
        prompts = np.repeat(ids, out["ids"].shape[0] // ids.shape[0], axis=0)
        sequences = np.concatenate([prompts, np.asarray(out["ids"], np.int64)], axis=1)
        return _Like(pixel_values, self._dtype).ids(sequences)

    # -- inside --------------------------------------------------------------------------------------------------

    @property
    def _positions(self) -> int:
        return int(self._core_config["text"]["max_position_embeddings"])

    @property
    def _image_token(self) -> int | None:
        # As it is now: scripts that bring old checkpoints up to date set it after loading.
        token = self.config.image_token_index
        vocabulary = int(self._core_config["text"]["vocab_size"])
        if token is None:
            return None
        if isinstance(token, bool) or not isinstance(token, int | np.integer) or not 0 <= token < vocabulary:
            raise ValueError(f"config.image_token_index must be None or in 0..{vocabulary - 1}, found {token!r}")
        return int(token)

    def _pixels(self, value: Any) -> NDArray[np.float32]:
        return check_pixels(value, int(self._core_config["vision"]["image_size"]))

    def _ids(self, value: Any) -> NDArray[np.int64]:
        return check_ids(value, int(self._core_config["text"]["vocab_size"]))

    def _rows(self, input_ids: Any, attention_mask: Any, pictures: int) -> PackedRows:
        ids = self._ids(input_ids)
        mask = None if attention_mask is None else check_mask(attention_mask, ids.shape)
        return pack(ids, mask, self._image_token, int(self._core_config["num_query_tokens"]), pictures)

    def _start_ids(self, batch: int) -> NDArray[np.int64]:
        bos = self.config.text_config.bos_token_id
        if bos is None:
            raise ValueError("input_ids must be given: the text config has no bos_token_id to start with")
        image = [] if self._image_token is None else [self._image_token] * int(self._core_config["num_query_tokens"])
        return np.tile(np.array([[*image, bos]], np.int64), (batch, 1))

    def _options(self, generate_kwargs: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, Any]:
        """generate()'s options as the C part takes them, over the language model's defaults; lengths of prompts."""
        return core_options(
            self.language_model.generation_config, generate_kwargs, lengths, max_positions=self._positions
        )

    @staticmethod
    def _stage_outputs(stages: Mapping[str, Any], like: _Like) -> tuple[ModelOutput, ModelOutput]:
        vision = ModelOutput(
            last_hidden_state=like.floats(stages["vision"]),
            pooler_output=like.floats(stages["pooled"]),
            hidden_states=None,
            attentions=None,
        )
        # transformers keeps the Q-Former in float32 under float16.
        queries = like.floats(stages["qformer"], keep=like.dtype == "float16")
        qformer = ModelOutput(
            last_hidden_state=queries,
            pooler_output=queries[:, 0, :],
            hidden_states=None,
            past_key_values=None,
            attentions=None,
            cross_attentions=None,
        )
        return vision, qformer

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name_or_path!r}, dtype={self._dtype}, {self._core.nbytes / 1e6:.1f} MB,"
            f" text={self.config.text_config.model_type})"
        )


class _Like:
    """Gives results back as what came in: tensors for a tensor, arrays for anything else."""

    def __init__(self, value: Any, dtype: str) -> None:
        self.torch = sys.modules["torch"] if is_torch(value) else None
        self.dtype = dtype

    def floats(self, array: NDArray[np.float32], keep: bool = False) -> Any:
        """float32 array; or a tensor of the model's dtype (float32 where `keep`)."""
        if self.torch is None:
            return array
        tensor = self.torch.from_numpy(np.ascontiguousarray(array))
        return tensor if keep or self.dtype == "float32" else tensor.to(getattr(self.torch, self.dtype))

    def ids(self, array: NDArray[np.int64]) -> Any:
        """int64 array or tensor."""
        return array if self.torch is None else self.torch.from_numpy(array)


def _stored_as(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """A weight for a file of `dtype` (bfloat16 as its bits in uint16), as narrow as that goes without losing a bit."""
    if dtype == "float32":
        if array.dtype == np.uint16:
            return (array.astype(np.uint32) << 16).view(np.float32)
        return array.astype(np.float32)
    if array.dtype != np.float32:
        return array
    if dtype == "float16":
        with np.errstate(over="ignore"):
            narrow: NDArray[Any] = array.astype(np.float16)
        return narrow if np.array_equal(narrow.astype(np.float32), array) else array
    bits = np.ascontiguousarray(array).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if not (bits & 0xFFFF).any() else array


def new_tokens(options: Mapping[str, Any], length: int) -> int:
    """By how many tokens a row of `length` may grow under options of core_options()."""
    bounds = [options["max_new_tokens"], None if options["max_length"] is None else options["max_length"] - length]
    return max(min(int(bound) for bound in bounds if bound is not None), 0)
