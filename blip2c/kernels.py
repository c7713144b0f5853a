"""The kernels one by one, on NumPy arrays: to look at, to teach with, to test.

Arithmetic is float32. Weights may be stored in float32, float16, bfloat16 (NumPy has no bfloat16: its bits travel as
uint16), int8 or int4 (see PackedWeight). A result does not depend on the number of threads, nor on what else is in the
batch.

Arrays are NumPy's or anything with ``__dlpack__``: torch tensors, CuPy arrays. What the first of those is comes back: a
tensor for tensors. Nothing on the host is copied that is contiguous already.

Errors, everywhere: ``TypeError`` for something that is no array or has another dtype (NumPy's are never converted),
``ValueError`` for shapes and names, ``IndexError`` for ids outside their table. Arrays need not be contiguous or
writable.

``device="cuda"`` (or "cuda:1" ...) runs the kernel of that backend instead: arrays of the host are copied there, the
result back. Floats that lie on that device are used where they lie (other dtypes and layouts are converted there), and
a result is where the kernel's first array is: a tensor, or a ``DeviceArray``; ids come back as NumPy's. A weight that
lies on the device is read there where its width is a multiple of 32. ``UnsupportedError`` says why where there is no
CUDA, ``ValueError`` names an array on another device. A PackedWeight made with that device stays there.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from blip2c import _core
from blip2c._core import DeviceArray
from blip2c.images import is_torch
from blip2c.inputs import is_on_cuda, to_numpy
from blip2c.search import beam_search, greedy_search

__all__ = [
    "ACTIVATIONS",
    "PackedWeight",
    "activation",
    "add_rows",
    "attention",
    "beam_search",
    "copy_rows",
    "cross_attention",
    "cross_entropy",
    "decode_attention",
    "distance_bias",
    "embedding",
    "first_bad_row",
    "gate",
    "gelu",
    "greedy_search",
    "layer_norm",
    "linear",
    "log_softmax",
    "packed_attention",
    "patches",
    "rms_norm",
    "rope",
    "top_k",
]

F32 = NDArray[np.float32]

ACTIVATIONS = ("none", "gelu", "relu", "gelu_tanh", "quick_gelu", "silu")
"""Names of the activations, in the order of the C enumeration."""


def _activation_index(name: str) -> int:
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {name!r}")
    return ACTIVATIONS.index(name)


Kernel = TypeVar("Kernel", bound=Callable[..., Any])


# What kernels read on the host, wherever they compute.
_FOR_THE_HOST = ("distance_bias", "inv_freq")


def _own(value: Any, name: str, device: str) -> Any:
    """An argument as the C part takes it: NumPy's, or a DeviceArray; what is no foreign array as it is."""
    if isinstance(value, tuple):
        return tuple(_own(item, name, device) for item in value)
    if isinstance(value, np.ndarray | np.generic | DeviceArray) or not hasattr(value, "__dlpack__"):
        return value
    if (
        is_on_cuda(value)
        and name not in _FOR_THE_HOST
        and not any(kind in str(getattr(value, "dtype", "")) for kind in ("int", "bool"))
    ):
        return _core._take(value.detach() if is_torch(value) else value, name, device)
    return to_numpy(value)


def _as_tensor(result: Any, device: Any) -> Any:
    """Results for somebody who works with torch, on `device`."""
    torch = sys.modules["torch"]
    if isinstance(result, tuple):
        return tuple(_as_tensor(item, device) for item in result)
    if isinstance(result, DeviceArray):
        return torch.from_dlpack(result)
    return torch.from_numpy(result).to(device) if isinstance(result, np.ndarray) else result


