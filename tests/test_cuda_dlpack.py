"""What DLPack can say besides ordinary arrays: managed and pinned memory, nothing at all, and nonsense.

Whatever it is, the array is given back once, and the model goes on.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2c
from blip2c import DeviceArray, kernels
from cuda_callers import HOST_TO_DEVICE, MANAGED, CallerArray, Pinned, Taken, copied, free_bytes
from helpers import random_checkpoint, random_pixels

F32 = np.float32


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(F32)


@pytest.fixture(scope="module")
def folder(cuda: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("opt"), seed=4)


@pytest.fixture(scope="module")
def there(folder: Path, cuda: str) -> Any:
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, device=cuda)


# ---- memory of other kinds ----


@pytest.mark.parametrize("device", [0, 1])
def test_managed_memory_is_used_where_it_lies(there: Any, device: int) -> None:
    """Whichever device it was allocated on: all of them may use it."""
    pixels = random_pixels(there.config, 2)
    want = there.vision_model(pixels).last_hidden_state
    there.vision_model(CallerArray(pixels))
    given = CallerArray(pixels, device, kind=MANAGED)
    went = copied(HOST_TO_DEVICE)
    found = there.vision_model(given).last_hidden_state
    assert copied(HOST_TO_DEVICE) - went < pixels.nbytes / 2
    assert isinstance(found, DeviceArray)
    assert np.array_equal(found.numpy(), want)
    assert given.deleted == 1
    view = there._core.take(CallerArray(pixels, device, kind=MANAGED), "x")
    assert np.array_equal(view[:, 1].numpy(), pixels[:, 1])


def test_managed_memory_comes_to_a_model_on_the_processor(folder: Path, there: Any) -> None:
    here = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)
    pixels = random_pixels(here.config, 1)
    found = here.vision_model(CallerArray(pixels, kind=MANAGED)).last_hidden_state
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, here.vision_model(pixels).last_hidden_state)


def test_pinned_memory_is_of_the_host(there: Any) -> None:
    pixels = random_pixels(there.config, 1)
    found = there.vision_model(Pinned(pixels)).last_hidden_state
    assert isinstance(found, np.ndarray)
    assert np.array_equal(found, there.vision_model(pixels).last_hidden_state)
    x = normal(3, 8)
    on_device = kernels.gelu(Pinned(x), device="cuda")
    assert isinstance(on_device, np.ndarray)
    assert np.array_equal(on_device, kernels.gelu(x, device="cuda"))


# ---- arrays that are unusual and right ----


def test_no_strides_and_an_offset_in_order_are_used_in_place(there: Any) -> None:
    values = normal(3, 64)
    given = CallerArray(values, wrong={"strides": None})
    view = there._core.take(given, "x")
    assert np.array_equal(view.numpy(), values)
    taken = Taken(view)
    assert taken.tensor.data == given.data.value
    taken.drop()
    rest = CallerArray(values).view([2, 64], [64, 1], offset=256)
    view = there._core.take(rest, "x")
    assert np.array_equal(view.numpy(), values[1:])
    taken = Taken(view)
    assert taken.tensor.data == rest.data.value + 256
    taken.drop()


@pytest.mark.parametrize(
    ("shape", "strides", "first", "seen"),
    [
        ([4, 5, 3], [-15, -3, -1], 59, np.s_[::-1, ::-1, ::-1]),
        ([2, 5, 3], [30, 3, -1], 2, np.s_[::2, :, ::-1]),
        ([], [], 17, np.s_[1, 0, 2]),
        ([1, 4, 1, 5, 1, 3, 1, 1], [1, 15, 0, 3, 1, 1, 7, 1], 0, np.s_[None, :, None, :, None, :, None, None]),
        ([4, 6, 3], [15, 0, 1], 3, (slice(None), [1] * 6)),
    ],
)  # fmt: skip
def test_views_of_any_strides(there: Any, shape: list[int], strides: list[int], first: int, seen: Any) -> None:
    values = normal(4, 5, 3)
    given = CallerArray(values).view(shape, strides, offset=4 * first)
    found = there._core.take(given, "x")
    assert found.shape == tuple(shape)
    assert np.array_equal(found.numpy(), values[seen])
    del found
    assert given.deleted == 1


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0,), (2, 0, 1 << 40)])
@pytest.mark.parametrize("wrong", [{"data": None}, {"data": None, "strides": None}, {}], ids=str)
def test_nothing_may_lie_nowhere(there: Any, shape: tuple[int, ...], wrong: dict[str, Any]) -> None:
    given = CallerArray(normal(1), wrong=wrong).view(shape, [1] * len(shape))
    found = there._core.take(given, "x")
    assert found.shape == shape
    assert found.numpy().shape == shape
    del found
    assert given.deleted == 1
    with pytest.raises(ValueError, match="pixel_values"):
        there.vision_model(CallerArray(normal(1), wrong=wrong).view((0, 3, 28, 28), [1] * 4))


def test_what_may_not_be_written_is_only_read(there: Any) -> None:
    pixels = random_pixels(there.config, 1)
    given = CallerArray(pixels)
    given.flags = 1
    given.delete = lambda _: None  # type: ignore[method-assign]
    found = there.vision_model(given).last_hidden_state
    assert np.array_equal(found.numpy(), there.vision_model(pixels).last_hidden_state)
    assert np.array_equal(given.read(), pixels)
    rows = CallerArray(normal(4, 64))
    rows.flags = 1
    rows.delete = lambda _: None  # type: ignore[method-assign]
    changed = kernels.copy_rows(rows, normal(1, 64, seed=1), np.array([2], np.int32), np.array([0], np.int32),
                                device="cuda")  # fmt: skip
    assert np.array_equal(changed.numpy()[2], normal(1, 64, seed=1)[0])
    assert np.array_equal(rows.read(), rows.values)


# ---- nonsense ----

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"code": 6, "bits": 8}, TypeError, "x must be floats, found bool8"),
    ({"code": 0, "bits": 8}, TypeError, "x must be floats, found int8"),
    ({"code": 1, "bits": 16}, TypeError, "x must be floats, found uint16"),
    ({"code": 2, "bits": 8}, TypeError, "x must be floats, found float8"),
    ({"code": 4, "bits": 32}, TypeError, "x must be floats, found bfloat32"),
    ({"code": 5, "bits": 64}, TypeError, "x must be floats, found DLPack type 5"),
    ({"code": 255, "bits": 255}, TypeError, "x must be floats, found DLPack type 255"),
    ({"lanes": 4}, TypeError, "x must be floats, found elements of 4 numbers"),
    ({"device_id": 1}, ValueError, "x: lies on cuda:1, expected cuda:0"),
    ({"device_type": 1}, ValueError, "x: lies on a device of DLPack's type 1, expected cuda:0"),
    ({"ndim": -1}, ValueError, "x: expected at most 8 axes, found -1"),
    ({"ndim": 9}, ValueError, "x: expected at most 8 axes, found 9"),
    ({"shape": None}, BufferError, "x: DLPack's tensor has 2 axes and no shape"),
    ({"data": None}, BufferError, "x: its data is not in the memory of cuda:0"),
    ({"offset": 1 << 40}, BufferError, "x: its data is not in the memory of cuda:0"),
    ({"offset": (1 << 64) - (1 << 30)}, BufferError, "x: its data is not in the memory of cuda:0"),
    ({"offset": 2}, BufferError, "x: expected elements at multiples of 4 bytes"),
]  # fmt: skip


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize(("wrong", "error", "words"), WRONG, ids=[str(w[0]) for w in WRONG])
def test_tensors_that_are_wrong(
    there: Any, wrong: dict[str, Any], error: type[Exception], words: str, versioned: bool
) -> None:
    given = CallerArray(normal(4, 64), wrong=wrong, versioned=versioned).view([3, 64], [64, 1])
    with pytest.raises(error, match=words):
        there._core.take(given, "x")
    assert given.deleted == 1


@pytest.mark.parametrize(
    ("shape", "strides", "error", "words"),
    [
        ([-1, 64], [64, 1], ValueError, "axis 0 of DLPack's shape is -1"),
        ([2, -(1 << 63)], [64, 1], ValueError, "axis 1 of DLPack's shape is -9223372036854775808"),
        ([1 << 32, 1 << 32], [1, 1], ValueError, "axis 0 of DLPack's shape is 4294967296"),
        ([2, 64], [1 << 62, 1], BufferError, "not in the memory"),
        ([2, 64], [-(1 << 63), 1], BufferError, "not in the memory"),
        ([2] * 8, [1 << 59] * 8, BufferError, "not in the memory"),
        ([2, 64], [1 << 38, 1], BufferError, "not in the memory"),
        ([2, 64], [-(1 << 38), 1], BufferError, "not in the memory"),
        ([2, 64], [-32, 1], BufferError, "not in the memory"),
        ([9, 32], [32, 1], BufferError, "not in the memory"),
        ([1 << 50], [1], BufferError, "not in the memory"),
    ],
)
def test_shapes_and_strides_that_are_wrong(
    there: Any, shape: list[int], strides: list[int], error: type[Exception], words: str
) -> None:
    given = CallerArray(normal(4, 64)).view(shape, strides)
    with pytest.raises(error, match=words):
        there._core.take(given, "x")
    assert given.deleted == 1


class Answers:
    """Anything as a device and as a capsule."""

    def __init__(self, device: Any, capsule: Any = None) -> None:
        self.device, self.capsule = device, capsule

    def __dlpack_device__(self) -> Any:
        return self.device

    def __dlpack__(self, **options: Any) -> Any:
        if isinstance(self.capsule, Exception):
            raise self.capsule
        return self.capsule


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (Answers((2, 0)), BufferError, "x: expected a DLPack capsule that nobody has used yet, found NoneType"),
        (Answers((2, 0), 7), BufferError, "found int"),
        (Answers((2, 0), TypeError("not today")), TypeError, "not today"),
        (Answers((2, 0), RuntimeError("not today")), RuntimeError, "not today"),
        (Answers((2, 1 << 40)), TypeError, "x: __dlpack_device__ gave no pair of numbers"),
        (Answers([2, 0]), TypeError, "x: __dlpack_device__ gave no pair of numbers"),
        (Answers((2, 0, 0)), TypeError, "x: __dlpack_device__ gave no pair of numbers"),
        (Answers((2, 1)), ValueError, "x: lies on cuda:1, expected cuda:0"),
        (Answers((2, -1)), ValueError, "x: lies on cuda:-1, expected cuda:0"),
        (Answers((10, 0)), ValueError, "x: lies on a device of DLPack's type 10, expected cuda:0"),
        (3.5, AttributeError, "__dlpack_device__"),
    ],
)
def test_objects_that_are_wrong(there: Any, given: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        there._core.take(given, "x")


def test_nonsense_leaves_nothing_behind(there: Any) -> None:
    pixels = random_pixels(there.config, 1)
    want = there.vision_model(pixels).last_hidden_state

    def fail() -> None:
        for wrong, error, _ in WRONG:
            with pytest.raises(error):
                there.vision_model(CallerArray(pixels, wrong=wrong))

    fail()
    before = free_bytes()
    fail()
    assert free_bytes() == before
    assert np.array_equal(there.vision_model(CallerArray(pixels)).last_hidden_state.numpy(), want)


# ---- DeviceArray ----


def test_arrays_of_more_axes_than_a_device_is_told(there: Any) -> None:
    values = normal(2, 6)
    most = there._core.put(values.reshape(1, 2, 1, 1, 6, 1, 1, 1))
    assert np.array_equal(most[..., ::-1, :].numpy(), values.reshape(most.shape))
    with pytest.raises(ValueError, match="DeviceArray: expected at most 8 axes, found 9"):
        there._core.put(values.reshape([1] * 7 + [2, 6]))


def test_copies_have_memory_of_their_own(there: Any) -> None:
    values = normal(3, 4, 5)
    array = there._core.put(values)
    copy = array[1, ::-1].copy()
    assert np.array_equal(copy.numpy(), values[1, ::-1])
    whole, apart = Taken(array), Taken(array.copy())
    assert whole.tensor.data != apart.tensor.data
    whole.drop()
    apart.drop()
    before = free_bytes()
    del array
    assert np.array_equal(copy.numpy(), values[1, ::-1])
    assert free_bytes() >= before
