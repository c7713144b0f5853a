"""`AttentionMaps`: where the Q-Former looks in a picture: its cross-attention, per layer, head, query and patch.

    maps = model.attention_maps("picture.jpg", "a dog on the beach")
    maps.weights                       # float32 [L, H, Q, T]; each row sums to 1
    maps.patches(layer=-1).mean(0)     # [Q, rows, columns]: of the last of these layers, the mean over its heads
    maps.plot().save("looks.png")      # over the picture

In every cross_attention_frequency-th layer the queries, having seen each other and the text, take what they want from
the vision encoder's tokens: a class token, which stands for no place, and one a patch. (LAVIS's compute_gradcam weighs
such maps by gradients, which are not computed here: these are the weights themselves.) Source: BLIP-2 paper, section
3.1; transformers' cross_attentions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from blip2c.forward import Blip2WithQFormer
from blip2c.images import load_image
from blip2c.inputs import pack_texts
from blip2c.processing import Blip2Processor
from blip2c.prompts import read_pixels

__all__ = ["AttentionMaps"]

F32 = NDArray[np.float32]
_SIDE = 480  # pixels of a plot's longer side, at least


@dataclass(frozen=True, repr=False)
class AttentionMaps:
    """weights: float32 [L, H, Q, T], what each query gives to each of the picture's tokens, the class token first.

    layers: which layers of the Q-Former these are (L of them). grid: rows and columns of patches; T is 1 + their
    product. picture: what was looked at, in its own size.
    """

    weights: F32
    layers: tuple[int, ...]
    grid: tuple[int, int]
    picture: Image.Image

    def __repr__(self) -> str:
        _, heads, queries, _ = self.weights.shape
        layers, (rows, columns) = ", ".join(map(str, self.layers)), self.grid
        return f"AttentionMaps(layers {layers}: {heads} heads, {queries} queries, {rows} x {columns} patches)"

    def patches(self, layer: int = -1, head: int | None = None, query: int | None = None) -> F32:
        """The patches' weights of one of the L layers: [H, Q, rows, columns], without the axes that are chosen from.

        They sum to less than 1: the rest is the class token's. Raises IndexError naming what does not exist.
        """
        names = ("layer", "head", "query")
        chosen = self.weights[..., 1:].reshape(*self.weights.shape[:3], *self.grid)
        for axis, (name, place) in reversed(list(enumerate(zip(names, (layer, head, query), strict=True)))):
            size = self.weights.shape[axis]
            if place is not None and not -size <= place < size:
                raise IndexError(f"{name} {place}: there are {size}")
            if place is not None:
                chosen = np.moveaxis(chosen, axis, 0)[place]
        return chosen

    def heat(self, layer: int = -1, head: int | None = None, query: int | None = None) -> F32:
        """[rows, columns] of one layer, the mean over the heads and queries that are not chosen."""
        patches = self.patches(layer, head, query)
        heat: F32 = patches.reshape(-1, *self.grid).mean(axis=0)
        return heat

    def plot(self, layer: int = -1, head: int | None = None, query: int | None = None) -> Image.Image:
        """heat() over the picture, from blue (least) to red (most), as an RGB Pillow image."""
        return overlay(self.picture, self.heat(layer, head, query))


def overlay(picture: Image.Image, heat: F32) -> Image.Image:
    """heat [rows, columns] of any range over a picture, enlarged to 480 pixels where it is smaller."""
    scale = max(1.0, _SIDE / max(picture.size))
    size = (round(picture.width * scale), round(picture.height * scale))
    low, high = float(heat.min()), float(heat.max())
    level = (heat - low) / (high - low) if high > low else np.zeros_like(heat)
    smooth = Image.fromarray(np.ascontiguousarray(level, np.float32)).resize(size, Image.Resampling.BICUBIC)
    values = np.clip(np.asarray(smooth), 0, 1)
    # Blue, cyan, yellow, red.
    stops, colours = (0, 1 / 3, 2 / 3, 1), ((0, 0, 160), (0, 200, 220), (250, 220, 0), (200, 0, 0))
    channels = [np.interp(values, stops, [colour[c] for colour in colours]) for c in range(3)]
    shade = Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))
    return Image.blend(picture.convert("RGB").resize(size, Image.Resampling.BICUBIC), shade, 0.5)


def attention_maps(
    model: Blip2WithQFormer, processor: Blip2Processor, image: Any, ids: list[int] | None
) -> AttentionMaps:
    """Of a picture, with the ids of a text that the Q-Former reads beside it, or None. Raises as load_image() does."""
    picture = load_image(image)
    core, config = model._core, model._core_config
    embeds = core.encode_stages(read_pixels(model, processor, picture), qformer=False)["vision"]
    text = None if ids is None else pack_texts([ids])
    weights = core.encode_stages(image_embeds=embeds, text=text, attentions=True)["qformer_cross_attentions"]
    side = int(config["vision"]["image_size"]) // int(config["vision"]["patch_size"])
    every = int(config["qformer"]["cross_attention_frequency"])
    layers = tuple(range(0, int(config["qformer"]["num_hidden_layers"]), every))
    return AttentionMaps(np.concatenate(weights), layers, (side, side), picture)
