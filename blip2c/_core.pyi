"""Types of the C part. Every function releases the GIL while it computes and answers signals within 100 ms."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

class CheckpointError(ValueError): ...
class NumericError(ArithmeticError): ...
class UnsupportedError(NotImplementedError): ...

def cuda_devices() -> list[dict[str, Any]]: ...

"""The CUDA devices: device, name, compute_capability, multiprocessors, memory and free in bytes. Raises
UnsupportedError with the reason where there is no driver, no device, or no CUDA part in this installation."""

def cpu_info() -> dict[str, Any]: ...
def get_num_threads() -> int: ...
def set_num_threads(n: int, /) -> None: ...
def cancel_calls(thread_ident: int, /) -> None: ...

"""The calls of a Model that a thread is in now end soon, with KeyboardInterrupt."""

def _allocation_count() -> int: ...
def _fail_allocation_after(countdown: int, /) -> None: ...

PackedTexts = tuple[NDArray[np.int32], NDArray[np.int64], NDArray[np.uint8] | None]
"""ids [N], offsets [B + 1] (text b is ids[offsets[b]:offsets[b+1]]), mask [N] (0: a pad) or None."""

PACKED_VERSION: str
"""Of the layout of packed files."""

def _policies(dtype: str | dict[str, str], /) -> str: ...

"""How a dtype holds each part: "vision=int8,qformer=half,language=int4"."""

class DeviceArray:
    """A float32 array of up to 8 axes on a device, which results are where inputs were: blip2c.DeviceArray.

    torch.from_dlpack, cupy.from_dlpack and others take it without a copy; numpy() copies it to the host. An index is of
    integers and slices and gives a view, as reshape() does where it can; copy() has memory of its own. It outlives its
    model. Nobody makes one but blip2c.

    Raises TypeError for another index, ValueError for more axes, BufferError for what DLPack cannot say, MemoryError.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def ndim(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def dtype(self) -> np.dtype[np.float32]: ...
    @property
    def device(self) -> str: ...
    @property
    def T(self) -> DeviceArray: ...  # noqa: N802 - NumPy's name
    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> DeviceArray: ...
    def reshape(self, *shape: Any) -> DeviceArray: ...
    def copy(self) -> DeviceArray: ...
    def numpy(self) -> NDArray[np.float32]: ...
    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]: ...
    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any: ...
    def __dlpack_device__(self) -> tuple[int, int]: ...

def _join(arrays: tuple[DeviceArray, ...], axis: int, /) -> DeviceArray: ...
def _take(array: Any, name: str, device: str, /) -> DeviceArray: ...

