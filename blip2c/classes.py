"""Which model class a checkpoint folder is for."""

from __future__ import annotations

import os
from typing import Any

from blip2c.checkpoint import read_json
from blip2c.config import InstructBlipConfig
from blip2c.hub import resolve
from blip2c.instructblip import InstructBlipForConditionalGeneration
from blip2c.modeling import Blip2ForConditionalGeneration
from blip2c.pretrained import Blip2PreTrainedModel
from blip2c.retrieval import Blip2ForImageTextRetrieval


def model_class(folder: str | os.PathLike[str]) -> type[Blip2PreTrainedModel]:
    """The class for what a folder's config.json describes; Blip2ForConditionalGeneration reports what it is not.

    Retrieval checkpoints have the same model_type as the others: their `architectures` tell, or, where these are
    missing, that the Q-Former reads texts.
    """
    path = resolve(folder, weights=False) / "config.json"
    values = read_json(path) if path.is_file() else {}
    if not isinstance(values, dict):
        return Blip2ForConditionalGeneration
    if values.get("model_type") == InstructBlipConfig.model_type:
        return InstructBlipForConditionalGeneration
    qformer, named = values.get("qformer_config"), values.get("architectures")
    reads_text: Any = isinstance(qformer, dict) and qformer.get("use_qformer_text_input")
    retrieval = "Blip2ForImageTextRetrieval" in named if isinstance(named, list) and named else reads_text is True
    return Blip2ForImageTextRetrieval if retrieval else Blip2ForConditionalGeneration