def _arrays(function: Kernel) -> Kernel:
    """Lets a kernel on NumPy's arrays and DeviceArrays take those of other libraries."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        device = given.get("device", "cpu")
        result = function(**{name: _own(value, name, device) for name, value in given.items()})
        first = next((v for v in given.values() if isinstance(v, np.ndarray) or hasattr(v, "__dlpack__")), None)
        return _as_tensor(result, first.device) if first is not None and is_torch(first) else result

    return kernel  # type: ignore[return-value]


def _array(value: Any, name: str, dtype: Any, ndim: int) -> Any:
    """What is sliced here, before C sees it, is checked here, with the same words."""
    if not isinstance(value, np.ndarray | DeviceArray):
        raise TypeError(f"{name}: expected a numpy array, found {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name}: expected an array of {np.dtype(dtype)}, found {value.dtype}")
    if value.ndim != ndim:
        raise ValueError(f"{name}: expected {ndim} axes, found {value.ndim}")
    return value


def _expect(name: str, found: Any, expected: Any) -> None:
    if found != expected:
        raise ValueError(f"{name}: expected {expected}, found {found}")


class PackedWeight:
    """A weight matrix [Dout, Din] in the layout that the kernels read: panels of 16 output channels.

    weight: float32, float16, or uint16 holding bfloat16 bits (tensors come by way of the host). dtype: "float32",
    "float16" or "bfloat16" to store it so (rounded to nearest even; ``NumericError`` where a value is too large for
    float16), "int8" or "int4" to round it to integers with scales (``NumericError`` where a value is not finite),
    None: as it is. pairs: a bfloat16 weight that asks for bfloat16 arithmetic where many rows meet it and the
    processor has it.

    Rounded weights are column_scales[j] * scale * q[i][j]. A column scale is the size of a column (its root mean
    square), so that all columns are rounded alike. int8: one scale per output channel, |q| <= 127. int4: a float16
    scale per output channel and 32 input channels, -8 <= q <= 7, found by least squares.

    device: where it lies and where products with it run, "cpu" or "cuda" (there in rows, not in panels).
    """

    def __init__(
        self, weight: NDArray[Any], dtype: str | None = None, pairs: bool = False, device: str = "cpu"
    ) -> None:
        weight = weight if isinstance(weight, np.ndarray) or not hasattr(weight, "__dlpack__") else to_numpy(weight)
        self._capsule = _core._pack_weight(weight, dtype, pairs, device)
        self.device = device
        self.shape: tuple[int, int] = (weight.shape[0], weight.shape[1])

    def unpack(self) -> NDArray[Any]:
        """[Dout, Din] as stored: float32 (rounded weights too), float16, or uint16 holding bfloat16 bits."""
        return _core._unpack_weight(self._capsule)

    def integers(self) -> tuple[NDArray[np.int8], F32, F32]:
        """Of a rounded weight: q [Dout, Din] int8, scales [Dout, groups], column_scales [Din] float32.

        int8 has one group, int4 a group for every 32 input channels. ValueError for a weight that is not rounded or not
        on the processor.
        """
        dtype, group, data, scales, columns = _core._weight_parts(self._capsule)
        n, k = self.shape
        panels, padded = -(-n // 16), -(-k // 32) * 32
        if dtype == "int8":
            q = data.astype(np.int16).reshape(panels, padded // 4, 16, 4) - 128
        else:
            halves = data.reshape(panels, padded // 8, 1, 16, 4)
            q = np.concatenate([halves & 15, halves >> 4], axis=2).astype(np.int16).reshape(panels, -1, 16, 4) - 8
        rows = q.transpose(0, 2, 1, 3).reshape(panels * 16, padded)
        each = scales.reshape(panels, -(-k // group), 16).transpose(0, 2, 1).reshape(panels * 16, -1)
        return rows[:n, :k].astype(np.int8), each[:n].astype(np.float32), columns

    def __repr__(self) -> str:
        return f"PackedWeight(shape={self.shape})"


@_arrays
def linear(
    x: F32,
    weight: NDArray[Any] | PackedWeight,
    bias: F32 | None = None,
    activation: str = "none",
    residual: F32 | None = None,
    dtype: str | None = None,
    item_rows: int = 0,
    method: str = "packed",
    device: str = "cpu",
) -> F32:
    """act(x . weight^T + bias) + residual, as torch.nn.functional.linear with what usually follows.

    x [..., Din] float32; weight [Dout, Din] (see PackedWeight; packing takes longer than one product: keep it if
    it is used again); bias [Dout]; residual [..., Dout]. Returns [..., Dout].

    method "packed": each element is one chain of fused multiply-adds over ascending Din, starting from 0, so a row has
    the same bits alone and in any batch. method "rows": the same chain from an unpacked weight (slower). method
    "openblas": a float32 weight as it lies, through OpenBLAS; `item_rows` rows (default: all) form one item, and an
    item has the same bits whatever the other items are. Other devices have "packed" alone.
    """
    if device != "cpu":
        if method != "packed":
            raise ValueError(f"method: expected packed on {device}, found {method!r}")
        if isinstance(weight, PackedWeight) and dtype is not None:
            raise ValueError(f"dtype: expected None for a packed weight, found {dtype!r}")
        if dtype is not None and not isinstance(weight, PackedWeight):
            weight = PackedWeight(weight, dtype, device=device)
        held = weight._capsule if isinstance(weight, PackedWeight) else weight
        return _core._linear(x, held, bias, residual, _activation_index(activation), item_rows, device)
    if method not in ("packed", "rows", "openblas"):
        raise ValueError(f"method: expected packed, rows or openblas, found {method!r}")
    act = _activation_index(activation)
    if item_rows < 0:
        raise ValueError(f"item_rows: expected at least 0, found {item_rows}")
    if method == "packed":
        packed = weight if isinstance(weight, PackedWeight) else PackedWeight(weight, dtype)
        return _core._linear(x, packed._capsule, bias, residual, act, item_rows, device)
    if isinstance(weight, PackedWeight) or dtype is not None:
        raise ValueError(f"method: {method} takes an array as it is stored")
    if method == "rows":
        return _core._linear(x, weight, bias, residual, act, 0, device)
    if isinstance(weight, np.ndarray) and weight.dtype != np.float32:
        raise TypeError(f"weight: expected an array of float32, found {weight.dtype}")
    if item_rows == 0 and isinstance(x, np.ndarray) and x.ndim > 0:
        item_rows = int(np.prod(x.shape[:-1]))
    return _core._linear(x, weight, bias, residual, act, item_rows, device)


@_arrays
def layer_norm(
    x: F32, weight: F32 | None = None, bias: F32 | None = None, eps: float = 1e-5, device: str = "cpu"
) -> F32:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last axis, as torch.nn.functional.layer_norm.

    x [..., D] float32; weight, bias [D] or None. Mean and variance in two passes, in float32. Returns [..., D].
    """
    return _core._layer_norm(x, weight, bias, eps, device)