class Model:
    """Immutable weights and the computations on them; may be shared by threads.

    paths: the safetensors files. config: see blip2c.config.core_config(). dtype: how the matrices are held, "auto" (as
    stored), "float32", "float16", "bfloat16", "int8" or "int4", or a dict of such names for "vision", "qformer",
    "language" (one that is missing: "auto"). docs/DTYPES.md says what each computes. device: "cpu", "cuda" or
    "cuda:1" ...; float arrays that go in are NumPy's or lie on that device. on_device: results stay there, as
    DeviceArrays.
    """

    def __init__(
        self,
        paths: Sequence[str],
        config: Mapping[str, Any],
        dtype: str | dict[str, str] = "auto",
        device: str = "cpu",
    ) -> None: ...
    @property
    def device(self) -> str: ...
    """Where the weights are and what is computed with them: "cpu", "cuda:0" ..."""
    @property
    def unexpected(self) -> list[str]: ...
    """Names in the files that this architecture does not have."""
    @property
    def dtype(self) -> str: ...
    """How most of the weights are held: "float32", "float16", "bfloat16", "int8" or "int4"."""
    @property
    def dtypes(self) -> dict[str, str]: ...
    """The same for each part: {"vision": "int8", "qformer": "float16", "language": "int4"}."""
    @property
    def policies(self) -> str: ...
    """What was asked for, or what the packed file was made for: "vision=int8,qformer=half,language=int4"."""
    @property
    def parameters(self) -> int: ...
    """Elements of all weights, a tied head counted once."""
    @property
    def nbytes(self) -> int: ...
    """Bytes of all weights as held."""
    def take(self, array: Any, name: str, /) -> DeviceArray: ...
    """float32 of any floats that lie on the model's device and have __dlpack__: where they lie, or converted there.
    The caller's stream is waited for by what the model does next. Raises TypeError (no floats), ValueError (another
    device), BufferError, MemoryError."""
    def put(self, array: NDArray[np.float32], /) -> DeviceArray: ...
    """A copy on the model's device."""
    def vision(self, pixel_values: NDArray[np.float32] | DeviceArray, on_device: bool = False) -> Any: ...
    """[B, 3, S, S] -> [B, T, Dv]: the vision encoder alone, after post_layernorm."""
    def read(
        self, image_embeds: NDArray[np.float32] | DeviceArray, text: PackedTexts | None = None, on_device: bool = False
    ) -> Any: ...
    """[B, T, Dv], what vision() gives, any T -> [B, Q, D_lm]: Q-Former and projection alone. text: what the Q-Former
    reads beside each picture, where it reads one (InstructBLIP)."""
    def encode(
        self,
        pixel_values: NDArray[np.float32] | DeviceArray,
        interpolate: bool = False,
        text: PackedTexts | None = None,
        on_device: bool = False,
    ) -> Any: ...
    """[B, 3, S, S] -> projected queries [B, Q, D_lm]: vision, Q-Former, projection. interpolate: pictures of any size,
    [B, 3, height, width] of at least a patch, through interpolated positions. text: as in read()."""
    def encode_stages(
        self,
        pixel_values: NDArray[np.float32] | DeviceArray | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        interpolate: bool = False,
        image_embeds: NDArray[np.float32] | DeviceArray | None = None,
        qformer: bool = True,
        text: PackedTexts | None = None,
        on_device: bool = False,
    ) -> dict[str, Any]: ...
    """{"vision": [B, T, Dv] (after post_layernorm), "pooled": [B, Dv], "qformer": [B, Q, Dq],
    "image_features": [B, Q, D_lm] (with a language model), "text": [N, Dq] (with texts), "embeds": [B, Q, P], rows of
    length 1 (vision_projection, without texts), "match": [B, 2] (itm_head, with texts)}; when asked, lists
    "vision_hidden_states", "qformer_hidden_states" (layers + 1) and
    "vision_attentions" [B, H, T, T], "qformer_attentions" [B, H, Q, Q], "qformer_cross_attentions" [B, H, Q, T].
    image_embeds instead of pixel_values: the Q-Former on them; qformer=False: the vision encoder alone. text: as in
    read(); those of one length N can be watched as well: "qformer_text_hidden_states" and "qformer_text_attentions"
    [B, H, N, Q + N], and the queries' attentions are [B, H, Q, Q + N]."""
    def read_texts(
        self, text: PackedTexts, hidden_states: bool = False, attentions: bool = False, on_device: bool = False
    ) -> dict[str, Any]: ...
    """Texts through the Q-Former alone: {"text": [N, Dq], "embeds": [N, P], rows of length 1 (text_projection)}; when
    asked (all of one length T), lists "qformer_text_hidden_states" [B, T, Dq] and "qformer_text_attentions"
    [B, H, T, T]."""
    def run_qformer(
        self,
        queries: NDArray[np.float32] | DeviceArray,
        text: NDArray[np.float32] | DeviceArray | None = None,
        query_mask: NDArray[np.uint8] | None = None,
        text_mask: NDArray[np.uint8] | None = None,
        image_embeds: NDArray[np.float32] | DeviceArray | None = None,
        image_mask: NDArray[np.uint8] | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        sees: str = "all",
        on_device: bool = False,
    ) -> dict[str, Any]: ...
    """The Q-Former on any embeddings, before their norm: queries [B, Q, Dq] (Q may be 0), text [B, T, Dq], pictures
    [B, Tv, Dv]; masks of the same [B, ...] (0: not seen). {"qformer": [B, Q, Dq], "text": [B, T, Dq]}, each where there
    is one; hidden states and attentions as in encode_stages(). sees: "all" (ITM: queries and text see each
    other), "before" (ITG: queries see queries, text the queries and what stands before it) or "own" (ITC: each its
    own)."""
    def match(
        self, image_embeds: NDArray[np.float32] | DeviceArray, text: PackedTexts, picture_of: NDArray[np.int32], /
    ) -> NDArray[np.float32]: ...
    """Logits [N, 2] (no, yes) of whether text n belongs to picture picture_of[n]: image_embeds [M, T, Dv] as
    encode_stages() gives "vision"; picture_of [N] ascends below M."""
    def similarity(self, images: NDArray[np.float32], texts: NDArray[np.float32], /) -> NDArray[np.float32]: ...
    """images [I, Q, P], texts [J, P], rows of length 1 -> [I, J]: the largest cosine of text j with a query of
    picture i."""
    def forward(
        self,
        image_features: NDArray[np.float32] | DeviceArray | None,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        mask: NDArray[np.uint8] | None = None,
        hidden_states: bool = False,
        attentions: bool = False,
        decoder_ids: NDArray[np.int32] | None = None,
        decoder_offsets: NDArray[np.int64] | None = None,
        decoder_mask: NDArray[np.uint8] | None = None,
        on_device: bool = False,
    ) -> dict[str, Any]: ...
    """Packed rows: ids [N], row b is ids[offsets[b]:offsets[b+1]], mask [N] (0: a pad). An id -1 takes its row's next
    embedding of image_features [B, P, D_lm]; a row must hold exactly P of them, none if it is None. Encoder-decoders:
    these are the encoder's rows; the decoder's stand in decoder_*.

    {"logits": [N, V]}; when asked, lists "hidden_states" ([N, D_lm], the last after the final norm) and "attentions"
    [B, H, T, T] (rows of one length); of an encoder-decoder "encoder_last_hidden_state" always, then
    "decoder_hidden_states", "encoder_hidden_states",
    "decoder_attentions" [B, H, Td, Td], "cross_attentions" [B, H, Td, T], "encoder_attentions" [B, H, T, T]."""
    def project(self, x: NDArray[np.float32] | DeviceArray, on_device: bool = False) -> Any: ...
    """[N, Dq] -> [N, D_lm]: language_projection alone."""
    def embed(self, ids: NDArray[np.int32], on_device: bool = False) -> Any: ...
    """[N] -> [N, D_lm]: the language model's token embeddings."""
    def generate(
        self,
        image_features: NDArray[np.float32] | DeviceArray | None,
        ids: NDArray[np.int32],
        offsets: NDArray[np.int64],
        mask: NDArray[np.uint8] | None,
        rule_ids: NDArray[np.int32],
        options: Mapping[str, Any],
        decoder_ids: NDArray[np.int32] | None = None,
        decoder_offsets: NDArray[np.int64] | None = None,
        decoder_mask: NDArray[np.uint8] | None = None,
        prefixes: Sequence[Prefix | None] | None = None,
        keys: NDArray[np.uint64] | None = None,
        hooks: Mapping[str, Callable[..., Any]] | None = None,
        tap: Callable[[str, str, int, NDArray[np.float32]], Any] | None = None,
        tap_weights: bool = False,
        keep: bool = False,
    ) -> dict[str, Any]: ...
    """Rows as in forward(); rule_ids are the ids that the rules see, [N] (the image token where ids has -1, or -1 where
    there is none), of an encoder-decoder the decoder's. options: every key of b2_generate_opts, see
    blip2c.generation.core_options(). prefixes [B]: what stands before each row. keys [B]: a row's draws depend on the
    seed and its key (its number, where none is given), not on the batch. hooks: see csrc/python/py_hooks.h.
    tap("hidden" | "attention", stage, layer, array) sees every model call: hidden [tokens, D] and, with tap_weights,
    weights, flat, row after row [H, queries, keys]. keep: "prefixes" [rows] are what each result has read and said, but
    for its last token.
    {"ids": int64 [rows, max_new], "lengths": int64 [rows], "scores": float32 [rows], "beam_indices": int32
    [rows, max_new] or None, "kv_bytes" (at the most), "step_allocations", "steps", "items",
    "items_advanced", "rows_advanced": int}."""
    def generate_stream(
        self,
        next: Callable[[bool], tuple[Any, ...] | None],
        done: Callable[[int, dict[str, Any]], Any],
        options: Mapping[str, Any],
        places: int,
        longest: int,
        longest_decoder: int = 0,
        masked: bool = False,
    ) -> dict[str, Any]: ...
    """Continuous batching: items that finish leave their place and the next ones enter.

    next(wait) gives (image_features float32 [places, D_lm] | None, ids int32 [n], rule_ids int32, mask uint8 [n] |
    None, prefix | None, decoder_ids int32 | None, key int: see generate()), or None where there is none yet (only if
    not wait: then something runs); StopIteration ends. done(index, result) has each item when it is finished, counted
    from 0 as they came; result has "ids", "lengths" and "scores" of its num_return_sequences rows. places: how many run
    together. longest: tokens of the longest prompt, its prefix included (longest_decoder: of decoder_ids). masked:
    whether prompts may have masks. Returns the counters of generate(); the batch was full where items_advanced ==
    steps * places."""
    def prefill(
        self,
        image_features: NDArray[np.float32] | DeviceArray | None,
        ids: NDArray[np.int32],
        rule_ids: NDArray[np.int32],
        prefix: Prefix | None = None,
    ) -> Prefix: ...
    """A prompt's beginning, read once: image_features [places, D_lm] for the ids of -1, ids and rule_ids [n] behind
    what `prefix` holds. UnsupportedError for encoder-decoders, which read a prompt as a whole."""
    def weights(self, only: str | None = None) -> dict[str, NDArray[Any]]: ...
    """Every weight (or the one called `only`, if there is one) by its checkpoint name, unpacked: float32 (also where
    it is quantised), float16, or uint16 holding bfloat16 bits."""
    def weight_names(self) -> list[str]: ...
    def save_packed(self, path: str | os.PathLike[str], metadata: dict[str, str], /) -> None: ...
    """All weights as they are held into one file, which Model() maps; docs/FORMATS.md has the form."""

