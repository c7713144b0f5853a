"""Captions, questions and answers as packed token ids for the training.

All texts about one picture share one sequence: the 32 query embeddings come first, then
each text, which sees the queries and itself but not the other texts.  That costs a
fraction of one sequence per text and computes the same.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

import checkpoint
import scenes

IGNORED = -100
Segment = tuple[str, str]  # prompt, what is to follow


def segments(attributes: scenes.Attributes, rng: random.Random) -> list[Segment]:
    """The caption and most of the questions of a scene; sometimes a prompted caption."""
    caption = f" {scenes.caption(attributes)}"
    chosen = [("", caption)]
    for q in scenes.questions(attributes, rng):
        if q.kind != "color" or rng.random() < 0.4:
            chosen.append((checkpoint.question_prompt(q.text), f" {q.answer}"))
    if rng.random() < 0.15:
        chosen.append((rng.choice(checkpoint.PHRASES), caption))
    return chosen


def all_segments(scene: scenes.Scene) -> list[Segment]:
    """The caption and every question of a given scene."""
    asked = [(checkpoint.question_prompt(q.text), f" {q.answer}") for q in scene.questions]
    return [("", f" {scene.caption}"), *asked]


@dataclass
class Packed:
    """A batch of packed texts, each tensor ``[B, T]`` but the mask ``[B, 1, 32 + T, 32 + T]``.

    ``part`` numbers the text that a token belongs to (0: padding); ``targets`` is the
    token to be predicted there, or ``IGNORED``.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    part: torch.Tensor
    targets: torch.Tensor

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """What is added to the attention's scores: 0, or a very negative number."""
        batch, length = self.part.shape
        prefix = torch.zeros(batch, checkpoint.QUERIES, dtype=torch.long)
        part = torch.cat([prefix, self.part], 1)
        seen = (part[:, :, None] == part[:, None, :]) | (part[:, None, :] == 0)
        at = torch.arange(checkpoint.QUERIES + length)
        seen &= at[:, None] >= at[None, :]
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, -1e4)[:, None]


class Packer:
    """Turns segments into batches of token ids."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._encode: Callable[[str], list[int]] = functools.lru_cache(1 << 18)(self._encode_text)

    def _encode_text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    @functools.cached_property
    def names(self) -> tuple[torch.Tensor, ...]:
        """The tokens that name each layout's count, each colour and each object: ``[.., V]``.

        Only tokens that name nothing else.
        """
        counts = [(layout,) if layout in scenes.COUNT_WORDS.values() else () for layout in scenes.LAYOUTS]
        colours = [(colour,) for colour in scenes.COLOURS]
        things = [(t.name, t.one, t.several) for t in scenes.THINGS]
        tables = []
        for words in (counts, colours, things):
            table = torch.zeros(len(words), self._tokenizer.get_vocab_size(), dtype=torch.bool)
            for i, forms in enumerate(words):
                table[i, [token for form in forms for token in self._encode(f" {form}")]] = True
            tables.append(table & (table.sum(0) == 1))
        return tuple(tables)

    def excluded(self, possible: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """``[B, V]``: the tokens that name what training could not draw in a scene."""
        named = zip(possible, self.names, strict=True)
        return sum((~ok).float() @ table.float() for ok, table in named) > 0

    def _row(self, row: list[Segment]) -> tuple[list[int], list[int], list[int], list[int]]:
        ids, positions, part, targets = [], [], [], []
        for number, (prompt, wanted) in enumerate(row, 1):
            before, after = self._encode(prompt), self._encode(wanted)
            ids += [checkpoint.BOS, *before, *after]
            length = 1 + len(before) + len(after)
            positions += range(checkpoint.QUERIES, checkpoint.QUERIES + length)
            part += [number] * length
            targets += [IGNORED] * len(before) + [*after, checkpoint.EOS]
        return ids, positions, part, targets

    def __call__(self, rows: list[list[Segment]]) -> Packed:
        """Pack the texts of each picture into one row."""
        packed = [self._row(row) for row in rows]
        length = max(len(ids) for ids, *_ in packed)
        columns = []
        for column, fill in enumerate((checkpoint.PAD, 0, 0, IGNORED)):
            filled = [r[column] + [fill] * (length - len(r[column])) for r in packed]
            columns.append(torch.tensor(filled))
        return Packed(*columns)