@_arrays
def rms_norm(x: F32, weight: F32, eps: float = 1e-6, device: str = "cpu") -> F32:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, as T5LayerNorm (Zhang and Sennrich 2019).

    x [..., D] float32; weight [D]. No mean is taken away and nothing is added. Returns [..., D].
    """
    return _core._rms_norm(x, weight, eps, device)


@_arrays
def gate(gate: F32, up: F32, activation: str = "gelu_tanh", device: str = "cpu") -> F32:
    """act(gate) * up, element by element: the gated feed-forward of T5 v1.1 and LLaMA (Shazeer 2020).

    gate, up [..., F] float32 of the same shape; activation one of ACTIVATIONS. Returns [..., F].
    """
    return _core._gate(gate, up, _activation_index(activation), device)


@_arrays
def activation(x: F32, name: str = "gelu", device: str = "cpu") -> F32:
    """An activation of ACTIVATIONS on every element of x (float32, any shape).

    gelu: x/2 (1 + erf(x / sqrt 2)), the exact one of BLIP-2's vision model and Q-Former; gelu_tanh: its tanh form;
    quick_gelu: x sigmoid(1.702 x); silu: x sigmoid(x).
    """
    return _core._activation(x, _activation_index(name), device)


@_arrays
def gelu(x: F32, device: str = "cpu") -> F32:
    """x/2 (1 + erf(x / sqrt 2)), as torch.nn.functional.gelu (Hendrycks and Gimpel 2016)."""
    return activation(x, "gelu", device)


@_arrays
def log_softmax(x: F32, device: str = "cpu") -> F32:
    """x - max - log(sum(exp(x - max))) over the last axis, as torch.log_softmax. x [..., V] float32."""
    return _core._log_softmax(x, device)


@_arrays
def cross_entropy(logits: F32, targets: NDArray[np.int64], ignore_index: int = -100) -> F32:
    """-log softmax(logits)[target] of each row, 0 where the target is ignore_index, as torch's cross_entropy with
    reduction="none". logits [N, V], targets [N]; IndexError for another target outside 0..V-1."""
    return _core._cross_entropy(logits, targets, ignore_index)


@_arrays
def top_k(x: F32, k: int, device: str = "cpu") -> tuple[F32, NDArray[np.int32]]:
    """The k largest of the last axis, largest first, equal values by ascending id; NaN comes last.

    x [..., V] float32, 1 <= k <= V. Returns values [..., k] float32 and ids [..., k] int32.
    """
    return _core._top_k(x, k, device)


@_arrays
def first_bad_row(x: F32, device: str = "cpu") -> int:
    """Index of the first row (all axes but the last, flattened) that holds a NaN or an Inf, or -1."""
    return _core._first_bad_row(x, device)


@_arrays
def embedding(
    table: NDArray[Any] | PackedWeight, ids: NDArray[np.int32], added_to: F32 | None = None, device: str = "cpu"
) -> F32:
    """Rows of a table [V, D], in any storage that PackedWeight takes: out[i] = table[ids[i]], float32 [N, D].

    ids [N] int32, all below V (IndexError). With added_to [N, D] the rows are added to a copy of it. A negative id
    leaves its row alone, which needs added_to.
    """
    if added_to is None and isinstance(ids, np.ndarray) and (ids < 0).any():
        raise IndexError(f"ids: expected at least 0 without added_to, found {int(ids.min())}")
    return _core._embedding(table._capsule if isinstance(table, PackedWeight) else table, ids, added_to, device)


@_arrays
def rope(
    x: F32, positions: NDArray[np.int32], inv_freq: F32, head_dim: int, scaling: float = 1.0, device: str = "cpu"
) -> F32:
    """Rotary position embeddings (Su et al. 2021, with the halves of transformers' rotate_half).

    x [N, heads * head_dim] float32, positions [N] int32 (a negative one counts as 0), inv_freq [R / 2] float32, R <=
    head_dim: in each head the elements j and j + R / 2 turn by positions[i] * inv_freq[j] and are multiplied by
    `scaling`; those from R on stay. Returns an array like x.
    """
    return _core._rope(x, positions, inv_freq, head_dim, scaling, device)


@_arrays
def patches(pixels: F32, patch: int, device: str = "cpu") -> F32:
    """Pictures [B, C, height, width] cut into patches [B, height // patch * (width // patch), C * patch * patch].

    Times a convolution weight [D, C, P, P] seen as [D, C*P*P] this is Conv2d(stride=patch), as Blip2VisionEmbeddings.
    What is left over at the right and lower edge is dropped.
    """
    return _core._patches(pixels, patch, device)


@_arrays
def copy_rows(
    out: F32,
    x: F32,
    out_rows: NDArray[np.int32] | None = None,
    x_rows: NDArray[np.int32] | None = None,
    device: str = "cpu",
) -> F32:
    """A copy of out [M, D] in which row out_rows[i] is row x_rows[i] of x [N, D]; None: i itself."""
    lists = [a for a in (out_rows, x_rows) if isinstance(a, np.ndarray)]
    n = len(lists[0]) if lists else len(_array(x, "x", np.float32, 2))
    copied: F32 = _core._copy_rows(out, out_rows, x, x_rows, n, device)
    return copied


@_arrays
def add_rows(x: F32, rows: F32, device: str = "cpu") -> F32:
    """x [N, D] plus rows [M, D] repeated N / M times: the same position embeddings onto every picture."""
    return _core._add_rows(x, rows, device)


@_arrays
def packed_attention(
    q: F32,
    q_offsets: NDArray[np.int32],
    k: F32,
    v: F32,
    prefix_starts: NDArray[np.int32],
    prefix_lens: NDArray[np.int32],
    *,
    heads: int,
    kv_heads: int | None = None,
    k_suffix: F32 | None = None,
    v_suffix: F32 | None = None,
    suffix_slots: NDArray[np.int32] | None = None,
    suffix_lens: NDArray[np.int32] | None = None,
    key_mask: NDArray[np.uint8] | None = None,
    distance_bias: F32 | None = None,
    causal: bool = False,
    scale: float | None = None,
    window: int = 0,
    weights: bool = False,
    device: str = "cpu",
) -> F32:
    """The attention of the C contract: rows of unequal length, packed, over two stretches of keys.

    q [N, H*Dh]: row b's queries are q[q_offsets[b]:q_offsets[b+1]] (q_offsets [B+1] int32). Its keys are
    k[prefix_starts[b]:][:prefix_lens[b]] followed by k_suffix[suffix_slots[b, s]] for s < suffix_lens[b]; values alike.
    key_mask [B, *] uint8 over the row's concatenated keys, 1: may be seen. causal: the row's queries are its last
    positions. window: 0, or how many positions back a query sees, its own included. scale: default Dh^-0.5.
    distance_bias [H, 2L - 1]: column clamp(j - i, 1 - L, L - 1) + L - 1 is added to the score of a key at place j of
    the row's keys and a query at place i, masked keys counted too (T5). A query that sees no key gets zeros. Returns
    [N, H*Dh]; with weights=True instead the softmax weights, flat, row after row [H, T, keys].
    """
    kv_heads = heads if kv_heads is None else kv_heads
    q = _array(q, "q", np.float32, 2)
    if heads < 1 or q.shape[1] % heads != 0:
        raise ValueError(f"heads: expected a divisor of {q.shape[1]}, found {heads}")
    head_dim = q.shape[1] // heads
    scale = head_dim**-0.5 if scale is None and head_dim else scale
    return _core._attention(
        q, q_offsets, k, v, prefix_starts, prefix_lens, k_suffix, v_suffix, suffix_slots, suffix_lens, key_mask,
        distance_bias, causal, heads, kv_heads, head_dim, scale or 0.0, window, weights, device,
    )  # fmt: skip


def distance_bias(table: F32, max_distance: int, bidirectional: bool) -> F32:
    """T5's relative position bias by distance instead of by bucket, as attention() takes it (Raffel et al. 2020, 2.1).

    table [buckets, H] float32, as a checkpoint's relative_attention_bias.weight; at least 4 buckets, max_distance
    beyond half of them (ValueError). bidirectional: an encoder's, else a decoder's. Returns [H, 2 * max_distance + 1]:
    column d + max_distance for a key d places behind its query (T5Attention._relative_position_bucket).
    """
    return _core._distance_bias(table, max_distance, bidirectional)


def _mask_bytes(key_mask: NDArray[Any] | None, shape: tuple[int, int]) -> NDArray[np.uint8] | None:
    if key_mask is None:
        return None
    if not isinstance(key_mask, np.ndarray) or key_mask.dtype not in (np.bool_, np.uint8):
        found = getattr(key_mask, "dtype", type(key_mask).__name__)
        raise TypeError(f"key_mask: expected an array of bool or uint8, found {found}")
    _expect("key_mask: shape", key_mask.shape, shape)
    return key_mask.astype(np.uint8)


@_arrays
def attention(
    q: F32,
    k: F32,
    v: F32,
    heads: int,
    kv_heads: int | None = None,
    causal: bool = False,
    key_mask: NDArray[Any] | None = None,
    scale: float | None = None,
    distance_bias: F32 | None = None,
    window: int = 0,
    weights: bool = False,
    device: str = "cpu",
) -> F32:
    """softmax(scale q k^T + bias) v for each head (Vaswani et al. 2017, section 3.2.1).

    q [B, Tq, H*Dh], k and v [B, Tk, Hkv*Dh] float32, head h in columns [h*Dh, (h+1)*Dh); key_mask [B, Tk] bool or
    uint8, true where a key may be seen. causal: query i sees keys up to Tk - Tq + i (Tq <= Tk). window: if not 0,
    query i sees no key before Tk - Tq + i + 1 - window (Mistral's sliding window). A query that sees no key gets zeros.
    distance_bias [H, 2L - 1]: T5's relative position bias, see packed_attention; the queries are the row's last
    positions. Returns [B, Tq, H*Dh]; with weights=True the softmax's [B, H, Tq, Tk]. Query head h uses key head
    h * Hkv // H (grouped queries).
    """
    q, k, v = _array(q, "q", np.float32, 3), _array(k, "k", np.float32, 3), _array(v, "v", np.float32, 3)
    _expect("k: batch", k.shape[0], q.shape[0])
    _expect("v: shape", v.shape, k.shape)
    batch, queries, keys = q.shape[0], q.shape[1], k.shape[1]
    out = packed_attention(
        q.reshape(batch * queries, q.shape[2]),
        np.arange(batch + 1, dtype=np.int32) * np.int32(queries),
        k.reshape(batch * keys, k.shape[2]),
        v.reshape(batch * keys, v.shape[2]),
        np.arange(batch, dtype=np.int32) * np.int32(keys),
        np.full(batch, keys, np.int32),
        heads=heads,
        kv_heads=kv_heads,
        key_mask=_mask_bytes(key_mask, (batch, keys)),
        distance_bias=distance_bias,
        causal=causal,
        scale=scale,
        window=window,
        weights=weights,
        device=device,
    )
    return out.reshape((batch, heads, queries, keys) if weights else q.shape)


@_arrays
def cross_attention(
    hidden: F32,
    image_embeds: F32,
    query: tuple[NDArray[Any], F32 | None],
    key: tuple[NDArray[Any], F32 | None],
    value: tuple[NDArray[Any], F32 | None],
    heads: int,
    device: str = "cpu",
) -> F32:
    """The Q-Former's look at a picture: attention of hidden's projection over image_embeds' projections.

    hidden [B, Q, D], image_embeds [B, T, Dv] float32; query = (weight [D, D], bias [D]), key and value = (weight
    [D, Dv], bias [D]); a bias may be None. Returns the heads side by side [B, Q, D], before the output projection, as
    Blip2QFormerMultiHeadAttention (Li et al. 2023, section 3.1).
    """
    _array(hidden, "hidden", np.float32, 3)
    _array(image_embeds, "image_embeds", np.float32, 3)
    _expect("image_embeds: batch", image_embeds.shape[0], hidden.shape[0])
    q = linear(hidden, *query, device=device)
    k, v = linear(image_embeds, *key, device=device), linear(image_embeds, *value, device=device)
    return attention(q, k, v, heads, device=device)


@_arrays
def decode_attention(
    q: F32,
    k_prefix: F32,
    v_prefix: F32,
    k_suffix: F32,
    v_suffix: F32,
    suffix_slots: NDArray[np.int32],
    heads: int,
    kv_heads: int | None = None,
    prefix_of: NDArray[np.int32] | None = None,
    scale: float | None = None,
    device: str = "cpu",
) -> F32:
    """One new token per beam over a shared prompt and the beam's own past, without copying either.

    q [R, H*Dh]: one query per beam. k_prefix, v_prefix [B, P, Hkv*Dh]: the prompts' keys and values; beam r looks at
    prefix_of[r] (default: r). k_suffix, v_suffix [S, Hkv*Dh]: keys and values of all tokens since, in slots;
    suffix_slots [R, L] int32: the slots of beam r's own past, oldest first, its own token included. Returns [R, H*Dh],
    with the bits that the same query has in a causal pass over the whole sequence.
    """
    _array(k_prefix, "k_prefix", np.float32, 3)
    _expect("v_prefix: shape", _array(v_prefix, "v_prefix", np.float32, 3).shape, k_prefix.shape)
    _array(suffix_slots, "suffix_slots", np.int32, 2)
    rows, length = _array(q, "q", np.float32, 2).shape[0], k_prefix.shape[1]
    _expect("suffix_slots: rows", suffix_slots.shape[0], rows)
    which = np.arange(rows, dtype=np.int32) if prefix_of is None else _array(prefix_of, "prefix_of", np.int32, 1)
    _expect("prefix_of: length", len(which), rows)
    return packed_attention(
        q,
        np.arange(rows + 1, dtype=np.int32),
        k_prefix.reshape(-1, k_prefix.shape[2]),
        v_prefix.reshape(-1, v_prefix.shape[2]),
        which * np.int32(length),
        np.full(rows, length, np.int32),
        heads=heads,
        kv_heads=kv_heads,
        k_suffix=k_suffix,
        v_suffix=v_suffix,
        suffix_slots=suffix_slots,
        suffix_lens=np.full(rows, suffix_slots.shape[1], np.int32),
        causal=True,
        scale=scale,
        device=device,
    )