class Prefix:
    """A beginning of a prompt that a model has read: immutable, to be shared by any number of prompts and threads.

    From Model.prefill() and Model.generate(keep=True). len() is its number of tokens."""

    def __len__(self) -> int: ...
    def head(self, length: int, /) -> Prefix: ...
    """Its first tokens, as a Prefix of their own."""
    @property
    def ids(self) -> NDArray[np.int32]: ...
    """[len(self)], -1 where an image feature stands."""
    @property
    def rule_ids(self) -> NDArray[np.int32]: ...
    """[len(self)], as the rules of generation see them."""
    @property
    def nbytes(self) -> int: ...
    """Bytes of its keys and values."""

class SafetensorsFile:
    """A validated safetensors file, mapped."""

    def __init__(self, path: str | os.PathLike[str]) -> None: ...
    def names(self) -> list[str]: ...
    """In the order of their bytes in the file."""
    def metadata(self) -> dict[str, str]: ...
    def info(self, name: str) -> tuple[str, tuple[int, ...]]: ...
    """("F16", (768, 1408)); KeyError if there is no such tensor"""
    def tensor(self, name: str) -> NDArray[Any]: ...
    """A copy, in the numpy dtype of the same name; BF16 and the F8 types as uint16 and uint8 bits."""

def parse_safetensors(data: bytes) -> None: ...
def _check_json(data: bytes, where: str, /) -> None: ...
def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, NDArray[Any]],
    dtypes: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
) -> None: ...
def search(
    step: Callable[[Any], Any],
    ids: NDArray[np.int32],
    offsets: NDArray[np.int64],
    options: Mapping[str, Any],
    stacked: bool,
    hooks: Mapping[str, Callable[..., Any]] | None = None,
    /,
) -> dict[str, Any]: ...

