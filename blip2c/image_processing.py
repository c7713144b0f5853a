"""`BlipImageProcessor`: pictures to pixel values, bit for bit what transformers' BlipImageProcessorPil 5.23 gives.

    RGB -> resize (Pillow) -> x * rescale_factor in float64, rounded to float32 -> (x - mean) / std in float32

(transformers' other, torchvision one differs from both by up to 2/255.)
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2c._core import CheckpointError, UnsupportedError
from blip2c.batch import BatchFeature
from blip2c.images import PictureError, array_to_bytes, composite_on_white, is_torch, open_picture, to_rgb

OPENAI_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

DEFAULTS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"height": 384, "width": 384},
    "default_to_square": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": OPENAI_CLIP_MEAN,
    "image_std": OPENAI_CLIP_STD,
}

# Accepted in their neutral value only: what they ask for is not computed here, and must not be dropped in silence.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "do_center_crop": (None, False),
    "do_pad": (None, False),
    "data_format": (None, "channels_first", "first"),
    "device": (None, "cpu"),
    "image_seq_length": (None,),
}
# Stand in saved files and say nothing about pixels.
IGNORED = frozenset(
    [
        "crop_size",
        "pad_size",
        "image_processor_type",
        "feature_extractor_type",
        "processor_class",
        "disable_grouping",
        "input_data_format",
        "return_tensors",
        "_valid_processor_keys",
        "backend",
        "use_fast",
    ]
)
SIZE_KEYS = (
    {"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"},
)  # fmt: skip


def _size(value: Any, square: bool) -> dict[str, int]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = {"height": value, "width": value} if square else {"shortest_edge": value}
    elif isinstance(value, list | tuple) and len(value) == 2:
        value = {"height": value[0], "width": value[1]}
    try:
        size = {key: side for key, side in dict(value).items() if side is not None}
    except (TypeError, ValueError):
        raise ValueError(f"size must be an integer, a pair or a dictionary, found {value!r}") from None
    if set(size) not in SIZE_KEYS:
        raise ValueError(
            f"size must have height and width (or shortest_edge, or max_height and max_width), found {size}"
        )
    for key, side in size.items():
        if isinstance(side, bool) or not isinstance(side, int) or not 0 < side <= 1 << 16:
            raise ValueError(f"size[{key!r}] must be an integer in 1..65536, found {side!r}")
    return size


def _target_size(height: int, width: int, size: Mapping[str, int]) -> tuple[int, int]:
    """(height, width) after resizing, with the roundings of transformers 5.23."""
    if "height" in size:
        return size["height"], size["width"]
    if "max_height" in size:
        scale = min(size["max_height"] / height, size["max_width"] / width)
        return int(height * scale), int(width * scale)
    short, long = min(height, width), max(height, width)
    edge = size["shortest_edge"]
    raw: float = edge
    if "longest_edge" in size:
        if float(long) / float(short) * edge > size["longest_edge"]:
            raw = size["longest_edge"] * float(short) / float(long)
            edge = round(raw)
        if edge == short:
            return height, width
        factor = raw
        return (int(factor * height / width), edge) if width < height else (edge, int(factor * width / height))
    other = int(edge * long / short)
    return (other, edge) if width <= height else (edge, other)


def _per_channel(name: str, value: Any, channels: int) -> NDArray[np.float32]:
    values = list(value) if isinstance(value, Sequence | np.ndarray) else [value] * channels
    if len(values) != channels:
        raise ValueError(f"{name} must have {channels} numbers, found {len(values)}")
    return np.array(values, dtype=np.float32)


class BlipImageProcessor:
    """Pictures to `pixel_values` [B, 3, S, S] float32 (upstream: transformers' BlipImageProcessorPil).

    Options, each of which a call may override: do_convert_rgb, do_resize, size, resample (Pillow's number),
    default_to_square, do_rescale, rescale_factor, do_normalize, image_mean, image_std; input_data_format in a call.
    What blip2c does not compute (do_center_crop, do_pad, data_format="channels_last", device) raises UnsupportedError.
    """

    model_input_names = ("pixel_values",)
    do_convert_rgb: bool
    do_resize: bool
    size: dict[str, int]
    default_to_square: bool
    resample: int
    do_rescale: bool
    rescale_factor: float
    do_normalize: bool
    image_mean: Any
    image_std: Any

    def __init__(self, **options: Any) -> None:
        self.extra: dict[str, Any] = {k: v for k, v in options.items() if k not in DEFAULTS and k not in NEUTRAL}
        given = {k: v for k, v in options.items() if v is not None and (k in DEFAULTS or k in NEUTRAL)}
        for name, value in self._resolve({**DEFAULTS, **given}).items():
            setattr(self, name, value)

    @staticmethod
    def _resolve(options: Mapping[str, Any]) -> dict[str, Any]:
        for name, neutral in NEUTRAL.items():
            value = options.get(name)
            value = getattr(value, "value", value)
            if value not in neutral:
                raise UnsupportedError(f"image processor option {name}={options[name]!r} is not supported")
        resolved = {name: options[name] for name in DEFAULTS}
        if resolved["size"] is not None:
            resolved["size"] = _size(resolved["size"], bool(resolved["default_to_square"]))
        if resolved["do_resize"] and (resolved["size"] is None or resolved["resample"] is None):
            raise ValueError("size and resample must be given where do_resize is true")
        if resolved["do_rescale"] and resolved["rescale_factor"] is None:
            raise ValueError("rescale_factor must be given where do_rescale is true")
        if resolved["do_normalize"] and (resolved["image_mean"] is None or resolved["image_std"] is None):
            raise ValueError("image_mean and image_std must be given where do_normalize is true")
        if resolved["resample"] is not None:
            if resolved["resample"] not in range(6):
                raise ValueError(f"resample must be one of Pillow's filters 0..5, found {resolved['resample']!r}")
            resolved["resample"] = int(resolved["resample"])
        return resolved

    def __call__(self, images: Any, return_tensors: Any = None, **options: Any) -> BatchFeature:
        """pixel_values of one picture, a list of them, or an array [B, ...] of them."""
        return self.preprocess(images, return_tensors=return_tensors, **options)

    def preprocess(self, images: Any, return_tensors: Any = None, **options: Any) -> BatchFeature:
        """pixel_values: a list of [3, H, W] float32 arrays, or one array or tensor with return_tensors "np" or "pt".

        images: paths (EXIF honoured), Pillow images (taken as they are), arrays or tensors (channels first or last:
        input_data_format says which where a shape leaves it open). Raises PictureError naming what is wrong.
        """
        unknown = [name for name in options if name not in DEFAULTS and name not in NEUTRAL and name not in IGNORED]
        if unknown:
            raise TypeError(f"image processor has no option {', '.join(sorted(unknown))}")
        chosen = self._resolve({**self._options(), **{k: v for k, v in options.items() if k not in IGNORED}})
        layout = options.get("input_data_format")
        layout = getattr(layout, "value", layout)
        if layout not in (None, "channels_first", "channels_last", "none"):
            raise ValueError(f'input_data_format must be "channels_first" or "channels_last", found {layout!r}')
        pixels = [self._one(image, chosen, layout) for image in _flat(images)]
        return BatchFeature({"pixel_values": pixels}, tensor_type=return_tensors)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in DEFAULTS}

    def _one(self, image: Any, options: Mapping[str, Any], layout: str | None) -> NDArray[Any]:
        """One picture to [C, H, W]."""
        array = _channels_first(image, bool(options["do_convert_rgb"]), layout)
        if options["do_resize"]:
            array = _resized(array, options["size"], options["resample"])
        elif np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            raise PictureError("array: holds values that are not finite")
        if array.dtype == np.uint8 and options["do_rescale"] | options["do_normalize"]:
            # Every step after this looks at one value at a time: 256 of them are enough.
            values = np.broadcast_to(np.arange(256, dtype=np.uint8), (array.shape[0], 1, 256))
            table = self._scaled(values, options)
            return np.stack([table[c, 0][channel] for c, channel in enumerate(array)])
        return self._scaled(array, options)

    @staticmethod
    def _scaled(array: NDArray[Any], options: Mapping[str, Any]) -> NDArray[Any]:
        if options["do_rescale"]:
            array = (array.astype(np.float64) * options["rescale_factor"]).astype(np.float32)
        if options["do_normalize"]:
            if not np.issubdtype(array.dtype, np.floating):
                array = array.astype(np.float32)
            mean = _per_channel("image_mean", options["image_mean"], array.shape[0]).astype(array.dtype)
            std = _per_channel("image_std", options["image_std"], array.shape[0]).astype(array.dtype)
            array = (array - mean[:, None, None]) / std[:, None, None]
        return array

    def to_dict(self) -> dict[str, Any]:
        """The object of preprocessor_config.json, with transformers' names."""
        values = self._options()
        values["image_mean"] = (
            list(values["image_mean"]) if isinstance(values["image_mean"], tuple) else values["image_mean"]
        )
        values["image_std"] = (
            list(values["image_std"]) if isinstance(values["image_std"], tuple) else values["image_std"]
        )
        values.pop("default_to_square")
        return {**values, "image_processor_type": "BlipImageProcessor"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> BlipImageProcessor:
        """From preprocessor_config.json's object, old or new. Raises CheckpointError for a value that is wrong."""
        if not isinstance(values, Mapping):
            raise CheckpointError(f"preprocessor_config.json: expected an object, found {type(values).__name__}")
        try:
            return cls(**{**values, **changes})
        except UnsupportedError:
            raise
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"preprocessor_config.json: {error}") from error

    @classmethod
    def from_pretrained(cls, path_or_id: str | os.PathLike[str], **options: Any) -> BlipImageProcessor:
        """From a folder or Hub id: processor_config.json's image_processor, else preprocessor_config.json."""
        from blip2c.checkpoint import read_object
        from blip2c.hub import pop_hub_options, resolve

        folder = resolve(path_or_id, weights=False, **pop_hub_options(options))
        values = None
        if (folder / "processor_config.json").is_file():
            values = read_object(folder / "processor_config.json").get("image_processor")
        if values is None:
            file = folder / "preprocessor_config.json"
            if not file.is_file():
                raise FileNotFoundError(
                    f"{folder}: no preprocessor_config.json and no image_processor in processor_config.json"
                )
            values = read_object(file)
        return cls.from_dict(values, **options)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write directory/preprocessor_config.json."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"
        (folder / "preprocessor_config.json").write_text(text, encoding="utf-8")

    def __repr__(self) -> str:
        return f"BlipImageProcessor {json.dumps(self.to_dict(), indent=2)}"


def _is_one(value: Any) -> bool:
    return isinstance(value, str | os.PathLike | Image.Image | np.ndarray) or is_torch(value)


def _flat(images: Any) -> list[Any]:
    """One picture, a list of pictures or of lists, or a 4-axis array, to a list of pictures."""
    if _is_one(images):
        if not isinstance(images, str | os.PathLike | Image.Image) and images.ndim == 4:
            return list(images)
        return [images]
    if isinstance(images, list | tuple):
        if not images:
            raise ValueError("images is an empty list")
        return [one for item in images for one in _flat(item)]
    raise PictureError(f"images must be pictures or lists of them, found {type(images).__name__}")


def _channels_first(image: Any, convert: bool, layout: str | None) -> NDArray[Any]:
    """[C, H, W], in RGB where asked to."""
    if isinstance(image, str | os.PathLike):
        image = open_picture(image).convert("RGB")  # as transformers' load_image: alpha is dropped, not laid on white
    if isinstance(image, Image.Image):
        try:
            array = np.array(to_rgb(image) if convert else image)
        except OSError as error:
            raise PictureError(f"{getattr(image, 'filename', '') or 'image'}: can not be decoded: {error}") from error
        return array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
    array = np.asarray(image.detach().cpu().numpy() if is_torch(image) else image)
    is_number = array.dtype.kind in "biuf"
    if not is_number or array.ndim not in (2, 3) or 0 in array.shape:
        raise PictureError(
            f"array: shape {array.shape} of {array.dtype}; expected (H, W), (H, W, 3), (3, H, W) or (H, W, 4) numbers"
        )
    if array.ndim == 2:
        array = array[None]
        layout = "channels_first"
    if layout not in ("channels_first", "channels_last"):
        layout = _guess_layout(array)
    if layout == "channels_last":
        array = np.moveaxis(array, -1, 0)
    if array.shape[0] not in (1, 3, 4):
        raise PictureError(f"array: {array.shape[0]} channels; expected 1, 3 or 4")
    if convert and array.shape[0] == 1:
        array = np.repeat(array, 3, axis=0)
    elif convert and array.shape[0] == 4:
        array = np.moveaxis(composite_on_white(np.moveaxis(array, 0, -1)), -1, 0)
    return array


def _guess_layout(array: NDArray[Any]) -> str:
    if array.shape[0] in (1, 3, 4):
        return "channels_first"
    if array.shape[2] in (1, 3, 4):
        return "channels_last"
    raise PictureError(f"array: shape {array.shape} has no axis of 1, 3 or 4 channels first or last")


def _resized(array: NDArray[Any], size: Mapping[str, int], resample: int) -> NDArray[Any]:
    """[C, H, W] through Pillow's resize; floats in 0..1 pass through 8 bits and come back as floats in 0..1."""
    values, was_unit = array_to_bytes(array)
    image = np.moveaxis(values, 0, -1)
    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[-1] == 1 else image))
    height, width = _target_size(array.shape[1], array.shape[2], size)
    if height < 1 or width < 1:
        raise PictureError(f"a picture of {array.shape[1]}x{array.shape[2]} would become {height}x{width} pixels")
    result = np.array(picture.resize((width, height), resample=Image.Resampling(resample)))
    result = result[None] if result.ndim == 2 else np.moveaxis(result, -1, 0)
    return (result.astype(np.float64) * (1 / 255)).astype(np.float32) if was_unit else result
