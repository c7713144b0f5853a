"""Arrays that lie on a device go in and come out without a copy through the host, as DLPack and the array API say.

The caller is a library of its own on the stand-in (cuda_callers): its work is put off until somebody waits for it,
memory that was given back must not be touched, and every copy is counted.
"""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blip2c
from blip2c import _core, kernels
from blip2c._core import DeviceArray
from blip2c.inputs import to_numpy
from cuda_callers import DEVICE_TO_HOST, HOST_TO_DEVICE, CallerArray, Pinned, Stream, Taken, copied, free_bytes
from helpers import prompt_ids, random_checkpoint, random_pixels
from running import run_python

F32 = np.float32


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@pytest.fixture(scope="module")
def folder(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("opt"), seed=4)


@pytest.fixture(scope="module")
def there(folder: Path, cuda: str) -> Any:
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)


# ---- in and out ----


def test_a_forward_pass_on_the_device(there: Any) -> None:
    pixels, ids = random_pixels(there.config, 2), prompt_ids(there.config, 2, 9)
    want = there(pixels, ids, output_hidden_states=True, output_attentions=True)
    there(CallerArray(pixels), ids)  # what is made once
    given = CallerArray(pixels)
    went, came = copied(HOST_TO_DEVICE), copied(DEVICE_TO_HOST)
    found = there(given, ids)
    assert copied(HOST_TO_DEVICE) - went < pixels.nbytes / 2  # arrays of indices only
    assert copied(DEVICE_TO_HOST) - came <= 1024  # notes of NaN
    assert given.deleted == 1
    assert isinstance(found.logits, DeviceArray)
    assert found.logits.device == "cuda:0"
    assert np.array_equal(found.logits.numpy(), want.logits)
    first = found.qformer_outputs.pooler_output
    assert np.array_equal(np.asarray(first), want.qformer_outputs.pooler_output)
    again = there(CallerArray(pixels), ids, output_hidden_states=True, output_attentions=True)
    for part in ("vision_outputs", "qformer_outputs", "language_model_outputs"):
        for key in ("hidden_states", "attentions"):
            for ours, theirs in zip(again[part][key], want[part][key], strict=True):
                assert isinstance(ours, DeviceArray)
                assert np.array_equal(ours.numpy(), theirs)


def test_parts_take_each_others_results(there: Any) -> None:
    pixels = random_pixels(there.config, 2)
    want = there.get_image_features(pixels)
    states = there.vision_model(CallerArray(pixels)).last_hidden_state
    queries = there._core.put(np.asarray(there.query_tokens))
    read = there.qformer(queries, encoder_hidden_states=states).last_hidden_state
    features = there.language_projection(read)
    assert isinstance(features, DeviceArray)
    assert np.abs(features.numpy() - want.pooler_output).max() <= 1e-5 * np.abs(want.pooler_output).max()


def test_embeddings_on_the_device(there: Any) -> None:
    pixels, ids = random_pixels(there.config, 2), prompt_ids(there.config, 2, 7)
    embeds = there.get_input_embeddings()(np.ascontiguousarray(ids))
    embeds = np.asarray(embeds, F32)
    want = there(pixels, ids, inputs_embeds=embeds)
    found = there(CallerArray(pixels), ids, inputs_embeds=CallerArray(embeds))
    assert np.array_equal(found.logits.numpy(), want.logits)
    host = there.generate(pixels, ids, inputs_embeds=embeds, max_new_tokens=3)
    for other in (CallerArray(embeds), embeds):  # on the device or not: features are there
        assert np.array_equal(there.generate(CallerArray(pixels), ids, inputs_embeds=other, max_new_tokens=3), host)


def test_generate_takes_pixels_where_they_lie(there: Any) -> None:
    pixels, ids = random_pixels(there.config, 2), prompt_ids(there.config, 2, 9)
    want = there.generate(pixels, ids, max_new_tokens=4)
    assert np.array_equal(there.generate(CallerArray(pixels), ids, max_new_tokens=4), want)


