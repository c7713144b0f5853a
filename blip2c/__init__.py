"""blip2c: BLIP-2 in C. Captions of pictures and answers about them, exact and small, without a GPU.

    import blip2c
    model = blip2c.load()
    print(model.caption("picture.jpg"))
    print(model.ask("picture.jpg", "what colour is the circle?"))

The transformers spelling is here too: Blip2Processor, Blip2ForConditionalGeneration. Names are loaded when first used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from blip2c._core import (
    CheckpointError,
    DeviceArray,
    NumericError,
    UnsupportedError,
    cpu_info,
    get_num_threads,
    set_num_threads,
)

if TYPE_CHECKING:
    from blip2c import kernels
    from blip2c.api import Captioner, load
    from blip2c.attention_maps import AttentionMaps
    from blip2c.batch import BatchFeature
    from blip2c.captions import Caption, Captions
    from blip2c.config import (
        Blip2Config,
        Blip2QFormerConfig,
        Blip2VisionConfig,
        InstructBlipConfig,
        InstructBlipQFormerConfig,
        InstructBlipVisionConfig,
        OPTConfig,
        T5Config,
    )
    from blip2c.generation import GenerationConfig
    from blip2c.hub import sample_path
    from blip2c.image_processing import BlipImageProcessor
    from blip2c.images import PictureError, load_image
    from blip2c.index import Hit, Hits, Index
    from blip2c.instructblip import InstructBlipForConditionalGeneration
    from blip2c.matcher import Match, Matcher
    from blip2c.modeling import Blip2ForConditionalGeneration, Blip2Model
    from blip2c.packed import quantize
    from blip2c.pipelines import pipeline
    from blip2c.processing import AutoProcessor, Blip2Processor, InstructBlipProcessor
    from blip2c.retrieval import (
        Blip2ForImageTextRetrieval,
        Blip2QFormerModel,
        Blip2TextModelWithProjection,
        Blip2VisionModelWithProjection,
    )
    from blip2c.states import Chat, State
    from blip2c.tokenizer import Blip2Tokenizer

__version__ = "0.1.0"

_LAZY = {
    "AttentionMaps": "attention_maps",
    "AutoProcessor": "processing",
    "BatchFeature": "batch",
    "Blip2Config": "config",
    "Blip2ForConditionalGeneration": "modeling",
    "Blip2ForImageTextRetrieval": "retrieval",
    "Blip2Model": "modeling",
    "Blip2Processor": "processing",
    "Blip2QFormerConfig": "config",
    "Blip2QFormerModel": "retrieval",
    "Blip2TextModelWithProjection": "retrieval",
    "Blip2Tokenizer": "tokenizer",
    "Blip2VisionConfig": "config",
    "Blip2VisionModelWithProjection": "retrieval",
    "BlipImageProcessor": "image_processing",
    "Caption": "captions",
    "Captioner": "api",
    "Captions": "captions",
    "Chat": "states",
    "GenerationConfig": "generation",
    "Hit": "index",
    "Hits": "index",
    "Index": "index",
    "InstructBlipConfig": "config",
    "InstructBlipForConditionalGeneration": "instructblip",
    "InstructBlipProcessor": "processing",
    "InstructBlipQFormerConfig": "config",
    "InstructBlipVisionConfig": "config",
    "Match": "matcher",
    "Matcher": "matcher",
    "OPTConfig": "config",
    "PictureError": "images",
    "State": "states",
    "T5Config": "config",
    "load": "api",
    "load_image": "images",
    "pipeline": "pipelines",
    "quantize": "packed",
    "sample_path": "hub",
}

__all__ = [
    "AttentionMaps",
    "AutoProcessor",
    "BatchFeature",
    "Blip2Config",
    "Blip2ForConditionalGeneration",
    "Blip2ForImageTextRetrieval",
    "Blip2Model",
    "Blip2Processor",
    "Blip2QFormerConfig",
    "Blip2QFormerModel",
    "Blip2TextModelWithProjection",
    "Blip2Tokenizer",
    "Blip2VisionConfig",
    "Blip2VisionModelWithProjection",
    "BlipImageProcessor",
    "Caption",
    "Captioner",
    "Captions",
    "Chat",
    "CheckpointError",
    "DeviceArray",
    "GenerationConfig",
    "Hit",
    "Hits",
    "Index",
    "InstructBlipConfig",
    "InstructBlipForConditionalGeneration",
    "InstructBlipProcessor",
    "InstructBlipQFormerConfig",
    "InstructBlipVisionConfig",
    "Match",
    "Matcher",
    "NumericError",
    "OPTConfig",
    "PictureError",
    "State",
    "T5Config",
    "UnsupportedError",
    "cpu_info",
    "get_num_threads",
    "kernels",
    "load",
    "load_image",
    "pipeline",
    "quantize",
    "sample_path",
    "set_num_threads",
]


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return _import_module("blip2c.kernels")
    if name not in _LAZY:
        raise AttributeError(f"module 'blip2c' has no attribute {name!r}")
    value = getattr(_import_module(f"blip2c.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
