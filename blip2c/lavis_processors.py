"""What LAVIS calls processors: pictures to pixels, captions and questions to the form its models were trained on."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from blip2c._core import UnsupportedError
from blip2c.image_processing import BlipImageProcessor
from blip2c.images import load_image
from blip2c.outputs import Like

__all__ = ["CaptionProcessor", "ImageProcessor", "QuestionProcessor", "TrainingOnly", "load_processor"]

_DROPPED = '.!"()*#:;~'
_LONGEST = 50  # words
_MORE_THAN_ONE = re.compile(r"\s{2,}")


def _cut(text: str, words: int) -> str:
    parts = text.split(" ")
    return " ".join(parts[:words]) if len(parts) > words else text


class CaptionProcessor:
    """A caption in lower case, with . ! " ( ) * # : ; ~ and runs of blanks as one blank, of at most max_words words,
    behind `prompt` (upstream: LAVIS's "blip_caption")."""

    def __init__(self, prompt: str = "", max_words: int = _LONGEST) -> None:
        self.prompt, self.max_words = prompt, max_words

    def __call__(self, caption: str) -> str:
        return self.prompt + self.pre_caption(caption)

    def pre_caption(self, caption: str) -> str:
        """The same without the prompt."""
        plain = _checked(caption).lower().translate(dict.fromkeys(map(ord, _DROPPED), " "))
        return _cut(_MORE_THAN_ONE.sub(" ", plain).rstrip("\n").strip(" "), self.max_words)


class QuestionProcessor:
    """A question in lower case without . ! " ( ) * # : ; ~, of at most max_words words (upstream: "blip_question")."""

    def __init__(self, max_words: int = _LONGEST) -> None:
        self.max_words = max_words

    def __call__(self, question: str) -> str:
        plain = _checked(question).lower().translate(dict.fromkeys(map(ord, _DROPPED)))
        return _cut(plain.rstrip(" "), self.max_words)


class ImageProcessor:
    """A picture, squeezed to a square, as normalised pixels (upstream: "blip_image_eval")."""

    def __init__(self, image_size: int = 384) -> None:
        self._processor = BlipImageProcessor(size={"height": image_size, "width": image_size})

    def __call__(self, image: Any) -> Any:
        """float32 [3, S, S] of anything that blip2c.load_image() takes: a tensor where torch is loaded, else an array.

        Raises PictureError or FileNotFoundError.
        """
        pixels = self._processor(load_image(image), return_tensors="np")["pixel_values"][0]
        return Like.loaded("float32").floats(np.ascontiguousarray(pixels, np.float32))


class TrainingOnly:
    """Stands where LAVIS has a processor for training, which draws at random."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, item: Any) -> Any:
        raise UnsupportedError(f'{self.name}["train"] draws at random, for training: use {self.name}["eval"]')


def load_processor(name: str, cfg: dict[str, Any] | None = None) -> Any:
    """LAVIS's processor "blip_caption", "blip_question" or "blip_image_eval", with the options of cfg.

    Raises ValueError for another name, TypeError for another option.
    """
    kinds = {"blip_caption": CaptionProcessor, "blip_question": QuestionProcessor, "blip_image_eval": ImageProcessor}
    if name not in kinds:
        raise ValueError(f"name: expected one of {', '.join(kinds)}, found {name!r}")
    return kinds[name](**(cfg or {}))


def _checked(text: Any) -> str:
    if not isinstance(text, str):
        raise TypeError(f"a text must be a string, found {type(text).__name__}")
    return text