"""Greedy or beam search over a step function, see blip2c.search. Packed prompts: row b is ids[offsets[b]:offsets[b+1]].
step gets an int64 array [n, t] if `stacked` (all prompts equally long), else a list of n int64 arrays.
{"ids": int64 [rows, max_new], "lengths": int64 [rows], "scores": float32 [rows], "beam_indices": int32 [rows, max_new]
or None, "steps": int}"""

RULES: tuple[str, ...]

"""What stands between logits and the choice of a token, in order, by the names of the options."""

def apply_rules(
    scores: NDArray[np.float32],
    ids: NDArray[np.int32],
    prompt_length: int,
    skip: NDArray[np.int64] | None,
    options: Mapping[str, Any],
    first: str,
    end: str | None,
    /,
) -> NDArray[np.float32]: ...

"""The RULES from `first` to before `end` (None: to the last) on a copy of scores [n, V].

ids [n, t]: prompt_length ids of the prompt (< 0: an image feature), then new tokens; skip [n]: leading ids that the
repetition penalty does not see. NumericError if warpers would meet NaN or +Inf."""

# kernels: see blip2c.kernels
def _pack_weight(weight: NDArray[Any], dtype: str | None, pairs: bool, device: str, /) -> Any: ...
def _weight_parts(capsule: Any, /) -> tuple[str, int, NDArray[np.uint8], NDArray[Any], NDArray[np.float32]]: ...
def _unpack_weight(capsule: Any, /) -> NDArray[Any]: ...
def _convert(x: NDArray[Any], dtype: str, /) -> tuple[NDArray[Any], int]: ...
def _linear(
    x: NDArray[np.float32],
    weight: Any,
    bias: NDArray[np.float32] | None,
    residual: NDArray[np.float32] | None,
    activation: int,
    item_rows: int,
    device: str,
    /,
) -> NDArray[np.float32]: ...
def _time_linear(x: NDArray[np.float32], weights: list[Any], item_rows: int, /) -> list[float]: ...
def _layer_norm(
    x: NDArray[np.float32],
    weight: NDArray[np.float32] | None,
    bias: NDArray[np.float32] | None,
    eps: float,
    device: str,
    /,
) -> NDArray[np.float32]: ...
def _rms_norm(
    x: NDArray[np.float32], weight: NDArray[np.float32], eps: float, device: str, /
) -> NDArray[np.float32]: ...
def _gate(
    gate: NDArray[np.float32], up: NDArray[np.float32], activation: int, device: str, /
) -> NDArray[np.float32]: ...
def _rope(
    x: NDArray[np.float32],
    positions: NDArray[np.int32],
    inv_freq: NDArray[np.float32],
    head_dim: int,
    scaling: float,
    device: str,
    /,
) -> NDArray[np.float32]: ...
def _activation(x: NDArray[np.float32], activation: int, device: str, /) -> NDArray[np.float32]: ...
def _log_softmax(x: NDArray[np.float32], device: str, /) -> NDArray[np.float32]: ...
def _cross_entropy(
    logits: NDArray[np.float32], targets: NDArray[np.int64], ignore_index: int, /
) -> NDArray[np.float32]: ...
def _top_k(x: NDArray[np.float32], k: int, device: str, /) -> tuple[NDArray[np.float32], NDArray[np.int32]]: ...
def _first_bad_row(x: NDArray[np.float32], device: str, /) -> int: ...
def _embedding(
    table: Any, ids: NDArray[np.int32], added_to: NDArray[np.float32] | None, device: str, /
) -> NDArray[np.float32]: ...
def _patches(pixels: NDArray[np.float32], patch: int, device: str, /) -> NDArray[np.float32]: ...
def _copy_rows(
    out: NDArray[np.float32] | DeviceArray,
    out_rows: NDArray[np.int32] | None,
    x: NDArray[np.float32] | DeviceArray,
    x_rows: NDArray[np.int32] | None,
    n: int,
    device: str,
    /,
) -> Any: ...
def _add_rows(x: NDArray[np.float32], rows: NDArray[np.float32], device: str, /) -> NDArray[np.float32]: ...
def _distance_bias(table: NDArray[np.float32], max_distance: int, bidirectional: bool, /) -> NDArray[np.float32]: ...
def _attention(
    q: NDArray[np.float32],
    q_offsets: NDArray[np.int32],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    prefix_starts: NDArray[np.int32],
    prefix_lens: NDArray[np.int32],
    k_suffix: NDArray[np.float32] | None,
    v_suffix: NDArray[np.float32] | None,
    suffix_slots: NDArray[np.int32] | None,
    suffix_lens: NDArray[np.int32] | None,
    key_mask: NDArray[np.uint8] | None,
    distance_bias: NDArray[np.float32] | None,
    causal: bool,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    window: int,
    weights: bool,
    device: str,
    /,
) -> NDArray[np.float32]: ...
def _fma_peak() -> float: ...
def _bf16_peak() -> float: ...
def _int8_peak() -> float: ...
def _picture_scores(
    texts: NDArray[np.float32], records: NDArray[np.uint8], queries: int, dtype: str, device: str = "cpu", /
) -> NDArray[np.float32]: ...

"""[T, P] against records uint8 [N, bytes] (csrc/ops/ops.h) of `queries` vectors -> [T, N]: the largest products."""
