"""The LAVIS spelling: scripts written for salesforce-lavis run with the import changed.

    from blip2c.lavis import load_model_and_preprocess

    model, vis_processors, txt_processors = load_model_and_preprocess(
        name="blip2_opt", model_type="pretrain_opt2.7b", is_eval=True, device="cpu")
    image = vis_processors["eval"](raw_image).unsqueeze(0)
    model.generate({"image": image, "prompt": "Question: which city is this? Answer:"})

Weights are those of the Hub, which transformers' authors converted from LAVIS's own files; instead of a model_type a
folder or another Hub id may be named. What LAVIS computes and is not computed here raises UnsupportedError; its .pth
files are pickles and are not read. See blip2c.lavis_models for the models' calls.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blip2c._core import UnsupportedError
from blip2c.api import Captioner, load
from blip2c.hub import SAMPLES
from blip2c.instructblip import InstructBlipForConditionalGeneration
from blip2c.lavis_models import (
    Blip2ITM,
    Blip2OPT,
    Blip2Qformer,
    Blip2T5,
    Blip2T5Instruct,
    Blip2VicunaInstruct,
    LavisModel,
)
from blip2c.lavis_processors import CaptionProcessor, ImageProcessor, TrainingOnly, load_processor

__all__ = ["load_model", "load_model_and_preprocess", "load_processor", "model_zoo"]

_HUB = "Salesforce/"
_FIRST_STAGE = {"pretrain": "blip2-itm-vit-g", "pretrain_vitL": "", "coco": "blip2-itm-vit-g-coco"}
# Hub names by LAVIS's names and model types; "": LAVIS has it, the Hub has not.
_TYPES: dict[str, dict[str, str]] = {
    "blip2_opt": {
        "pretrain_opt2.7b": "blip2-opt-2.7b",
        "pretrain_opt6.7b": "blip2-opt-6.7b",
        "caption_coco_opt2.7b": "blip2-opt-2.7b-coco",
        "caption_coco_opt6.7b": "blip2-opt-6.7b-coco",
    },
    "blip2_t5": {
        "pretrain_flant5xl": "blip2-flan-t5-xl",
        "pretrain_flant5xl_vitL": "",
        "pretrain_flant5xxl": "blip2-flan-t5-xxl",
        "caption_coco_flant5xl": "blip2-flan-t5-xl-coco",
    },
    "blip2_t5_instruct": {"flant5xl": "instructblip-flan-t5-xl", "flant5xxl": "instructblip-flan-t5-xxl"},
    "blip2_vicuna_instruct": {"vicuna7b": "instructblip-vicuna-7b", "vicuna13b": "instructblip-vicuna-13b"},
    "blip2": _FIRST_STAGE,
    "blip2_feature_extractor": _FIRST_STAGE,
    "blip2_image_text_matching": _FIRST_STAGE,
}
_CLASSES: dict[str, type[LavisModel]] = {
    "blip2_opt": Blip2OPT,
    "blip2_t5": Blip2T5,
    "blip2_t5_instruct": Blip2T5Instruct,
    "blip2_vicuna_instruct": Blip2VicunaInstruct,
    "blip2": Blip2Qformer,
    "blip2_feature_extractor": Blip2Qformer,
    "blip2_image_text_matching": Blip2ITM,
}
# What a model type that was finetuned for captions begins with where no prompt is given.
_CAPTION_PROMPT = "a photo of"


class ModelZoo:
    """LAVIS's names and model types that can be loaded: prints as a table, iterates over (name, [model types])."""

    def __iter__(self) -> Iterator[tuple[str, list[str]]]:
        return ((name, [kind for kind, hub in types.items() if hub]) for name, types in _TYPES.items())

    def __len__(self) -> int:
        return sum(len(types) for _, types in self)

    def __str__(self) -> str:
        line = "=" * 50
        rows = [f"{name:<30} {', '.join(types)}" for name, types in self]
        return "\n".join([line, f"{'Architectures':<30} Types", line, *rows])


model_zoo = ModelZoo()


def load_model_and_preprocess(
    name: str, model_type: str | os.PathLike[str], is_eval: bool = False, device: Any = "cpu", **options: Any
) -> tuple[LavisModel, dict[str, Any], dict[str, Any]]:
    """(model, vis_processors, txt_processors) as in LAVIS.

    name, model_type: LAVIS's, see print(model_zoo); as model_type also a folder in the Hub's format, a Hub id
    (owner/name), or "sample" or "sample-retrieval", the small checkpoints inside the package. is_eval: models here
    always are. device: as in from_pretrained(). options: of blip2c.load() (dtype, local_files_only ...).

    vis_processors["eval"](picture) -> float32 [3, S, S]; txt_processors["eval"](caption) -> str. Raises ValueError for
    a name or model type that LAVIS does not have either, UnsupportedError for one without a checkpoint on the Hub, or
    where the checkpoint is of another kind than the name says.
    """
    model = load_model(name, model_type, is_eval, device, **options)
    text = CaptionProcessor()
    vision = {"train": TrainingOnly("vis_processors"), "eval": ImageProcessor(model.image_size)}
    return model, vision, {"train": text, "eval": text}


def load_model(
    name: str,
    model_type: str | os.PathLike[str],
    is_eval: bool = False,
    device: Any = "cpu",
    checkpoint: str | os.PathLike[str] | None = None,
    **options: Any,
) -> LavisModel:
    """The model alone. checkpoint: a folder in the Hub's format instead of the model type's own weights."""
    _check_name(name)
    place = _place(name, model_type)
    if checkpoint is not None:
        if not Path(checkpoint).is_dir():
            raise UnsupportedError(f"checkpoint {os.fspath(checkpoint)}: expected a folder in the Hub's format")
        place = os.fspath(checkpoint)
    if not isinstance(is_eval, bool):
        raise TypeError(f"is_eval must be True or False, found {is_eval!r}")
    loaded = load(place, device=device, **options)
    kind = _CLASSES[name]
    found = _kind_of(loaded)
    if kind.reads != found:
        raise UnsupportedError(f"{name} is over {kind.reads}, {place} is {found}")
    if str(device) == "cpu" and "dtype" not in options and not loaded.model.is_quantized:
        loaded.model.float()  # as LAVIS does
    prompt = _CAPTION_PROMPT if str(model_type).startswith("caption_coco_") else ""
    return kind(loaded, prompt)


def _check_name(name: str) -> None:
    if name not in _TYPES:
        raise ValueError(f"name: expected one of {', '.join(_TYPES)}, found {name!r}")


def _place(name: str, model_type: str | os.PathLike[str]) -> str:
    """Folder or Hub id."""
    types, given = _TYPES[name], os.fspath(model_type)
    if types.get(given):
        return _HUB + types[given]
    if given in types:
        raise UnsupportedError(f"{name} {given}: there is no checkpoint of it on the Hub, only LAVIS's own .pth file")
    if os.path.isdir(given) or "/" in given or given in SAMPLES:
        return given
    raise ValueError(
        f"model_type of {name}: expected one of {', '.join(k for k, hub in types.items() if hub)}, a folder or a Hub"
        f" id, found {given!r}"
    )


def _kind_of(loaded: Any) -> str:
    """What a checkpoint is, in the words of LavisModel.reads."""
    if not isinstance(loaded, Captioner):
        return "a retrieval checkpoint"
    family = str(loaded.model.config.text_config.model_type)
    instruct = isinstance(loaded.model, InstructBlipForConditionalGeneration)
    return f"InstructBLIP over {family}" if instruct else f"BLIP-2 over {family}"