def test_a_retrieval_model(cuda: str, tmp_path: Path) -> None:
    model = blip2c.Blip2ForImageTextRetrieval.from_pretrained(
        random_checkpoint(tmp_path, retrieval=True, seed=2), device=cuda
    )
    pixels, ids = random_pixels(model.config, 2), np.array([[64] * 4 + [5, 6, 7, 8], [64] * 4 + [9, 10, 1, 2]])
    for matching in (True, False):
        want = model(pixels, ids, use_image_text_matching_head=matching)
        found = model(CallerArray(pixels), ids, use_image_text_matching_head=matching)
        for key in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
            assert isinstance(found[key], DeviceArray)
            assert np.array_equal(found[key].numpy(), want[key])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_floats_are_converted_on_the_device(there: Any, dtype: str) -> None:
    pixels = random_pixels(there.config, 1)
    if dtype == "bfloat16":
        values = (pixels.view(np.uint32) >> 16).astype(np.uint16)
        rounded = (values.astype(np.uint32) << 16).view(F32)
    else:
        values = pixels.astype(dtype)
        rounded = values.astype(F32)
    came = copied(DEVICE_TO_HOST)
    given = CallerArray(values, dtype=dtype)
    found = there.vision_model(given).last_hidden_state
    assert copied(DEVICE_TO_HOST) - came <= 1024
    assert given.deleted == 1
    assert np.array_equal(found.numpy(), there.vision_model(rounded).last_hidden_state)


@pytest.mark.parametrize("versioned", [True, False])
def test_strided_views(there: Any, versioned: bool) -> None:
    """Channels last, every second picture, from a place that no vector may be read from."""
    pixels = random_pixels(there.config, 3)
    batch, channels, height, width = pixels.shape
    flat = np.concatenate([np.zeros(1, F32), pixels.transpose(0, 2, 3, 1).reshape(-1)])
    strides = [2 * channels * height * width, 1, width * channels, channels]
    given = CallerArray(flat, versioned=versioned).view([2, channels, height, width], strides, offset=4)
    found = there.vision_model(given).last_hidden_state.numpy()
    assert np.array_equal(found, there.vision_model(np.ascontiguousarray(pixels[::2])).last_hidden_state)
    assert batch == 3


def test_arrays_beside_each_other(there: Any) -> None:
    a, b = normal(2, 3, 4), normal(2, 2, 4, seed=1)
    joined = _core._join((there._core.put(a), there._core.put(b)[:, ::-1]), 1)
    assert np.array_equal(joined.numpy(), np.concatenate([a, b[:, ::-1]], axis=1))
    with pytest.raises(ValueError, match="shape but for axis 0"):
        _core._join((joined, there._core.put(a)), 0)
    with pytest.raises(TypeError, match="DeviceArrays"):
        _core._join((joined, a), 1)  # type: ignore[arg-type]


# ---- what does not fit ----


def test_wrong_inputs_name_what_they_are(there: Any) -> None:
    pixels = random_pixels(there.config, 1)
    other = CallerArray(pixels, device=1)
    with pytest.raises(ValueError, match="pixel_values: lies on cuda:1, expected cuda:0"):
        there.vision_model(other)
    assert not other.asked
    integers = CallerArray(pixels.astype(np.int64))
    with pytest.raises(TypeError, match="pixel_values must be floats, found int64"):
        there.vision_model(integers)
    assert integers.deleted == 1
    twice = CallerArray(pixels)
    first = there._core.take(twice, "pixel_values")

    class Again:
        def __dlpack_device__(self) -> tuple[int, int]:
            return 2, 0

        def __dlpack__(self, **options: Any) -> Any:
            return twice.capsule

    with pytest.raises(BufferError, match="nobody has used yet, found used_dltensor_versioned"):
        there.vision_model(Again())
    assert twice.deleted == 0
    del first
    assert twice.deleted == 1
    holes = pixels.copy()
    holes[0, 1, 2, 3] = np.nan
    with pytest.raises(blip2c.NumericError, match="pixel_values: row 0 holds values that are not finite"):
        there.vision_model(CallerArray(holes))
    liar = CallerArray(pixels)
    data, liar.data = liar.data, liar.values.ctypes.data
    liar.delete = lambda _: None  # type: ignore[method-assign]
    with pytest.raises(BufferError, match="its data is not in the memory of cuda:0"):
        there.vision_model(liar)
    assert data.value != liar.data
    with pytest.raises(ValueError, match=r"must be \[batch, 3"):
        there.vision_model(CallerArray(pixels[0]))
    newer = CallerArray(pixels)
    newer.major = 2
    with pytest.raises(BufferError, match="expected DLPack 1, found 2"):
        there.vision_model(newer)


