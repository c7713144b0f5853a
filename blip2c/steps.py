"""Hidden states and attention weights of every model call inside generate(), in transformers' tuples.

Source: transformers 5.23, generation/utils.py: one entry for each step, in it one for each layer. The first step is the
prompt's, of as many rows as run later (the beams, or sequences to return, of each prompt).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c.outputs import Like

F32 = NDArray[np.float32]


class Steps:
    """What the C part shows of one call of generate(): see() for each layer, end_step() after each model call.

    text: the language model's part of core_config(). batch prompts of equal length, running_rows of each.
    """

    def __init__(
        self, text: Mapping[str, Any], batch: int, running_rows: int, *, hidden_states: bool, attentions: bool
    ) -> None:
        self._heads = int(text["num_heads" if "num_heads" in text else "num_attention_heads"])
        self._window, self._slides = int(text.get("sliding_window", 0)), text.get("slides")
        self._batch, self._running_rows = batch, running_rows
        self._wanted = {"hidden": hidden_states, "attention": attentions}
        self.wants_weights = attentions
        self._seen: dict[tuple[str, str], dict[int, list[F32]]] = {}
        self._encoder: dict[str, tuple[F32, ...]] = {}
        self._steps: dict[tuple[str, str], list[tuple[F32, ...]]] = {}

    def see(self, kind: str, stage: str, layer: int, array: F32) -> None:
        """For the C part: "hidden" states [tokens, D] or "attention" weights, flat; prompts may come group by group."""
        self._seen.setdefault((kind, stage), {}).setdefault(layer, []).append(array)

    def end_step(self) -> None:
        """What was seen since the last call becomes one step."""
        joined = {key: [np.concatenate(layers[i]) for i in sorted(layers)] for key, layers in self._seen.items()}
        self._seen = {}
        is_first = not self._steps
        rows = self._batch * (1 if is_first else self._running_rows)
        for (kind, stage), arrays in joined.items():
            of_step = "decoder" if stage == "decoder_cross" else stage
            length = len(joined["hidden", of_step][0]) // rows
            shaped = self._hidden(arrays, rows) if kind == "hidden" else self._weights(arrays, rows, length, stage)
            if stage == "encoder":
                self._encoder[kind] = shaped
                continue
            if is_first:
                shaped = tuple(np.repeat(array, self._running_rows, axis=0) for array in shaped)
            self._steps.setdefault((kind, stage), []).append(shaped)

    def entries(self, like: Like, is_encoder_decoder: bool) -> dict[str, Any]:
        """Entries of generate()'s output by name, in its order; None where not wanted."""

        def steps(kind: str, stage: str) -> Any:
            if not self._wanted[kind]:
                return None
            return tuple(tuple(like.floats(a) for a in step) for step in self._steps[kind, stage])

        if not is_encoder_decoder:
            stage = "language_model"
            return {"attentions": steps("attention", stage), "hidden_states": steps("hidden", stage)}

        def encoder(kind: str) -> Any:
            return tuple(like.floats(a) for a in self._encoder[kind]) if self._wanted[kind] else None

        return {
            "encoder_attentions": encoder("attention"),
            "encoder_hidden_states": encoder("hidden"),
            "decoder_attentions": steps("attention", "decoder"),
            "cross_attentions": steps("attention", "decoder_cross"),
            "decoder_hidden_states": steps("hidden", "decoder"),
        }

    def _hidden(self, arrays: list[F32], rows: int) -> tuple[F32, ...]:
        """[rows, T, D] of each layer; what follows the final norm takes the place of what stands before it."""
        return tuple(array.reshape(rows, -1, array.shape[-1]) for array in [*arrays[:-2], arrays[-1]])

    def _weights(self, arrays: list[F32], rows: int, length: int, stage: str) -> tuple[F32, ...]:
        """[rows, H, length, keys] of each layer; a sliding layer's cache has forgotten what is out of sight."""
        shaped = [array.reshape(rows, self._heads, length, -1) for array in arrays]
        if stage == "language_model" and self._slides and self._steps:
            last = self._window - 1 + length
            shaped = [a[..., -last:] if slides else a for a, slides in zip(shaped, self._slides, strict=True)]
        return tuple(shaped)
