"""Reading pictures: files, bytes, Pillow images and arrays to RGB.

Files are opened with a whitelist of formats, turned as their EXIF says, and refused above Pillow's decompression-bomb
limit. Transparent pixels are laid on white, as transformers 5.23 does. Pictures of 16 bits a channel are scaled to 8.
"""

from __future__ import annotations

import io
import os
import sys
import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF")
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"})

_opening = threading.Lock()
_formats: list[str] = []


class PictureError(ValueError):
    """A picture that can not be read: the message names it and says what is wrong."""


def _known_formats() -> list[str]:
    if not _formats:
        Image.init()
        _formats.extend(name for name in FORMATS if name in Image.OPEN)
    return _formats


def _describe(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        return str(os.fspath(source))
    if isinstance(source, bytes | bytearray):
        return f"<{len(source)} bytes>"
    return str(getattr(source, "name", type(source).__name__))


def open_picture(source: str | os.PathLike[str] | bytes | IO[bytes]) -> Image.Image:
    """Decode a file or its bytes (first frame) and turn it as its EXIF says; the mode stays as stored.

    Raises FileNotFoundError for a missing file and PictureError, naming the picture, for everything else.
    """
    name = _describe(source)
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if not name:
            raise PictureError("'' is not the path of a picture")
        if path.is_dir():
            raise PictureError(f"{name}: is a folder, not a picture")
        if not path.exists():
            if str(source).startswith(("http://", "https://", "data:")):
                raise PictureError(
                    f"{name[:80]}: pictures are not fetched from addresses; pass a file, bytes or an image"
                )
            raise FileNotFoundError(f"{name}: no such picture")
        if not path.is_file():  # opening a pipe would wait for its writer
            raise PictureError(f"{name}: is a pipe or device, not a file with a picture")
    stream: Any = io.BytesIO(source) if isinstance(source, bytes | bytearray) else source
    try:
        # The filters of `warnings` belong to the process, hence the lock. Only the header is read inside.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(stream, formats=_known_formats())
        try:
            image.load()
            turned = ImageOps.exif_transpose(image)
        finally:
            if isinstance(source, str | os.PathLike):
                image.close()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise PictureError(f"{name}: decompression bomb: {error}") from None
    except UnidentifiedImageError:
        raise PictureError(f"{name}: not a picture of a known format ({', '.join(_known_formats())})") from None
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly everything on damaged files
        raise PictureError(f"{name}: can not be decoded: {type(error).__name__}: {error}") from error
    return turned


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; what is transparent is laid on white (transformers 5.23: convert_to_rgb)."""
    if "A" in image.getbands() or "a" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def scale_deep(image: Image.Image, name: str = "picture") -> Image.Image:
    """Grey of 16 bits (I;16, I) or of floats (F) to 8 bits by its range; Pillow alone would clip at 255."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.float64)
        if not np.isfinite(values).all():
            raise PictureError(f"{name}: holds values that are not finite")
        low, high = float(values.min()), float(values.max())
        top = 65535.0 if image.mode != "F" else 1.0 if high <= 1.0 else 255.0
        if low < 0.0 or high > top:
            raise PictureError(f"{name}: mode {image.mode} with values {low:g}..{high:g}, expected 0..{top:g}")
        return Image.fromarray(np.rint(values * (255.0 / top)).astype(np.uint8))
    return image


def channels_last(array: NDArray[Any], name: str = "array") -> NDArray[Any]:
    """(H, W), (H, W, C) or (C, H, W) with C in 1, 3, 4 to (H, W, C). Raises PictureError naming the shape."""
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or 0 in array.shape:
        raise PictureError(f"{name}: shape {array.shape}; expected (H, W), (H, W, 3), (3, H, W) or (H, W, 4)")
    # transformers' rule: the first axis wins where both could be the channels.
    if array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        return np.moveaxis(array, 0, -1)
    if array.shape[2] in (1, 3, 4):
        return array
    raise PictureError(f"{name}: shape {array.shape} has no axis of 1, 3 or 4 channels first or last")


def composite_on_white(array: NDArray[Any]) -> NDArray[Any]:
    """(H, W, 4) to (H, W, 3), as transformers 5.23 does it for arrays (Pillow rounds otherwise)."""
    if np.issubdtype(array.dtype, np.floating):
        if array.min() < 0.0 or array.max() > 1.0:
            raise PictureError(f"array with alpha holds {array.min()}..{array.max()}; floats must be in 0..1")
        alpha = array[..., 3:4] / 1.0
        return np.asarray(alpha * array[..., :3] + (1 - alpha) * 1.0).astype(array.dtype)
    alpha = array[..., 3:4] / 255
    return np.asarray(np.round(alpha * array[..., :3] + (1 - alpha) * 255)).astype(array.dtype)


def array_to_bytes(array: NDArray[Any], name: str = "array") -> tuple[NDArray[np.uint8], bool]:
    """To uint8, and whether the values were taken as 0..1 (transformers 5.23: _rescale_for_pil_conversion).

    Whole numbers in 0..255 stay; otherwise values in 0..1 are multiplied by 255 and cut (not rounded).
    """
    if array.dtype == np.uint8:
        return array, False
    if not (np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_):
        raise PictureError(f"{name}: dtype {array.dtype}; expected uint8 or floats")
    if np.issubdtype(array.dtype, np.complexfloating):
        raise PictureError(f"{name}: dtype {array.dtype}; expected uint8 or floats")
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        raise PictureError(f"{name}: holds values that are not finite")
    low, high = array.min(), array.max()
    whole = np.abs(array).max() < 2**31 and np.allclose(array, array.astype(np.int64))
    if whole and low >= 0 and high <= 255:
        return array.astype(np.uint8), False
    if not whole and low >= 0 and high <= 1:
        return (array.astype(np.float64) * 255).astype(np.float32).astype(np.uint8), True
    raise PictureError(f"{name}: holds values {low}..{high}; expected 0..255 as whole numbers or 0..1 as floats")


def is_torch(value: Any) -> bool:
    """Whether it is a torch tensor; torch is never imported to find out."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_picture(value: Any) -> bool:
    """Whether it is one picture rather than a sequence of them: a path, bytes, an image, an array of 2 or 3 axes."""
    if isinstance(value, str | os.PathLike | bytes | bytearray | Image.Image) or hasattr(value, "read"):
        return True
    return (isinstance(value, np.ndarray) or is_torch(value)) and value.ndim <= 3


def load_image(source: Any) -> Image.Image:
    """One picture as an RGB Pillow image.

    source: a path, the bytes of a file, an open binary file, a Pillow image, or an array or torch tensor (H, W),
    (H, W, 3), (3, H, W), (H, W, 4) of uint8, or of floats in 0..1. EXIF rotation is honoured for files and bytes; an
    image that is already open is taken as it is. Raises PictureError or FileNotFoundError.
    """
    if isinstance(source, Image.Image):
        try:
            source.load()
            return to_rgb(scale_deep(source))
        except PictureError:
            raise
        except (OSError, ValueError) as error:  # ValueError: a picture that was closed
            raise PictureError(f"{_describe(source)}: can not be decoded: {error}") from error
    if isinstance(source, np.ndarray) or is_torch(source):
        array = channels_last(np.asarray(source.detach().cpu() if is_torch(source) else source))
        if array.shape[2] == 4:
            if array.dtype != np.uint8 and not np.issubdtype(array.dtype, np.floating):
                raise PictureError(f"array: dtype {array.dtype} with alpha; expected uint8 or floats")
            if not np.isfinite(array).all():
                raise PictureError("array: holds values that are not finite")
            array = composite_on_white(array)
        values, _ = array_to_bytes(array)
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3))))
    if isinstance(source, str | os.PathLike | bytes | bytearray) or hasattr(source, "read"):
        image = open_picture(source)
        return to_rgb(scale_deep(image, _describe(source)))
    raise TypeError(f"a picture must be a path, bytes, a Pillow image or an array, found {type(source).__name__}")


def load_images(sources: Sequence[Any]) -> list[Image.Image]:
    """load_image() of each."""
    return [load_image(source) for source in sources]