def test_errors_leave_nothing_behind(there: Any, folder: Path) -> None:
    pixels, ids = random_pixels(there.config, 1), prompt_ids(there.config, 1, 7)

    def fail() -> None:
        given = CallerArray(pixels)
        with pytest.raises(ValueError, match="placeholders"):
            there(given, np.zeros((1, 3), np.int64))
        assert given.deleted == 1

    for _ in range(8):  # both chunks of a queue's host arrays are made by then
        fail()
        there(CallerArray(pixels), ids)
    gc.collect()
    before = free_bytes()
    for _ in range(3):
        fail()
        there(CallerArray(pixels), ids)
    gc.collect()
    assert free_bytes() == before


def test_a_producer_that_is_gone(there: Any) -> None:
    """What makes the pixels has not run when their owner is forgotten: the capsule alone keeps them."""
    pixels = random_pixels(there.config, 1)
    want = there.vision_model(pixels).last_hidden_state
    given = CallerArray(pixels)
    taken = there._core.take(given, "pixel_values")
    kept = given.kept
    del given
    gc.collect()
    assert np.array_equal(there.vision_model(taken).last_hidden_state.numpy(), want)
    del taken
    assert kept


# ---- DeviceArray ----


@pytest.mark.parametrize("versioned", [True, False])
def test_what_is_exported_outlives_model_and_array(folder: Path, cuda: str, versioned: bool) -> None:
    gc.collect()
    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)
    pixels = random_pixels(model.config, 2)
    want = model.vision_model(pixels).last_hidden_state
    result = model.vision_model(CallerArray(pixels)).last_hidden_state
    taken = Taken(result, versioned)
    assert (taken.tensor.device_type, taken.tensor.device_id, taken.tensor.code, taken.tensor.bits) == (2, 0, 2, 32)
    loaded = free_bytes()
    del result, model
    gc.collect()
    assert free_bytes() > loaded
    assert np.array_equal(taken.read(), want)
    before = free_bytes()
    taken.drop()
    assert free_bytes() > before


def test_an_array_outlives_its_model(folder: Path, cuda: str) -> None:
    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)
    pixels = random_pixels(model.config, 1)
    result, want = model.vision_model(CallerArray(pixels)).last_hidden_state, model.vision_model(pixels)
    taken, source = None, CallerArray(pixels)
    taken = model._core.take(source, "x")
    del model
    gc.collect()
    assert np.array_equal(result[:, 1:, ::2].numpy(), want.last_hidden_state[:, 1:, ::2])
    assert np.array_equal(taken.numpy(), pixels)
    assert source.deleted == 0
    del taken
    assert source.deleted == 1


@pytest.mark.parametrize("stream", ["default", "own"])
def test_memory_that_others_use_is_not_used_again_too_early(there: Any, stream: str) -> None:
    """The consumer's stream still reads a result that it has given back."""
    from ctypes import byref, c_size_t, c_void_p

    from cuda_callers import check, library

    pixels = random_pixels(there.config, 2)
    want = there.vision_model(pixels).last_hidden_state
    result = there.vision_model(CallerArray(pixels)).last_hidden_state
    handle = c_void_p(1) if stream == "default" else Stream().handle
    taken, copy = Taken(result, stream=handle.value), c_void_p()
    check(library().caller_alloc(0, want.nbytes, byref(copy)))
    # Work in the consumer's stream, put off: device to device.
    check(library().caller_move(copy, c_void_p(taken.tensor.data), c_size_t(want.nbytes), handle))
    taken.drop()
    del result
    there.vision_model(CallerArray(np.zeros_like(pixels)))
    out = np.empty_like(want)
    check(library().caller_read(out.ctypes.data_as(c_void_p), copy, c_size_t(out.nbytes), handle))
    assert np.array_equal(out, want)
    check(library().caller_free(copy))


