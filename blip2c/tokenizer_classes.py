"""What a tokenizer's class makes of its file: some of transformers' classes take only vocabulary, merges and the
post-processor (and T5's the character map) from tokenizer.json and build the rest anew, whatever the file says.

Source: transformers 5.23, BertTokenizer, GPT2Tokenizer, LlamaTokenizer, T5Tokenizer and
`TokenizersBackend.convert_to_native_format`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

__all__ = ["CLASS_OPTIONS", "class_defaults", "rebuild"]

SPACE = "\u2581"
# What a class says where tokenizer_config.json does not.
DEFAULTS: dict[str, dict[str, Any]] = {"LlamaTokenizer": {"padding_side": "left"}}
# Entries of tokenizer_config.json that classes read.
CLASS_OPTIONS = ("add_prefix_space", "legacy", "do_lower_case", "strip_accents", "tokenize_chinese_chars")


def _name(config: Mapping[str, Any]) -> str:
    return str(config.get("tokenizer_class") or "").removesuffix("Fast")


def class_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the class that tokenizer_config.json names."""
    return dict(DEFAULTS.get(_name(config), {}))


def rebuild(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    """Replaces what the class that `config` (tokenizer_config.json) names builds anew; other classes obey the file."""
    kind, build = CLASSES.get(_name(config), (None, None))
    if kind is not None and build is not None and isinstance(backend.model, kind):
        build(backend, config)


def _set_model(backend: Tokenizer, **values: Any) -> None:
    """Of a BPE; what is not known has no token of its own there."""
    model = backend.model
    for name, value in {"unk_token": None, "dropout": None, **values}.items():
        setattr(model, name, value)
    backend.model = model


def _gpt2(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    _set_model(backend, byte_fallback=False, fuse_unk=False)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space", False)))
    backend.decoder = decoders.ByteLevel()


def _llama(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if config.get("legacy", False) else "first"
    _set_model(backend, byte_fallback=True, fuse_unk=True)
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _bert(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")


def _t5(backend: Tokenizer, config: Mapping[str, Any]) -> None:
    backend.normalizer = _character_map(backend)
    pieces = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pieces])
    backend.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)


def _character_map(backend: Tokenizer) -> Any:
    """The file's Precompiled normalizer, alone or the first in a sequence; None where there is none."""
    if backend.normalizer is None:
        return None
    state = json.loads(backend.normalizer.__getstate__())
    for part in state["normalizers"] if state.get("type") == "Sequence" else [state]:
        if part.get("type") == "Precompiled":
            alone = normalizers.Sequence([])
            alone.__setstate__(json.dumps({"type": "Sequence", "normalizers": [part]}).encode())
            return alone
    return None


CLASSES: dict[str, tuple[type, Callable[[Tokenizer, Mapping[str, Any]], None]]] = {
    "BertTokenizer": (models.WordPiece, _bert),
    "GPT2Tokenizer": (models.BPE, _gpt2),
    "LlamaTokenizer": (models.BPE, _llama),
    "T5Tokenizer": (models.Unigram, _t5),
}
