"""Fresh scenes for the training, drawn by another process, and the pools they go into."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

import checkpoint
import scenes

Drawn = tuple[np.ndarray, np.ndarray, np.ndarray, list[scenes.Attributes | None]]


def shrink(image: Image.Image) -> Image.Image:
    """Resize a picture as the model's image processor does."""
    size = (scenes.SIZE, scenes.SIZE)
    return image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)


def _draw_one(rng: random.Random, collages: float) -> tuple[Image.Image, np.ndarray, scenes.Attributes | None]:
    if rng.random() < collages:
        return *scenes.collage(rng), None
    scale = rng.choices((1, 2, 3), (85, 10, 5))[0]
    drawn = scenes.scene(rng, "train", scale)
    return shrink(drawn.image), drawn.patches, drawn.attributes


def draw_batch(rng: random.Random, number: int, collages: float) -> Drawn:
    """Pixels ``[n, 112, 112, 3]``, patch labels ``[n, 64]``, attributes ``[n, 4]`` (or -1)."""
    drawn = [_draw_one(rng, collages) for _ in range(number)]
    pixels = np.stack([np.asarray(image) for image, _, _ in drawn])
    patches = np.stack([p.reshape(-1) for _, p, _ in drawn]).astype(np.uint8)
    attributes = [a for _, _, a in drawn]
    numbers = np.array([(-1,) * 4 if a is None else a.indices() for a in attributes], np.int16)
    return pixels, patches, numbers, attributes


def _draw_forever(queue: Any, seed: int, number: int, collages: float) -> None:
    rng = random.Random(seed)
    while True:
        queue.put(draw_batch(rng, number, collages))


class Feed:
    """A process that draws batches of training scenes ahead of their use."""

    def __init__(self, seed: int, number: int, collages: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue = context.Queue(maxsize=8)
        arguments = (self._queue, seed, number, collages)
        self._process = context.Process(target=_draw_forever, args=arguments, daemon=True)

    def __enter__(self) -> Callable[[], Drawn]:
        self._process.start()
        return self._queue.get

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.join()


def possible(attributes: list[scenes.Attributes | None]) -> tuple[torch.Tensor, ...]:
    """What ``scenes.possible`` says of each scene: ``[n, 6], [n, 8], [n, 100]``."""
    columns = zip(*(scenes.possible(a) for a in attributes), strict=True)
    return tuple(torch.from_numpy(np.stack(column)) for column in columns)


@dataclass
class Pool:
    """The newest scenes seen, up to a limit; batches are drawn from all of them."""

    inputs: np.ndarray
    patches: np.ndarray
    numbers: np.ndarray
    attributes: list[scenes.Attributes | None]
    added: int = 0

    @classmethod
    def empty(cls, limit: int, shape: tuple[int, ...], dtype: type) -> Pool:
        """A pool for ``limit`` scenes whose inputs (pixels or features) have this shape."""
        patches = np.zeros((limit, scenes.GRID**2), np.uint8)
        numbers = np.zeros((limit, 4), np.int16)
        return cls(np.zeros((limit, *shape), dtype), patches, numbers, [None] * limit)

    def add(self, inputs: np.ndarray, drawn: Drawn) -> None:
        """Put fresh scenes in the place of the oldest."""
        for i in range(len(inputs)):
            at = self.added % len(self.attributes)
            self.inputs[at], self.patches[at], self.numbers[at] = inputs[i], drawn[1][i], drawn[2][i]
            self.attributes[at] = drawn[3][i]
            self.added += 1

    def add_pixels(self, drawn: Drawn) -> None:
        """Put fresh scenes in as they are."""
        self.add(drawn[0], drawn)

    def labels(self, at: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Patch labels ``[n, 64]`` and the scenes' labels ``[n, 4]`` of a batch."""
        return torch.from_numpy(self.patches[at]).long(), torch.from_numpy(self.numbers[at]).long()

    def possible(self, at: np.ndarray) -> tuple[torch.Tensor, ...]:
        """For each scene of a batch what ``scenes.possible`` says: ``[n, 6], [n, 8], [n, 100]``."""
        return possible([self.attributes[i] for i in at])

    def draw(self, rng: np.random.Generator, number: int) -> np.ndarray:
        """Indices of a random batch."""
        return rng.integers(0, min(self.added, len(self.attributes)), number)


_MEAN = torch.tensor(checkpoint.MEAN)
_STD = torch.tensor(checkpoint.STD)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """``[n, 112, 112, 3]`` bytes to ``[n, 3, 112, 112]`` as the image processor does it."""
    return ((torch.from_numpy(pixels).float() / 255 - _MEAN) / _STD).permute(0, 3, 1, 2).contiguous()