def test_indices_shapes_and_protocol(there: Any) -> None:
    values = normal(3, 4, 5)
    a = there._core.put(values)
    assert (a.shape, a.ndim, a.size, len(a), a.dtype, a.device) == ((3, 4, 5), 3, 60, 3, F32, "cuda:0")
    assert repr(a) == "DeviceArray(shape=(3, 4, 5), dtype=float32, device=cuda:0)"
    for key in (1, (slice(None), -1), (0, 1, 2), (..., slice(None, None, -2)), (None, 2), np.int64(1)):
        assert np.array_equal(a[key].numpy(), values[key])
    assert np.array_equal(a.T.reshape(-1).numpy(), values.T.reshape(-1))
    assert np.array_equal(np.asarray(a, np.float64), values.astype(np.float64))
    assert np.array_equal(np.from_dlpack(a, device="cpu"), values)
    for key in ([0, 1], np.array([0]), True, values > 0, torch.tensor([0, 1]), (0, torch.tensor([True, False]))):
        with pytest.raises(TypeError, match="integers and slices"):  # NumPy would read the data, from the host
            a[key]
    assert np.array_equal(a[torch.tensor(2), 1].numpy(), values[2, 1])
    with pytest.raises(IndexError):
        a[7]
    with pytest.raises(ValueError, match="reshape"):
        a.reshape(7)
    most = a[(None,) * 5]
    assert np.array_equal(most.T.numpy(), values[(None,) * 5].T)
    for more in (lambda: most[None], lambda: a.reshape(*[1] * 6, 3, 4, 5)):
        with pytest.raises(ValueError, match="at most 8 axes, found 9"):
            more()
    wrong: list[tuple[dict[str, Any], type]] = [
        ({"stream": 0}, ValueError),
        ({"stream": "x"}, TypeError),
        ({"max_version": 1}, TypeError),
        ({"dl_device": (2, 1)}, BufferError),
        ({"dl_device": (1, 0), "copy": False}, BufferError),
    ]
    for options, error in wrong:
        with pytest.raises(error):
            a.__dlpack__(**options)
    assert a.__dlpack_device__() == (2, 0)
    same, other = Taken(a), Taken(a, copy=True)
    assert same.tensor.data != other.tensor.data
    assert (same.managed.flags, other.managed.flags) == (0, 2)
    assert np.array_equal(other.read(), values)
    same.drop()
    other.drop()


def test_arrays_while_their_model_goes(folder: Path, cuda: str) -> None:
    """A copy to the host is under way in one thread while the other forgets the model."""
    pixels = np.zeros((4, 3, 32, 32), F32)
    with ThreadPoolExecutor(1) as pool:
        for _ in range(6):
            model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)
            array = model._core.put(pixels)
            copies = [pool.submit(lambda a: (a.T.numpy(), a[1:].T.reshape(-1).numpy()), array) for _ in range(20)]
            del model
            gc.collect()
            for copy in copies:
                assert not copy.result()[0].any()


def test_read_only_stays_read_only(there: Any) -> None:
    given = CallerArray(normal(4, 64))
    given.flags = 1
    view = there._core.take(given, "x")
    with pytest.raises(BufferError, match="may not be written"):
        view.__dlpack__()
    taken = Taken(view)
    assert taken.managed.flags == 1
    del view
    assert given.deleted == 0
    taken.drop()
    assert given.deleted == 1


def test_an_unused_capsule_gives_back(there: Any) -> None:
    given = CallerArray(normal(4, 64))
    capsule = there._core.take(given, "x").__dlpack__()
    assert given.deleted == 0
    del capsule
    assert given.deleted == 1


# ---- kernels ----


def test_kernels_on_device_arrays(cuda: str) -> None:
    x, weight, bias = normal(5, 64), normal(48, 64, seed=1), normal(48, seed=2)
    gamma = normal(64, seed=3)
    came = copied(DEVICE_TO_HOST)
    normed = kernels.layer_norm(CallerArray(x), CallerArray(gamma), device=cuda)
    out = kernels.linear(normed, CallerArray(weight), CallerArray(bias), "gelu", device=cuda)
    rows = kernels.copy_rows(out, out, np.array([0], np.int32), np.array([4], np.int32), device=cuda)
    values, ids = kernels.top_k(out, 3, device=cuda)
    assert copied(DEVICE_TO_HOST) - came <= 1024
    assert isinstance(out, DeviceArray)
    host = kernels.linear(kernels.layer_norm(x, gamma, device=cuda), weight, bias, "gelu", device=cuda)
    assert isinstance(host, np.ndarray)
    assert np.array_equal(out.numpy(), host)
    assert np.array_equal(rows.numpy()[0], host[4])
    want = kernels.top_k(host, 3, device=cuda)
    assert np.array_equal(values.numpy(), want[0])
    assert np.array_equal(ids, want[1])
    q = normal(2, 7, 32)
    a = kernels.attention(CallerArray(q), CallerArray(q), CallerArray(q), 2, causal=True, device=cuda)
    assert np.array_equal(a.numpy(), kernels.attention(q, q, q, 2, causal=True, device=cuda))
    half = CallerArray(x.astype(np.float16))
    assert np.array_equal(kernels.gelu(half, device=cuda).numpy(),
                          kernels.gelu(x.astype(np.float16).astype(F32), device=cuda))  # fmt: skip
    odd = normal(6, 33)  # a weight whose rows devices pad
    assert np.array_equal(kernels.linear(CallerArray(normal(2, 33)), CallerArray(odd), device=cuda).numpy(),
                          kernels.linear(normal(2, 33), odd, device=cuda))  # fmt: skip
    for device, words in (("cpu", "expected the host"), ("cuda:1", "lies on cuda:0, expected cuda:1")):
        with pytest.raises(ValueError, match=words):
            kernels.gelu(CallerArray(x), device=device)
        with pytest.raises(ValueError, match=words):
            kernels.gelu(normed, device=device)


