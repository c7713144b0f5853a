"""Stop strings: when has a row of tokens just said one of them?

A stop string counts when it ends within the row's last token: "stop" is found in ["st", "op"], ["las", "topper"] and
["st", "opera"], and not in ["stop", "at"], because there it would have been found a token earlier. Tokens are compared
as the bytes they stand for where the tokenizer is byte-level, so that a character cut in two is seen whole.
Source: transformers 5.23 `StopStringCriteria`, which computes the same from tables over the whole vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

# Tokenizers put spaces in front of a first token: tokens are spelled behind this text, which is cut off again.
FRONT = "abcdef"


class StopStrings:
    """Asks `ends(ids)` of rows of token ids.

    strings: a str or several. tokenizer: blip2c's or transformers'. Raises ValueError without a tokenizer or for
    anything but non-empty strings, TypeError for what is no tokenizer.
    """

    def __init__(self, strings: Any, tokenizer: Any) -> None:
        self.strings = [strings] if isinstance(strings, str) else list(strings) if isinstance(strings, Iterable) else []
        if not self.strings or not all(isinstance(string, str) and string for string in self.strings):
            raise ValueError(f"stop_strings: expected a string or strings, none of them empty, found {strings!r}")
        if tokenizer is None:
            raise ValueError(
                "There are one or more stop strings, either in the arguments to `generate` or in the model's generation"
                " config, but we could not locate a tokenizer. When generating with stop strings, you must pass the"
                " model's tokenizer to the `tokenizer` argument of `generate`."
            )
        if not callable(tokenizer) or not hasattr(tokenizer, "convert_ids_to_tokens"):
            raise TypeError(f"tokenizer: expected a tokenizer, found {type(tokenizer).__name__}")
        self._tokenizer = tokenizer
        self._mode = _decoder_kind(tokenizer)
        self._wanted = [string.encode() for string in self.strings]
        self._window = max(len(string) if self._mode is None else len(string.encode()) for string in self.strings)
        self._front = tokenizer.convert_ids_to_tokens(tokenizer(FRONT, add_special_tokens=False)["input_ids"])
        self._bytes = {byte: index for index, byte in _byte_level_letters().items()}
        self._texts: dict[int, bytes] = {}

    def ends(self, ids: Sequence[int]) -> bool:
        """Has the last of these ids just finished a stop string?"""
        pieces = [self._text(int(index)) for index in ids[-self._window :]]
        text = b"".join(pieces)
        before = len(text) - len(pieces[-1]) if pieces else 0
        return any(text.find(string, max(0, before - len(string) + 1)) >= 0 for string in self._wanted)

    def _text(self, index: int) -> bytes:
        if index not in self._texts:
            token = self._tokenizer.convert_ids_to_tokens(index)
            self._texts[index] = b"" if token is None else self._spelled(str(token))
        return self._texts[index]

    def _spelled(self, token: str) -> bytes:
        if self._mode == "ByteLevel" and all(letter in self._bytes for letter in token):
            return bytes(self._bytes[letter] for letter in token)
        if self._mode == "ByteFallback" and len(token) == 6 and token[:3] == "<0x" and token[5] == ">":
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                pass
        text = str(self._tokenizer.convert_tokens_to_string([*self._front, token]))
        return text[text.index(FRONT) + len(FRONT) :].encode()


def _byte_level_letters() -> dict[int, str]:
    """How byte-level BPE writes each byte: printable ones as they are, the others as letters from 256 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def _decoder_kind(tokenizer: Any) -> str | None:
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return None
    if type(decoder).__name__ == "ByteLevel":
        return "ByteLevel"
    try:
        state = json.loads(decoder.__getstate__())
    except (AttributeError, TypeError, ValueError):
        return None
    return next((kind for kind in ("ByteFallback", "ByteLevel") if _has_type(state, kind)), None)


def _has_type(state: Any, kind: str) -> bool:
    if isinstance(state, dict):
        return state.get("type") == kind or any(_has_type(value, kind) for value in state.values())
    return isinstance(state, list) and any(_has_type(value, kind) for value in state)
