"""`Blip2PreTrainedModel`: a checkpoint as a Python object: loading, saving, dtype, device, copies.

What the models of blip2c.modeling have in common. Options that are not computed here raise UnsupportedError naming the
option; none is silently dropped.
"""

from __future__ import annotations

import copy
import os
import re
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from blip2c import _core
from blip2c._core import CheckpointError, UnsupportedError
from blip2c.batch import dtype_name, is_torch_dtype
from blip2c.cache import open_model
from blip2c.checkpoint import PACKED_WEIGHTS, read_json, resolve_files
from blip2c.config import Blip2Config, core_config
from blip2c.devices import read_device
from blip2c.dtypes import QUANTISED, Dtype, read_dtype, warn_of_missing_instructions
from blip2c.generation import METADATA, NAMES, GenerationConfig
from blip2c.packed import check_packed, refuse_other_weights, write_packed

if TYPE_CHECKING:
    from typing_extensions import Self

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
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
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


def generation_options(text_config: Any) -> dict[str, Any]:
    """Options of generate() that stand in a language model's configuration."""
    return {name: text_config.get(name) for name in NAMES if name not in METADATA}


class Blip2PreTrainedModel:
    """What every model here is: immutable weights in the C part, its config, and the calls scripts make on a module.

    Made by `from_pretrained`. Weights are immutable and may be shared by threads.
    """

    main_input_name = "pixel_values"
    config_class: type[Blip2Config] = Blip2Config
    # Whether there is a language model, and with it generation options.
    _speaks: ClassVar[bool] = True
    # Beginnings of names that a file may hold and this class does without, as it says of itself.
    _leaves_out: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, config: Blip2Config, files: list[str], *, dtype: Dtype = "auto", cache: Any = None, device: Any = None
    ) -> None:
        """config: checked here. files: safetensors paths. dtype: see blip2c.dtypes. cache: see blip2c.cache.
        device: see blip2c.devices.
        """
        self.config = config
        self._core_config = self._core_of(config)
        self._files = [str(file) for file in files]
        self._cache = cache
        place = read_device(device)
        if place == "cpu":
            warn_of_missing_instructions(dtype, stacklevel=3)
        if [Path(file).name for file in self._files] == [PACKED_WEIGHTS]:
            check_packed(self._files[0], self._core_config)
            self._core = _core.Model(self._files, self._core_config, dtype, place)
        else:
            self._core = open_model(self._files, self._core_config, dtype, cache, place)
        self._held_as = dtype  # what the C part was last asked to hold the files' weights as
        # Keeps a folder of converted weights, where the files no longer hold the values (see `to`).
        self._converted: tempfile.TemporaryDirectory[str] | None = None
        # What it goes by. The C part holds matrices that were stored in half precision so, whatever is asked for.
        named = isinstance(dtype, str) and dtype != "auto" and dtype not in QUANTISED
        self._dtype = "float32" if self.is_quantized else str(dtype) if named else self._core.dtype
        self._rounded = dtype not in ("auto", "float32")
        self._lock = threading.Lock()
        self.training = False
        self.name_or_path = ""
        if self._speaks:
            self.generation_config = GenerationConfig.from_model_config(config.text_config)
            # What generate() takes its defaults from: language_model.generation_config.
            self._generation_defaults = GenerationConfig.from_model_config(config.text_config)
            self._text_options = generation_options(config.text_config)
        names = sorted(name for name in self._core.unexpected if not name.startswith(self._leaves_out))
        if names:
            shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
            warnings.warn(f"weights that this architecture does not have were left out: {shown}", stacklevel=3)

    @classmethod
    def _core_of(cls, config: Any) -> dict[str, Any]:
        """The checked numbers of a configuration that the C part needs for this class."""
        return core_config(config)

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
        cache: Any = None,
        **options: Any,
    ) -> Self:
        """Load a folder or Hub id; of the latter only json, txt and safetensors files are fetched.

        config: a Blip2Config (blip2c's or transformers') instead of the folder's config.json.
        dtype (torch_dtype): how matrices are held: None or "auto" as stored, else float32, float16, bfloat16, "int8" or
        "int4" (names, NumPy or torch dtypes), or a mapping from "vision", "qformer", "language" to those. Arithmetic is
        float32, but for bfloat16 by name and quantised weights; see docs/DTYPES.md. cache: whether a quantised model is
        kept packed for the next load; see blip2c.cache. revision, cache_dir, local_files_only, token,
        force_download, subfolder: as in huggingface_hub. device, device_map: "cpu" or "cuda", "cuda:1" ...: where the
        weights go and what computes (see blip2c.devices and docs/CUDA.md); device_map names one place for all.

        Raises FileNotFoundError or OSError where there is no checkpoint, CheckpointError where it is damaged or
        disagrees with its config, UnsupportedError (naming it) for an architecture or option that is not computed here.
        """
        from blip2c.hub import pop_hub_options, resolve

        hub = pop_hub_options(options)
        refuse_options("from_pretrained", options, LOADING_OPTIONS)
        place = read_device(device_map if device is None else device)
        requested = read_dtype(torch_dtype if dtype is None else dtype)
        folder = resolve(pretrained_model_name_or_path, **hub)
        if config is None:
            config = cls.config_class.from_pretrained(folder)
        elif not isinstance(config, cls.config_class):  # transformers' own
            if not hasattr(config, "to_dict"):
                raise TypeError(f"config must be a {cls.config_class.__name__}, found {type(config).__name__}")
            config = cls.config_class.from_dict(config.to_dict())
        cls._core_of(config)  # refuse what can not be computed before looking for its weights
        model = cls(config, [str(file) for file in resolve_files(folder)], dtype=requested, cache=cache, device=place)
        model.name_or_path = str(pretrained_model_name_or_path)
        file = folder / "generation_config.json"
        if cls._speaks and file.is_file():
            values = read_json(file)
            if not isinstance(values, dict):
                raise CheckpointError(f"{file}: expected an object, found {type(values).__name__}")
            model.generation_config = GenerationConfig.from_dict(values)
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Any) -> None:
        """Write config.json, generation_config.json and model.safetensors, which transformers loads.

        Shards of an earlier checkpoint in the folder are removed.

        Of a quantised model: its packed weights as they are (model.blip2c.safetensors), which blip2c loads;
        transformers says that it does not know this quantisation. What rounding took away can not be saved: for plain
        weights save the model that it was made from.
        """
        refuse_options("save_pretrained", options, {"safe_serialization": (None, True), "push_to_hub": (None, False)})
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        values = self.config.to_dict()
        values["architectures"] = [type(self).__name__]
        if self.is_quantized:
            refuse_other_weights(folder)
            write_packed(self._core, folder / PACKED_WEIGHTS, self._core_config)
            values["quantization_config"] = {"quant_method": "blip2c", **self.dtypes}
        else:
            if (folder / PACKED_WEIGHTS).exists():
                raise FileExistsError(f"{folder}: holds {PACKED_WEIGHTS}: one folder, one model")
            self._write_weights(folder / "model.safetensors")
            self._remove_shards(folder)
            values["dtype"] = self._dtype
        type(self.config).from_dict(values).save_pretrained(folder)
        if self._speaks:
            self.generation_config.save_pretrained(folder)

    def _remove_shards(self, folder: Path) -> None:
        """Takes away the shards of an earlier, larger checkpoint, as transformers does: two models in one folder."""
        stale = [folder / "model.safetensors.index.json"]
        stale += [file for file in folder.glob("model-*.safetensors") if SHARD.fullmatch(file.name)]
        for file in stale:
            file.unlink(missing_ok=True)
        # A later .half() reads again: what is gone is now in the file that was just written.
        with self._lock:
            if any(not Path(file).exists() for file in self._files):
                self._files = [str(folder / "model.safetensors")]

    def _write_weights(self, path: Path) -> None:
        weights = {name: _stored_as(array, self._dtype) for name, array in self._core.weights().items()}
        dtypes = {name: FILE_DTYPES[str(array.dtype)] for name, array in weights.items()}
        _core.write_safetensors(str(path), weights, dtypes, {"format": "pt"})

    # -- dtype and device ----------------------------------------------------------------------------------------

    @property
    def dtypes(self) -> dict[str, str]:
        """How the matrices of each part are held: {"vision": "int8", "qformer": "float16", "language": "int4"}."""
        return self._core.dtypes

    @property
    def is_quantized(self) -> bool:
        """Whether some part is held in int8 or int4."""
        return not set(self._core.dtypes.values()).isdisjoint(QUANTISED)

    @property
    def dtype(self) -> Any:
        """What the model goes by and gives tensors in: a torch.dtype where torch is loaded, else its name.

        float32 for a quantised model: what it takes and gives is not rounded. How it is held: `dtypes`.
        """
        torch = sys.modules.get("torch")
        return self._dtype if torch is None else getattr(torch, self._dtype)

    @property
    def device(self) -> Any:
        """Where the weights are and what computes: a torch.device where torch is loaded, else "cpu", "cuda:0" ..."""
        torch = sys.modules.get("torch")
        return self._core.device if torch is None else torch.device(self._core.device)

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """In place, as in torch: (device), (dtype), (device, dtype), keywords. Returns self.

        To another device the weights go from their files; the earlier ones are given back once nobody uses them.

        A conversion to a narrower dtype rounds the weights for good: `.half().float()` gives float32 matrices of
        float16 values, as in torch. Load again for the values of the file. Raises ValueError for a dtype where the
        model is quantised, as transformers does.
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
        place = None if device is None else read_device(device)
        if dtype is not None:
            self._convert(dtype_name(dtype))
        if place is not None:
            self._move(place)
        return self

    def _move(self, place: str) -> None:
        with self._lock:
            if place != self._core.device:
                packed = [Path(file).name for file in self._files] == [PACKED_WEIGHTS]
                cache = False if packed or self._converted is not None else self._cache
                files = self._files if self._converted is None else [str(self._file_in(self._converted))]
                self._core = open_model(files, self._core_config, self._held_as, cache, place)

    @staticmethod
    def _file_in(folder: tempfile.TemporaryDirectory[str]) -> Path:
        return Path(folder.name) / "model.safetensors"

    def _convert(self, dtype: str) -> None:
        if self.is_quantized:
            raise ValueError(
                f"a quantised model ({self._held()}) can not be converted to {dtype}: load the checkpoint again with"
                f" dtype={dtype!r}"
            )
        with self._lock:
            mixed = len(set(self._core.dtypes.values()) - {"float32"}) > 1
            # Arithmetic is float32, so widening changes no value and needs no other copy of the weights; but where
            # bfloat16 was asked for by name (pairs), arithmetic is in it too.
            if dtype == "float32" and "-pairs" in self._core.policies:
                self._core, self._converted = self._from_current("auto")
                self._held_as = "auto"
            elif dtype != "float32" and (dtype != self._core.dtype or mixed):
                if self._core.device == "cpu":
                    warn_of_missing_instructions(dtype, stacklevel=4)
                if self._rounded:
                    self._core, self._converted = self._from_current(dtype)
                else:
                    self._core = _core.Model(self._files, self._core_config, dtype, self._core.device)
                self._rounded = True
                self._held_as = dtype
            self._dtype = dtype

    def _from_current(self, dtype: str) -> tuple[_core.Model, tempfile.TemporaryDirectory[str]]:
        """A model of the weights as they are now, which an earlier conversion rounded away from the files."""
        folder = tempfile.TemporaryDirectory(prefix="blip2c-")
        path = self._file_in(folder)
        self._write_weights(path)
        return _core.Model([str(path)], self._core_config, dtype, self._core.device), folder

    def half(self) -> Self:
        """to(float16)."""
        return self.to(dtype="float16")

    def bfloat16(self) -> Self:
        """to(bfloat16)."""
        return self.to(dtype="bfloat16")

    def float(self) -> Self:
        """to(float32)."""
        return self.to(dtype="float32")

    def cpu(self) -> Self:
        """to("cpu")."""
        return self.to("cpu")

    def cuda(self, device: Any = None) -> Self:
        """to("cuda"), or to the CUDA device of that number or name."""
        return self.to("cuda" if device is None else device)

    def eval(self) -> Self:
        """It always is."""
        return self

    def train(self, mode: bool = True) -> Self:
        """train(False) is eval(); True raises UnsupportedError."""
        if mode:
            raise UnsupportedError("train(): this version of blip2c does not train")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """False is what holds anyway; True raises UnsupportedError."""
        if requires_grad:
            raise UnsupportedError("requires_grad_(True): this version of blip2c does not train")
        return self

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Any]]:
        """(name, weight) of every weight, made when it is asked for: copies in the model's dtype, which nothing reads.

        Tensors where torch is loaded, else read-only float32 arrays (float16 where they are held so). Quantised weights
        come widened. A tied head is left out, as in torch. UnsupportedError for recurse=False.
        """
        if not recurse:
            raise UnsupportedError("named_parameters(recurse=False): weights are given for the whole model only")
        torch = sys.modules.get("torch")
        for name in self._core.weight_names():
            array = self._core.weights(name)[name]
            if array.dtype == np.uint16:  # bfloat16 bits
                array = (array.astype(np.uint32) << 16).view(np.float32)
            # As transformers, which keeps the Q-Former in float32 under float16.
            keep = self._dtype == "float16" and name.startswith(("qformer.", "query_tokens"))
            array.flags.writeable = torch is not None
            yield (
                f"{prefix}.{name}" if prefix else name,
                array if torch is None else torch.from_numpy(array).to(torch.float32 if keep else self.dtype),
            )

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        """The weights of named_parameters(), one by one: next(model.parameters()) is cheap, a list of all is not."""
        for _, weight in self.named_parameters(recurse=recurse):
            yield weight

    def state_dict(self) -> dict[str, Any]:
        """All weights of named_parameters() at once: as much memory again as the model's dtype needs for them."""
        return dict(self.named_parameters())

    def num_parameters(self, only_trainable: bool = False) -> int:
        """How many numbers the weights are, a tied head counted once."""
        return self._core.parameters

    def resize_token_embeddings(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None) -> None:
        """Nothing where the vocabulary has that size already; UnsupportedError where rows would be made up."""
        size = int(self._core_config["text" if self._speaks else "qformer"]["vocab_size"])
        wanted = size if new_num_tokens is None else int(new_num_tokens)
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != size:
            raise UnsupportedError(
                f"resize_token_embeddings: {wanted} tokens are asked for, the vocabulary has {size}; new rows would be"
                " random (checkpoints without an image token work as they are: the picture is put in front)"
            )

    def __copy__(self) -> Self:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__, _lock=threading.Lock())
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = copy.copy(self)  # weights are immutable, so they are shared
        memo[id(self)] = twin
        names = ("config", "generation_config", "_generation_defaults") if self._speaks else ("config",)
        for name in names:
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

    def _held(self) -> str:
        return ", ".join(f"{part} {name}" for part, name in self.dtypes.items()) if self.is_quantized else self._dtype

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.name_or_path!r}, dtype={self._held()}, {self._core.nbytes / 1e6:.1f} MB"
            + (f", text={self.config.text_config.model_type})" if self._speaks else ")")
        )


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
