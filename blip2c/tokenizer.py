"""`Blip2Tokenizer`: text to ids and back through the `tokenizers` package, as transformers' fast tokenizers do.

It reads tokenizer.json (or vocab.json and merges.txt), tokenizer_config.json and special_tokens_map.json. Which special
tokens a text gets is said by the file's post-processor: OPT's puts </s> in front, T5's puts it behind.
"""

from __future__ import annotations

import json
import operator
import os
import threading
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from blip2c._core import CheckpointError, UnsupportedError
from blip2c.batch import BatchFeature
from blip2c.images import is_torch
from blip2c.tokenizer_classes import CLASS_OPTIONS, class_defaults, rebuild

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# From here on transformers takes a length for "no limit".
LARGE = int(1e20)
NO_LIMIT = int(1e30)

# What clean_up_tokenization_spaces replaces, in this order.
CLEANED = (
    (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
    (" 've", "'ve"), (" 're", "'re"),
)  # fmt: skip

# Options of transformers' __call__ whose other values would need what is not computed here.
REFUSED: dict[str, tuple[Any, ...]] = {
    "text_pair": (None,),
    "text_target": (None,),
    "text_pair_target": (None,),
    "is_split_into_words": (None, False),
    "return_overflowing_tokens": (None, False),
    "stride": (None, 0),
    "return_mm_token_type_ids": (None, False),
    "return_text_replacement_offsets": (None, False),
    "sanitize_control_tokens": (None, False),
}


def _added(value: Any) -> AddedToken | None:
    """A special token as tokenizer_config.json spells it: a string, or an object with flags."""
    if value is None:
        return None
    if isinstance(value, AddedToken):
        return value
    if isinstance(value, str):
        return AddedToken(value, normalized=False, special=True)
    if isinstance(value, Mapping) and isinstance(value.get("content"), str):
        flags = {k: bool(value[k]) for k in ("single_word", "lstrip", "rstrip", "normalized") if k in value}
        return AddedToken(value["content"], special=True, **flags)
    raise CheckpointError(f"tokenizer_config.json: a special token must be a string or an object, found {value!r}")


class Blip2Tokenizer:
    """A tokenizer from a tokenizer.json (upstream: GPT2Tokenizer, T5Tokenizer, ... over TokenizersBackend).

    Settable: padding_side, truncation_side, model_max_length, pad_token, bos_token, eos_token, unk_token.
    """

    model_input_names = ("input_ids", "attention_mask")
    is_fast = True

    def __init__(self, backend: Tokenizer, /, **config: Any) -> None:
        self.backend_tokenizer = backend
        # Padding and truncation are state of the backend: one text at a time may be encoded with it.
        self._lock = threading.Lock()
        self.init_kwargs = dict(config)
        self.padding_side: str = config.get("padding_side", "right")
        self.truncation_side: str = config.get("truncation_side", "right")
        self.clean_up_tokenization_spaces = bool(config.get("clean_up_tokenization_spaces", False))
        limit = config.get("model_max_length")
        self.model_max_length: int = NO_LIMIT if limit is None else int(limit)
        self._special: dict[str, AddedToken | None] = {name: _added(config.get(name)) for name in SPECIAL_TOKENS}
        self._extra = [_added(token) for token in _extra_tokens(config)]
        backend.no_padding()
        backend.no_truncation()
        known = backend.get_added_tokens_decoder().values()
        contents = {str(token) for token in known}
        missing = [t for t in [*self._special.values(), *self._extra] if t is not None and str(t) not in contents]
        if missing:
            backend.add_special_tokens(missing)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    # -- special tokens ------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        # bos_token, bos_token_id and so on, for every name in SPECIAL_TOKENS.
        special = self.__dict__.get("_special", {})
        if name in special:
            return None if special[name] is None else str(special[name])
        if name.endswith("_id") and name[:-3] in special:
            token = special[name[:-3]]
            return None if token is None else self.convert_tokens_to_ids(str(token))
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SPECIAL_TOKENS:
            self._special[name] = _added(value)
            if value is not None and self.backend_tokenizer.token_to_id(str(value)) is None:
                self.backend_tokenizer.add_special_tokens([self._special[name]])
            return
        if name in ("padding_side", "truncation_side") and value not in ("left", "right"):
            raise ValueError(f'{name} must be "left" or "right", found {value!r}')
        object.__setattr__(self, name, value)

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """Name to token, of those that are set."""
        return {name: str(token) for name, token in self._special.items() if token is not None}

    @property
    def all_special_tokens(self) -> list[str]:
        """Each special token once."""
        return list(dict.fromkeys([*self.special_tokens_map.values(), *(str(t) for t in self._extra)]))

    @property
    def all_special_ids(self) -> list[int]:
        """Their ids."""
        return [int(self.convert_tokens_to_ids(token)) for token in self.all_special_tokens]

    def add_tokens(self, tokens: Any, special_tokens: bool = False) -> int:
        """Append tokens to the vocabulary; returns how many were new."""
        listed = list(tokens) if isinstance(tokens, list | tuple) else [tokens]
        add = self.backend_tokenizer.add_special_tokens if special_tokens else self.backend_tokenizer.add_tokens
        return int(add(listed))

    # -- vocabulary ----------------------------------------------------------------------------------------------

    @property
    def vocab_size(self) -> int:
        """Number of tokens without the added ones."""
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=False))

    def __len__(self) -> int:
        return int(self.backend_tokenizer.get_vocab_size(with_added_tokens=True))

    def get_vocab(self) -> dict[str, int]:
        """Token to id, added ones included."""
        return dict(self.backend_tokenizer.get_vocab(with_added_tokens=True))

    vocab = property(get_vocab)

    def get_added_vocab(self) -> dict[str, int]:
        """Token to id of the added ones."""
        return {str(token): index for index, token in self.backend_tokenizer.get_added_tokens_decoder().items()}

    def convert_tokens_to_ids(self, tokens: Any) -> Any:
        """Id of a token, or ids of a list of them; unknown ones give unk_token_id."""
        if tokens is None:
            return None
        if isinstance(tokens, str):
            index = self.backend_tokenizer.token_to_id(tokens)
            if index is None and self._special["unk_token"] is not None:
                index = self.backend_tokenizer.token_to_id(str(self._special["unk_token"]))
            return index
        return [self.convert_tokens_to_ids(token) for token in tokens]

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Token of an id, or tokens of a list of them."""
        if isinstance(ids, int | np.integer):
            return self.backend_tokenizer.id_to_token(int(ids))
        skip = set(self.all_special_ids) if skip_special_tokens else set()
        return [self.backend_tokenizer.id_to_token(int(index)) for index in ids if int(index) not in skip]

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Text of tokens."""
        return str(self.backend_tokenizer.decoder.decode(list(tokens)))

    def tokenize(self, text: str, add_special_tokens: bool = False) -> list[str]:
        """Tokens of a text."""
        with self._lock:
            return list(self._encode_batch([text], add_special_tokens)[0].tokens)

    # -- text to ids ---------------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        add_special_tokens: bool = True,
        padding: Any = False,
        truncation: Any = None,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: Any = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool | None = None,
        return_special_tokens_mask: bool = False,
        return_offsets_mapping: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        **options: Any,
    ) -> BatchFeature:
        """input_ids and attention_mask of one text (flat lists) or of several (a list each).

        padding: False, True or "longest", "max_length". truncation: None, False, True or "longest_first".
        Raises ValueError for what is contradictory and UnsupportedError for what is not computed.
        """
        for name, value in options.items():
            if name not in REFUSED:
                raise TypeError(f"tokenizer has no option {name}")
            if value not in REFUSED[name]:
                raise UnsupportedError(f"tokenizer option {name}={value!r} is not supported")
        single = isinstance(text, str)
        texts = [text] if isinstance(text, str) else list(text)
        for row, item in enumerate(texts):
            if not isinstance(item, str):
                raise ValueError(f"text {row} must be a string, found {type(item).__name__}")
            try:
                item.encode()
            except UnicodeEncodeError as error:
                raise ValueError(f"text {row} is not Unicode: {error.reason} at character {error.start}") from None
        pad, cut, length = self._strategies(padding, truncation, max_length, pad_to_multiple_of)
        with self._lock:
            try:
                self._configure(pad, cut, length, pad_to_multiple_of, padding_side)
                encodings = self._encode_batch(texts, add_special_tokens)
            finally:
                self.backend_tokenizer.no_padding()
                self.backend_tokenizer.no_truncation()
        if verbose and length is None and any(len(e.ids) > self.model_max_length for e in encodings):
            warnings.warn(f"a text is longer than model_max_length {self.model_max_length}", stacklevel=2)
        data: dict[str, Any] = {"input_ids": [e.ids for e in encodings]}
        if return_token_type_ids:
            data["token_type_ids"] = [e.type_ids for e in encodings]
        if return_attention_mask is None or return_attention_mask:
            data["attention_mask"] = [e.attention_mask for e in encodings]
        if return_special_tokens_mask:
            data["special_tokens_mask"] = [e.special_tokens_mask for e in encodings]
        if return_offsets_mapping:
            data["offset_mapping"] = [e.offsets for e in encodings]
        if return_length:
            data["length"] = [len(e.ids) for e in encodings]
        if single and return_tensors is None:
            data = {key: value[0] for key, value in data.items()}
        return BatchFeature(data, tensor_type=return_tensors)

    def encode(self, text: str, **options: Any) -> Any:
        """Ids of one text: a list, or [1, T] with return_tensors."""
        return self(text, **options)["input_ids"]

    def _encode_batch(self, texts: list[str], add_special_tokens: bool) -> list[Any]:
        return list(self.backend_tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens))

    def _strategies(
        self, padding: Any, truncation: Any, max_length: int | None, multiple: int | None
    ) -> tuple[str, str, int | None]:
        """What padding, truncation and max_length mean together (transformers: _get_padding_truncation_strategies)."""
        padding = getattr(padding, "value", padding)
        truncation = getattr(truncation, "value", truncation)
        if max_length is not None and padding is False and truncation is None:
            truncation = "longest_first"
        pad = "do_not_pad" if padding is False or padding is None else "longest" if padding is True else padding
        cut = "longest_first" if truncation is True else truncation or "do_not_truncate"
        if pad not in ("do_not_pad", "longest", "max_length"):
            raise ValueError(f'padding must be True, False, "longest" or "max_length", found {padding!r}')
        if cut not in ("do_not_truncate", "longest_first", "only_first", "only_second"):
            raise ValueError(f'truncation must be True, False or "longest_first", found {truncation!r}')
        if padding is True and max_length is not None and cut == "do_not_truncate":
            warnings.warn('max_length does nothing with padding=True; use padding="max_length"', stacklevel=4)
        if max_length is None and self.model_max_length > LARGE:
            pad = "do_not_pad" if pad == "max_length" else pad
            cut = "do_not_truncate"
        elif max_length is None and (pad == "max_length" or cut != "do_not_truncate"):
            max_length = self.model_max_length
        if pad != "do_not_pad" and self._special["pad_token"] is None:
            raise ValueError("padding was asked for, but the tokenizer has no pad_token")
        both = pad != "do_not_pad" and cut != "do_not_truncate"
        if both and multiple is not None and max_length is not None and max_length % multiple:
            raise ValueError(f"max_length {max_length} is not a multiple of pad_to_multiple_of {multiple}")
        return pad, cut, max_length

    def _configure(self, pad: str, cut: str, length: int | None, multiple: int | None, side: str | None) -> None:
        if side not in (None, "left", "right"):
            raise ValueError(f'padding_side must be "left" or "right", found {side!r}')
        if cut != "do_not_truncate":
            if length is None or length < 0:
                raise ValueError(f"max_length must be positive, found {length}")
            self.backend_tokenizer.enable_truncation(length, stride=0, strategy=cut, direction=self.truncation_side)
        if pad != "do_not_pad":
            self.backend_tokenizer.enable_padding(
                length=length if pad == "max_length" else None,
                direction=side or self.padding_side,
                pad_id=self.pad_token_id,
                pad_token=self.pad_token,
                pad_to_multiple_of=multiple,
            )

    # -- ids to text ---------------------------------------------------------------------------------------------

    def decode(
        self, token_ids: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> Any:
        """Text of one row of ids [T] (or one id), or texts of rows [B, T].

        clean_up_tokenization_spaces (None: as the files say) takes away spaces before punctuation; it is without effect
        on BPE, as in transformers 5.23, where it would take away spaces that belong to the text.
        """
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        clean = clean and not isinstance(self.backend_tokenizer.model, models.BPE)
        ids = _as_lists(token_ids)
        if isinstance(ids, int):
            ids = [ids]
        if ids and isinstance(ids[0], list | tuple):
            return [self._decode_row(row, skip_special_tokens, clean) for row in ids]
        return self._decode_row(ids, skip_special_tokens, clean)

    def batch_decode(
        self, sequences: Any, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool | None = None
    ) -> list[str]:
        """Texts of rows of ids [B, T]."""
        texts = self.decode(sequences, skip_special_tokens, clean_up_tokenization_spaces)
        return [texts] if isinstance(texts, str) else list(texts)

    def _decode_row(self, row: Sequence[int], skip_special_tokens: bool, clean: bool) -> str:
        ids = [operator.index(index) for index in row]
        for index in ids:
            if index < 0:
                raise ValueError(f"token id {index} is negative")
        text = str(self.backend_tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))
        for spaced, tight in CLEANED if clean else ():
            text = text.replace(spaced, tight)
        return text

    # -- files ---------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str], **options: Any) -> Blip2Tokenizer:
        """From a folder or Hub id. Raises FileNotFoundError, or CheckpointError naming what is damaged.

        The class is that of tokenizer_config.json, else that of config.json; where neither names one, tokenizer.json
        is taken as it is (transformers takes any tokenizer of a BLIP-2 for GPT-2's then, and garbles others).
        """
        from blip2c.hub import pop_hub_options, resolve

        folder = resolve(path_or_id, weights=False, **pop_hub_options(options))
        return cls._from_folder(folder, options)

    @classmethod
    def _from_folder(cls, folder: Path, options: Mapping[str, Any]) -> Blip2Tokenizer:
        config = _read_optional(folder / "tokenizer_config.json")
        # Files since transformers 4.34 list every added token in the config; older ones in special_tokens_map.json.
        if "added_tokens_decoder" not in config:
            config.update(_read_optional(folder / "special_tokens_map.json"))
        if not config.get("tokenizer_class"):
            config["tokenizer_class"] = _read_optional(folder / "config.json").get("tokenizer_class")
        config = {**class_defaults(config), **config, **options}
        if (folder / "tokenizer.json").is_file():
            try:
                # Not from_file(): it takes no path that is not UTF-8.
                backend = Tokenizer.from_buffer((folder / "tokenizer.json").read_bytes())
            except Exception as error:  # the package raises bare Exception
                raise CheckpointError(f"{folder / 'tokenizer.json'}: {error}") from None
            rebuild(backend, config)
        elif (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
            backend = _from_vocabulary(folder, config)
            config["tokenizer_class"] = config["tokenizer_class"] or "GPT2Tokenizer"
        else:
            raise FileNotFoundError(f"{folder}: no tokenizer.json, nor vocab.json with merges.txt")
        for index, token in sorted((int(k), v) for k, v in (config.get("added_tokens_decoder") or {}).items()):
            _check_added(backend, index, token, folder)
        return cls(backend, **config)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers reads."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self.backend_tokenizer.to_str(pretty=True), encoding="utf-8")
        config: dict[str, Any] = {
            **self.special_tokens_map,
            "tokenizer_class": self.init_kwargs.get("tokenizer_class") or "PreTrainedTokenizerFast",
            "model_max_length": self.model_max_length,
            "padding_side": self.padding_side,
            "truncation_side": self.truncation_side,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            **{name: self.init_kwargs[name] for name in CLASS_OPTIONS if name in self.init_kwargs},
            "processor_class": "Blip2Processor",
        }
        if self._extra:
            config["extra_special_tokens"] = [str(token) for token in self._extra]
        text = json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        return (
            f"Blip2Tokenizer(vocab_size={self.vocab_size}, model_max_length={self.model_max_length},"
            f" padding_side={self.padding_side!r}, special_tokens={self.special_tokens_map})"
        )


def _extra_tokens(config: Mapping[str, Any]) -> list[Any]:
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    return list(extra.values()) if isinstance(extra, Mapping) else list(extra)


def _read_optional(path: Path) -> dict[str, Any]:
    from blip2c.checkpoint import read_object

    return read_object(path) if path.is_file() else {}


def _check_added(backend: Tokenizer, index: int, token: Any, folder: Path) -> None:
    """A token that tokenizer_config.json adds with its id: append it, or make sure that it has that id."""
    added = _added(token)
    content = str(added)
    special = bool(token.get("special", True)) if isinstance(token, Mapping) else True
    if backend.token_to_id(content) is None:
        (backend.add_special_tokens if special else backend.add_tokens)([added])
    if backend.token_to_id(content) != index:
        raise CheckpointError(
            f"{folder}: tokenizer_config.json gives token {content!r} id {index},"
            f" the vocabulary gives it {backend.token_to_id(content)}"
        )


def _from_vocabulary(folder: Path, config: Mapping[str, Any]) -> Tokenizer:
    try:
        model = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:
        raise CheckpointError(f"{folder}: vocab.json with merges.txt: {error}") from None
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()
    bos = _added(config.get("bos_token"))
    if config.get("add_bos_token") and bos is not None:
        index = backend.token_to_id(str(bos))
        if index is None:
            raise CheckpointError(f"{folder}: bos_token {str(bos)!r} is not in vocab.json")
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(str(bos), index)]
        )
    return backend


def _as_lists(value: Any) -> Any:
    """ids of any kind (arrays, tensors, integers) as lists of Python integers."""
    if is_torch(value):
        return value.detach().cpu().tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.integer):
        return int(value)
    if isinstance(value, Mapping | BatchFeature):
        return _as_lists(value["input_ids"])
    if isinstance(value, list | tuple):
        return [item if isinstance(item, int) else _as_lists(item) for item in value]
    return value