def test_kernels_on_tensors_of_the_host() -> None:
    x, weight = torch.randn(3, 8), torch.randn(5, 8)
    out = kernels.linear(x, weight)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, torch.nn.functional.linear(x, weight), rtol=1e-5, atol=1e-5)
    values, ids = kernels.top_k(x, 2)
    assert torch.equal(values, torch.topk(x, 2).values)
    assert ids.dtype == torch.int32
    assert isinstance(kernels.layer_norm(x.numpy()), np.ndarray)


def test_arrays_of_the_host_are_read_where_they_lie() -> None:
    values = normal(3, 4)
    for given in (torch.from_numpy(values), Pinned(values)):
        assert np.shares_memory(to_numpy(given), values)
    assert np.array_equal(kernels.gelu(Pinned(values)), kernels.gelu(values))


# ---- several devices, several threads, no memory ----


def test_models_on_two_devices_in_two_threads(folder: Path, cuda: str) -> None:
    load = blip2c.Blip2ForConditionalGeneration.from_pretrained
    models = [load(folder, device=f"cuda:{i}") for i in (0, 1)]
    pixels = random_pixels(models[0].config, 2)
    want = models[0].vision_model(pixels).last_hidden_state

    def work(i: int) -> None:
        for _ in range(3):
            given = CallerArray(pixels, device=i)
            found = models[i].vision_model(given).last_hidden_state
            assert found.device == f"cuda:{i}"
            assert np.array_equal(found.numpy(), want)
            assert given.deleted == 1

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, (0, 1)))


OUT_OF_MEMORY = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
import blip2c
from blip2c import kernels
from cuda_callers import CallerArray
from helpers import random_pixels
model = blip2c.Blip2ForConditionalGeneration.from_pretrained({folder!r}, device="cuda")
pixels = random_pixels(model.config, 1)
want = model.vision_model(pixels).last_hidden_state
given = CallerArray(np.repeat(pixels.astype(np.float16), 2048, axis=0))
for _ in range(2):
    try:
        model.vision_model(given)
    except MemoryError as error:
        assert "bytes on cuda:0, which has" in str(error), error
    else:
        raise AssertionError("enough memory")
    assert given.deleted == 1
    given = CallerArray(np.repeat(pixels.astype(np.float16), 2048, axis=0))
assert np.array_equal(model.vision_model(CallerArray(pixels)).last_hidden_state.numpy(), want)
"""


def test_out_of_memory_leaves_the_model(folder: Path, cuda: str) -> None:
    script = OUT_OF_MEMORY.format(tests=str(Path(__file__).parent), folder=str(folder))
    done = run_python(script, BLIP2C_CUDA_HOST_MEMORY=str(24 << 20))
    assert done.returncode == 0, done.stderr


def test_every_allocation_may_fail(there: Any) -> None:
    """Whatever of the host's memory is refused: the caller's array comes back, and the next call works."""
    pixels = random_pixels(there.config, 1)
    want = there.vision_model(CallerArray(pixels)).last_hidden_state.numpy()
    for countdown in range(1, 40):
        given = CallerArray(pixels)
        _core._fail_allocation_after(countdown)
        try:
            there._core.take(given, "x").__dlpack__()
            assert countdown > 2
            break
        except MemoryError:
            pass
        finally:
            _core._fail_allocation_after(0)
        assert given.deleted == 1
    assert np.array_equal(there.vision_model(CallerArray(pixels)).last_hidden_state.numpy(), want)
