"""The sample models' sizes, their tokenizer, and their folders in the Hub's format."""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    GenerationConfig,
    OPTConfig,
    PreTrainedModel,
)

import scenes

BOS, PAD, EOS, UNK, IMAGE = 2, 1, 2, 3, 4
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<image>")
VOCABULARY = 1000
QUERIES = 32
MEAN = [0.48145466, 0.4578275, 0.40821073]
STD = [0.26862954, 0.26130258, 0.27577711]

PHRASES = ("a photo of", "a picture of")


def question_prompt(text: str) -> str:
    """The prompt for a question, as the BLIP-2 paper writes it."""
    return f"Question: {text} Answer:"


def _texts(seed: int, number: int) -> Iterator[str]:
    rng = random.Random(seed)
    yield from (f" {word}" for t in scenes.THINGS for word in (t.name, t.one, t.several))
    for _ in range(number):
        attributes = scenes.draw_attributes(rng, "train")
        yield f"{rng.choice(PHRASES)} {scenes.caption(attributes)}"
        for q in scenes.questions(attributes, rng):
            yield f"{question_prompt(q.text)} {q.answer}"


def make_tokenizer(seed: int = 5) -> Tokenizer:
    """Learn a byte-level BPE on the scenes' texts; BOS is put first, as OPT's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in SPECIAL]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed, 5000), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", BOS)]
    )
    return tokenizer


def make_config(vocabulary: int) -> Blip2Config:
    """About 7 million parameters; the three widths differ, as in the real BLIP-2."""
    text = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=160,
        word_embed_proj_dim=160,
        num_hidden_layers=4,
        num_attention_heads=5,
        ffn_dim=640,
        max_position_embeddings=256,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    vision = {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": scenes.SIZE,
        "patch_size": scenes.PATCH,
    }
    qformer = {
        "vocab_size": vocabulary,
        "hidden_size": 224,
        "intermediate_size": 896,
        "num_hidden_layers": 4,
        "num_attention_heads": 7,
        "encoder_hidden_size": vision["hidden_size"],
        "cross_attention_frequency": 2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return Blip2Config(
        vision_config=vision,
        qformer_config=qformer,
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )


@torch.no_grad()
def make_model(vocabulary: int) -> Blip2ForConditionalGeneration:
    """A fresh model, started from values that can be trained (transformers' cannot)."""
    model = Blip2ForConditionalGeneration(make_config(vocabulary))
    for module in (model.vision_model, model.qformer, model.language_projection):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
                torch.nn.init.trunc_normal_(layer.weight, std=0.03)
    embeddings = model.vision_model.embeddings
    torch.nn.init.trunc_normal_(embeddings.position_embedding, std=0.1)
    torch.nn.init.trunc_normal_(embeddings.class_embedding, std=0.1)
    torch.nn.init.normal_(model.query_tokens, std=0.5)
    return model


PROJECTION = 128
#: How long a text may be that the retrieval model reads: four times the longest caption.
POSITIONS = 64


@torch.no_grad()
def make_retrieval_model(sample: Blip2ForConditionalGeneration) -> Blip2ForImageTextRetrieval:
    """The twin that compares pictures with texts, started from what the sample model has learned.

    Vision encoder, queries and the queries' side of the Q-Former are the sample's. The texts' feed-forward layers
    start as copies of the queries' and the word embeddings as the language model's, which are narrower: the rest is
    noise. The heads start fresh.
    """
    config = Blip2Config(**sample.config.to_dict() | {"image_text_hidden_size": PROJECTION, "architectures": None})
    qformer = config.qformer_config
    qformer.use_qformer_text_input, qformer.pad_token_id, qformer.max_position_embeddings = True, PAD, POSITIONS
    model = Blip2ForImageTextRetrieval(config)
    shared = {k: v for k, v in sample.state_dict().items() if not k.startswith("language_")}
    fresh = model.load_state_dict(shared, strict=False)
    if fresh.unexpected_keys:
        raise ValueError(f"the twin has no place for {fresh.unexpected_keys}")
    for layer in model.qformer.encoder.layer:
        layer.intermediate.load_state_dict(layer.intermediate_query.state_dict())
        layer.output.load_state_dict(layer.output_query.state_dict())
    words = model.embeddings.word_embeddings.weight
    known = sample.get_input_embeddings().weight
    torch.nn.init.normal_(words, std=0.1)
    words[:, : known.shape[1]] += 0.3 * known / known.std()
    torch.nn.init.normal_(model.embeddings.position_embeddings.weight, std=0.1)
    for head in (model.vision_projection, model.text_projection, model.itm_head):
        torch.nn.init.trunc_normal_(head.weight, std=0.05)
    return model


# ---------------------------------------------------------------------------
# the folder


def _tokenizer_files() -> dict[str, dict]:
    added = {
        str(i): {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, t in enumerate(SPECIAL)
    }
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    config = {
        **names,
        "added_tokens_decoder": added,
        "additional_special_tokens": ["<image>"],
        "clean_up_tokenization_spaces": False,
        "extra_special_tokens": {},
        "model_max_length": 128,
        "processor_class": "Blip2Processor",
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special = {**names, "additional_special_tokens": ["<image>"]}
    return {"tokenizer_config.json": config, "special_tokens_map.json": special}


def _processor_files() -> dict[str, dict]:
    image = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN,
        "image_std": STD,
        "image_processor_type": "BlipImageProcessor",
        "processor_class": "Blip2Processor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": scenes.SIZE, "width": scenes.SIZE},
    }
    processor = {"num_query_tokens": QUERIES, "processor_class": "Blip2Processor"}
    return {"preprocessor_config.json": image, "processor_config.json": processor}


def _write_folder(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = model.config.to_dict() | {
        "_name_or_path": "",
        "architectures": [type(model).__name__],
        "dtype": "float16",
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if isinstance(model, Blip2ForConditionalGeneration):
        generation = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
        generation.save_pretrained(folder)
    for name, content in (_tokenizer_files() | _processor_files()).items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")
    tied = "language_model.lm_head.weight"
    state = {k: v.detach().half().contiguous() for k, v in model.state_dict().items() if k != tied}
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def save(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the whole folder; each file is replaced in one step, the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        _write_folder(model, tokenizer, Path(temporary))
        files = sorted(Path(temporary).iterdir(), key=lambda f: f.suffix == ".safetensors")
        for file in files:
            shutil.copymode(__file__, file)
            os.replace(file, folder / file.name)
