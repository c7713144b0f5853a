"""From the arrays and tensors that callers hand over to the packed rows that the C part computes, with every check.

transformers is silently blind where an input does not fit: it drops pictures without placeholders, shifts features into
the wrong row, truncates position embeddings. Here each of these raises and names the row, what was found and expected.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip2c import _core
from blip2c._core import DeviceArray, NumericError
from blip2c.config import MAX_IMAGE_TOKENS
from blip2c.images import is_torch


class PackedRows(NamedTuple):
    """Rows of a prompt, one after another: row b is ids[offsets[b]:offsets[b + 1]].

    ids [N]: -1 where the next image feature goes. mask [N]: 0 is a pad; None where nothing is padded. rule_ids [N]:
    what repetition and n-gram rules see (the image token where ids has -1, or -1 where the checkpoint has none).
    """

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    mask: NDArray[np.uint8] | None
    rule_ids: NDArray[np.int32]


class DecoderRows(NamedTuple):
    """What an encoder-decoder has written so far, packed as PackedRows are; shown [B, T] are the same ids as given."""

    ids: NDArray[np.int32]
    offsets: NDArray[np.int64]
    mask: NDArray[np.uint8] | None
    shown: NDArray[np.int64]


# DLPack's kinds of memory.
_ON_HOST, _ON_CUDA, _PINNED, _MANAGED = 1, 2, 3, 13

Floats = NDArray[np.float32] | DeviceArray
"""float32 on the host, or on the model's device."""


class _FromDevice:
    """What another device holds, as something on the host that NumPy reads: its owner makes the copy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __dlpack_device__(self) -> tuple[int, int]:
        return _ON_HOST, 0

    def __dlpack__(self, **options: Any) -> Any:
        return self.value.__dlpack__(dl_device=(_ON_HOST, 0), copy=True)


def to_numpy(value: Any) -> NDArray[Any]:
    """An array of an array, list or tensor; bfloat16 tensors, which NumPy has no type for, become float32.

    What lies on another device comes to the host, through torch or through DLPack (of 2023 or later); arrays on the
    host are read where they lie.
    """
    if is_torch(value):
        tensor = value.detach().cpu()
        return np.asarray(tensor.float().numpy() if str(tensor.dtype) == "torch.bfloat16" else tensor.numpy())
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        return np.from_dlpack(value if value.__dlpack_device__()[0] in (_ON_HOST, _PINNED) else _FromDevice(value))
    return np.asarray(value)


def is_on_cuda(value: Any) -> bool:
    """Whether its elements are in the memory of a CUDA device, as far as DLPack can say it."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return False
    return int(value.__dlpack_device__()[0]) in (_ON_CUDA, _MANAGED)


def given_floats(value: Any, core: _core.Model | None, name: str) -> NDArray[Any] | DeviceArray:
    """What a caller hands over: where it lies, where that is the device of `core`; else as to_numpy() has it.

    Float tensors of any dtype and layout become float32 on the device. Raises ValueError for one on another device than
    the model's, TypeError for what holds no floats.
    """
    if core is None or core.device == "cpu" or not is_on_cuda(value):
        return to_numpy(value)
    return core.take(value.detach() if is_torch(value) else value, name)


def in_order(value: NDArray[Any] | DeviceArray, name: str, what: str = "row") -> Floats:
    """float32, C-contiguous; NumericError of the first entry on the host that is not finite; a device looks itself."""
    if isinstance(value, DeviceArray):
        return value
    array = np.ascontiguousarray(value, dtype=np.float32)
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        raise NumericError(f"{name}: {what} {int(np.argmin(finite))} holds values that are not finite")
    return array


def joined(arrays: Sequence[Any], axis: int) -> Any:
    """Beside each other along an axis, on the device where one of them is there."""
    if all(isinstance(a, DeviceArray) for a in arrays):
        return _core._join(tuple(arrays), axis)
    return np.concatenate([to_numpy(a) for a in arrays], axis=axis)


