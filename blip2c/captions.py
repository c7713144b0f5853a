"""`Caption` and `Captions`: what a model says about pictures, as strings that also know why."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from blip2c.images import is_torch

__all__ = ["Caption", "Captions", "picture_name"]


class Caption(str):
    """A caption or an answer: a string that also knows its token ids and, where it is empty or cut off, why.

    ids: the new tokens. finished: whether the model ended it itself (eos) rather than max_new_tokens.
    reason: None, or why it is empty.
    """

    ids: list[int]
    finished: bool
    reason: str | None

    def __new__(cls, text: str, ids: Sequence[int] = (), finished: bool = True) -> Caption:
        self = super().__new__(cls, text)
        self.ids = list(ids)
        self.finished = finished
        self.reason = None if text else _why_empty(self.ids, finished)
        return self

    def __reduce__(self) -> Any:
        return Caption, (str(self), self.ids, self.finished)


def _why_empty(ids: Sequence[int], finished: bool) -> str:
    if not ids:
        return "no token was asked for"
    if finished and len(ids) == 1:
        return "the model ended its text with its first token"
    return f"the model wrote only special tokens or spaces ({len(ids)} tokens: {', '.join(map(str, ids[:8]))})"


class Captions(list[Any]):
    """Captions of several pictures, in order; errors="return" puts the exception where a picture failed.

    With num_return_sequences each picture has several: Captions again. Prints as one line a caption. names: what the
    pictures were called.
    """

    def __init__(self, items: Iterable[Any], names: Sequence[str]) -> None:
        super().__init__(items)
        self.names = list(names)

    def __str__(self) -> str:
        lines = [
            f"{name}: {f'[{type(text).__name__}: {text}]' if isinstance(text, Exception) else text}"
            for name, item in zip(self.names, self, strict=True)
            for text in (item if isinstance(item, Captions) else [item])
        ]
        return "\n".join(lines)


def picture_name(picture: Any, index: int) -> str:
    """What to call a picture in a list: its path, or its number and kind."""
    if isinstance(picture, str | os.PathLike):
        return str(os.fspath(picture))
    for attribute in ("filename", "name"):
        given = getattr(picture, attribute, None)
        if isinstance(given, str) and given:
            return given
    kind = "tensor" if is_torch(picture) else "array" if isinstance(picture, np.ndarray) else "picture"
    return f"{kind} {index}"