def check_pixels(value: Any, image_size: int, patch: int | None = None, core: _core.Model | None = None) -> Any:
    """pixel_values as C-contiguous float32 [B, 3, S, S]; with a patch side: of any height and width of at least that.

    With the model's `core` they stay on its device where they are there.

    Raises TypeError, ValueError or NumericError (NaN).
    """
    if value is None:
        raise ValueError("pixel_values must be given")
    pixels = given_floats(value, core, "pixel_values")
    if not np.issubdtype(pixels.dtype, np.floating):
        raise TypeError(f"pixel_values must be floats (the processor's), found {pixels.dtype}")
    if pixels.ndim != 4 or pixels.shape[1] != 3:
        raise ValueError(f"pixel_values must be [batch, 3, height, width], found shape {pixels.shape}")
    if pixels.shape[0] == 0:
        raise ValueError("pixel_values is an empty batch")
    height, width = pixels.shape[2:]
    if patch is None and (height, width) != (image_size, image_size):
        raise ValueError(
            f"pixel_values are {height}x{width}, this model takes {image_size}x{image_size}"
            " (interpolate_pos_encoding=True: any size)"
        )
    if patch is not None and (min(height, width) < patch or (height // patch) * (width // patch) > MAX_IMAGE_TOKENS):
        raise ValueError(
            f"pixel_values are {height}x{width}, expected at least {patch}x{patch}, at most {MAX_IMAGE_TOKENS} patches"
        )
    return in_order(pixels, "pixel_values", "picture")


def check_embeds(value: Any, shape: tuple[int | None, int], name: str, core: _core.Model | None = None) -> Any:
    """Embeddings [B, *shape] as C-contiguous float32; None: any length. Raises TypeError, ValueError, NumericError.

    With the model's `core` they stay on its device where they are there.
    """
    embeds = given_floats(value, core, name)
    if not np.issubdtype(embeds.dtype, np.floating):
        raise TypeError(f"{name} must be floats, found {embeds.dtype}")
    fits = embeds.ndim == 3 and embeds.shape[2] == shape[1] and shape[0] in (None, embeds.shape[1])
    if not fits or 0 in embeds.shape:
        length = "length" if shape[0] is None else shape[0]
        raise ValueError(f"{name} must be [batch, {length}, {shape[1]}], found shape {embeds.shape}")
    return in_order(embeds, name)


def check_labels(value: Any, vocabulary: int, ignore_index: int) -> NDArray[np.int64]:
    """labels [B, T], each below the vocabulary or ignore_index. Raises TypeError or ValueError."""
    labels = to_numpy(value)
    if not np.issubdtype(labels.dtype, np.integer):
        raise TypeError(f"labels must be integers, found {labels.dtype}")
    if labels.ndim != 2 or 0 in labels.shape:
        raise ValueError(f"labels must be [batch, length], found shape {labels.shape}")
    wrong = (labels != ignore_index) & ((labels < 0) | (labels >= vocabulary))
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(
            f"labels[{row}, {column}] is {labels[row, column]}, expected 0..{vocabulary - 1} or {ignore_index}"
        )
    return labels.astype(np.int64)


def check_ids(value: Any, vocabulary: int, name: str = "input_ids") -> NDArray[np.int64]:
    """Token ids [B, T], each below the vocabulary. Raises TypeError or ValueError naming row and column."""
    try:
        ids = to_numpy(value)
    except ValueError as error:  # lists of unequal lengths
        raise ValueError(f"{name} must be [batch, length], rows of one length: {error}") from error
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(f"{name} must be integers, found {ids.dtype}")
    if ids.ndim != 2:
        raise ValueError(f"{name} must be [batch, length], found shape {ids.shape}")
    if 0 in ids.shape:
        raise ValueError(f"{name} is empty: shape {ids.shape}")
    wrong = (ids < 0) | (ids >= vocabulary)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise ValueError(f"{name}[{row}, {column}] is {ids[row, column]}, expected 0..{vocabulary - 1}")
    return ids.astype(np.int64)


def check_mask(
    value: Any, shape: tuple[int, ...], name: str = "attention_mask", ids: str = "input_ids", empty: bool = False
) -> NDArray[np.uint8]:
    """attention_mask [B, T] of zeros and ones, not all zeros in a row unless `empty`. Raises ValueError."""
    mask = to_numpy(value)
    if mask.shape != shape:
        raise ValueError(f"{name} has shape {mask.shape}, {ids} has {shape}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError(f"{name} must hold zeros and ones only")
    mask = mask.astype(np.uint8)
    if not empty and not mask.any(axis=1).all():
        raise ValueError(f"{name} is all zeros in row {int(np.argmin(mask.any(axis=1)))}")
    return mask


def decoder_rows(ids: Any, mask: Any, rows: int, vocabulary: int) -> DecoderRows:
    """decoder_input_ids [B, T] and decoder_attention_mask [B, T] or None as packed rows. Raises as check_ids does."""
    shown = check_ids(ids, vocabulary, "decoder_input_ids")
    if len(shown) != rows:
        raise ValueError(f"decoder_input_ids has {len(shown)} rows, input_ids has {rows}")
    if mask is not None:
        mask = check_mask(mask, shown.shape, "decoder_attention_mask", "decoder_input_ids")
    offsets = np.arange(rows + 1, dtype=np.int64) * shown.shape[1]
    seen = None if mask is None or mask.all() else np.ascontiguousarray(mask.reshape(-1))
    return DecoderRows(shown.astype(np.int32).reshape(-1), offsets, seen, shown)


def begin_decoder(ids: Any, mask: Any, start: Any, rows: int, vocabulary: int) -> DecoderRows:
    """What generate() starts the decoder with, as transformers does it: `start` where nothing is given.

    start: the decoder_start_token_id, or one for each row. It is put in front of decoder_input_ids (and 1 in front of
    their mask) where every row begins with something else.
    """
    starts = np.asarray(to_numpy(start))
    if starts.ndim > 1 or not np.issubdtype(starts.dtype, np.integer):
        raise TypeError(f"decoder_start_token_id must be an integer, or one for each row, found {start!r}")
    if starts.ndim == 1 and len(starts) != rows:
        raise ValueError(f"decoder_start_token_id has {len(starts)} entries, expected one for each of {rows} rows")
    first = np.broadcast_to(starts.reshape(-1, 1), (rows, 1)).astype(np.int64)
    if ids is None:
        check_ids(first, vocabulary, "decoder_start_token_id")
        return decoder_rows(first, mask, rows, vocabulary)
    given = decoder_rows(ids, mask, rows, vocabulary)
    if (given.shown[:, :1] == first).any():
        return given
    check_ids(first, vocabulary, "decoder_start_token_id")
    if mask is not None:
        seen = to_numpy(mask)
        mask = np.concatenate([np.ones_like(seen[:, :1]), seen], axis=1)
    return decoder_rows(np.concatenate([first, given.shown], axis=1), mask, rows, vocabulary)


def repeat_decoder(row: DecoderRows, times: int) -> DecoderRows:
    """The one row of `row`, `times` times."""
    mask = None if row.mask is None else np.tile(row.mask, times)
    offsets = np.arange(times + 1, dtype=np.int64) * len(row.ids)
    return DecoderRows(np.tile(row.ids, times), offsets, mask, np.tile(row.shown, (times, 1)))


def shift_right(labels: NDArray[np.int64], start: int, pad: int, ignore: int = -100) -> NDArray[np.int64]:
    """labels [B, T] as the decoder reads them while taught: start in front, the last dropped, pad for `ignore`."""
    shifted = np.concatenate([np.full_like(labels[:, :1], start), labels[:, :-1]], axis=1)
    return np.where(shifted == ignore, pad, shifted)


def pack(
    ids: NDArray[np.int64], mask: NDArray[np.uint8] | None, image_token: int | None, queries: int, pictures: int
) -> PackedRows:
    """ids [B, T] to packed rows, image tokens to -1; without an image token the queries go in front.

    Raises ValueError if a row has not exactly `queries` image tokens, or there is not one picture a row.
    """
    batch, length = ids.shape
    if batch != pictures:
        raise ValueError(
            f"input_ids has {batch} rows, pixel_values has {pictures} pictures: one picture a row is expected"
        )
    if image_token is None:
        front = np.full((batch, queries), -1, np.int64)
        inputs = np.concatenate([front, ids], axis=1)
        rules = inputs
        if mask is not None:
            mask = np.concatenate([np.ones((batch, queries), np.uint8), mask], axis=1)
    else:
        found = (ids == image_token).sum(axis=1)
        if (found != queries).any():
            row = int(np.argmax(found != queries))
            raise ValueError(
                f"input_ids row {row} holds {int(found[row])} image placeholders (token {image_token}), expected"
                f" {queries}: pass text and images to the processor together"
            )
        inputs = np.where(ids == image_token, -1, ids)
        rules = ids
    length = inputs.shape[1]
    return PackedRows(
        ids=inputs.astype(np.int32).reshape(-1),
        offsets=np.arange(batch + 1, dtype=np.int64) * length,
        mask=None if mask is None or mask.all() else np.ascontiguousarray(mask.reshape(-1)),
        rule_ids=rules.astype(np.int32).reshape(-1),
    )


def _with_features(embeds: Floats, places: NDArray[np.bool_], features: Floats) -> Floats:
    """A copy of embeds [B, T, D] in which features [B, Q, D] stand in `places` [B, T]."""
    if isinstance(embeds, DeviceArray) and isinstance(features, DeviceArray):
        width, at = embeds.shape[2], np.flatnonzero(places).astype(np.int32)
        rows = _core._copy_rows(
            embeds.reshape(-1, width), at, features.reshape(-1, width), None, len(at), embeds.device
        )
        filled: DeviceArray = rows.reshape(*embeds.shape)
        return filled
    changed = np.array(to_numpy(embeds))
    changed[places] = to_numpy(features).reshape(-1, features.shape[2])
    return changed


def pack_embeds(
    embeds: Floats,
    mask: NDArray[np.uint8] | None,
    ids: NDArray[np.int64] | None,
    places: NDArray[np.bool_] | None,
    features: Floats | None,
) -> tuple[PackedRows, Floats]:
    """Prompts that come as embeddings [B, T, D] (and, for the rules, ids [B, T]), with features [B, Q, D] in their
    places [B, T], in front where places is None. Gives rows in which every token is an embedding, and these.

    Raises ValueError if a row has not exactly Q places.
    """
    batch = embeds.shape[0]
    rules = np.full(embeds.shape[:2], -1, np.int64) if ids is None else ids
    if features is not None:
        if features.shape[0] != batch:
            raise ValueError(f"inputs_embeds has {batch} rows, there are {features.shape[0]} pictures")
        queries = features.shape[1]
        if places is None:
            embeds = joined([features, embeds], 1)
            rules = np.concatenate([np.full((batch, queries), -1, np.int64), rules], axis=1)
            if mask is not None:
                mask = np.concatenate([np.ones((batch, queries), np.uint8), mask], axis=1)
        else:
            found = places.sum(axis=1)
            if (found != queries).any():
                row = int(np.argmax(found != queries))
                raise ValueError(
                    f"inputs_embeds row {row} holds {int(found[row])} image placeholders, expected {queries}"
                )
            embeds = _with_features(embeds, places, features)
    length = embeds.shape[1]
    rows = PackedRows(
        ids=np.full(batch * length, -1, np.int32),
        offsets=np.arange(batch + 1, dtype=np.int64) * length,
        mask=None if mask is None or mask.all() else np.ascontiguousarray(mask.reshape(-1)),
        rule_ids=rules.astype(np.int32).reshape(-1),
    )
    return rows, embeds


def pack_ragged(rows: list[list[int]], image_token: int | None, queries: int) -> PackedRows:
    """Texts of unequal length, each behind its `queries` image features: no pads, no mask."""
    ids = np.concatenate([np.array([-1] * queries + row, np.int32) for row in rows])
    rule = -1 if image_token is None else image_token
    rules = np.concatenate([np.array([rule] * queries + row, np.int32) for row in rows])
    lengths = [0] + [queries + len(row) for row in rows]
    return PackedRows(ids, np.cumsum(np.array(lengths, np.int64)), None, rules)


def pack_texts(rows: list[list[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64], None]:
    """Texts of unequal length for a Q-Former: ids, offsets, no mask."""
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return np.array([i for row in rows for i in row], np.int32), offsets, None


NO_POSITIONS = 2**31 - 1
"""Positions of a model that has no learned ones: as many as tokens can be counted."""


def check_positions(rows: PackedRows, positions: int, new_tokens: int = 0) -> None:
    """Raises ValueError if a row, with what it may grow by, is longer than the model has positions for."""
    for row, (start, end) in enumerate(zip(rows.offsets[:-1], rows.offsets[1:], strict=True)):
        live = int(end - start) if rows.mask is None else int(rows.mask[start:end].sum())
        # The last new token is never fed back.
        if live > positions or live + max(new_tokens - 1, 0) > positions:
            extra = f" and up to {new_tokens} new ones" if live <= positions else ""
            bound = f"the model has {positions} positions"
            if positions == NO_POSITIONS:
                bound = f"no more than {positions} tokens can be counted"
            raise ValueError(f"row {row}: {live} tokens (image included){extra}, but {bound}")
