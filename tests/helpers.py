"""Small random checkpoints, written by transformers, for comparing blip2c with it.

A fresh transformers BLIP-2 can not be compared with: its queries and biases are zero and its vision weights have a
spread of 1e-10, so no picture changes a token. Here every parameter is drawn anew, wide enough that pictures matter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

CORPUS = [
    "a small red circle to the left of a large blue square",
    "two green triangles above a yellow star",
    "Question: what colour is the circle? Answer: red",
    "Question: how many cats are there? Answer: two",
    "there is a dog on the beach, and a woman sits beside it.",
    "a photo of a purple cross below an orange ring",
]

BOS, PAD, EOS = 2, 1, 2
IMAGE_TOKEN = "<image>"


_SIZES = {
    "vocab_size": 320, "hidden_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 160, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
}  # fmt: skip
_LLAMA = {**_SIZES, "intermediate_size": 36, "num_key_value_heads": 2}
TEXTS: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", **_SIZES, "ffn_dim": 36},
    "llama": {"model_type": "llama", **_LLAMA},
    "mistral": {"model_type": "mistral", **_LLAMA, "num_key_value_heads": 1, "sliding_window": 6},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 12},
    "t5": {
        "model_type": "t5", "vocab_size": 320, "d_model": 20, "d_kv": 7, "num_heads": 3, "d_ff": 36, "num_layers": 3,
        "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 12, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
}  # fmt: skip
"""Small language models of each family, by model_type."""


def small_tokenizer(vocab_size: int = 320, image_token: bool = True) -> transformers.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of OPT's kind: </s> (id 2) is put in front, <pad> is 1, the last id is <image>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - (1 if image_token else 0),
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", 2)]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="</s>",
        model_max_length=int(1e30),
    )
    if image_token:
        fast.add_tokens([transformers.AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    return fast


def small_t5_tokenizer(vocab_size: int = 320, image_token: bool = True) -> transformers.T5Tokenizer:
    """A Unigram tokenizer of T5's kind: <pad> is 0, </s> (1) is put behind, <unk> is 2, the last id is <image>."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    trained = Tokenizer(models.Unigram())
    trained.normalizer = normalizers.NFKC()
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS * 4, trainers.UnigramTrainer(vocab_size=vocab_size // 2, unk_token="<unk>", show_progress=False)
    )
    pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"] if piece != "<unk>"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *pieces]
    sentinels, rest = 3, vocab_size - len(vocabulary) - (1 if image_token else 0)
    vocabulary += [(f"\u2581filler{i}", -30.0) for i in range(rest - sentinels)]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(sentinels))]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=sentinels, clean_up_tokenization_spaces=True)
    if image_token:
        tokenizer.add_tokens(
            [transformers.AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True
        )
    return tokenizer


def random_config(
    *,
    vision: dict[str, Any] | None = None,
    qformer: dict[str, Any] | None = None,
    text: dict[str, Any] | None = None,
    num_query_tokens: int = 4,
    image_token: bool = True,
    tied: bool = True,
    family: str = "opt",
) -> transformers.Blip2Config:
    """A small Blip2Config over a language model of TEXTS; vision, qformer and text replace single keys.

    The image token is the last id.
    """
    vision_config = {
        "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14, **(vision or {}),
    }  # fmt: skip
    qformer_config = {
        "hidden_size": 16, "intermediate_size": 28, "num_hidden_layers": 4, "num_attention_heads": 2,
        "vocab_size": 64, "max_position_embeddings": 32, **(qformer or {}),
    }  # fmt: skip
    text_config = {**TEXTS[family], "tie_word_embeddings": tied, **(text or {})}
    return transformers.Blip2Config(
        vision_config=vision_config,
        qformer_config=qformer_config,
        text_config=text_config,
        num_query_tokens=num_query_tokens,
        image_token_index=text_config["vocab_size"] - 1 if image_token else None,
        tie_word_embeddings=tied,
    )


def random_instruct_config(**overrides: Any) -> transformers.InstructBlipConfig:
    """As random_config(), of an InstructBLIP."""
    values = random_config(**overrides).to_dict()
    for part in ("vision_config", "qformer_config"):
        values[part].pop("model_type")
    values.pop("model_type")
    return transformers.InstructBlipConfig(**values)


def random_retrieval_config(**overrides: Any) -> transformers.Blip2Config:
    """As random_config(), of a retrieval model: the image token is the first id behind the Q-Former's vocabulary."""
    qformer = {"use_qformer_text_input": True, **overrides.pop("qformer", {})}
    config = random_config(qformer=qformer, **overrides)
    config.image_text_hidden_size = 12
    if config.image_token_index is not None:
        config.image_token_index = config.qformer_config.vocab_size
    return config


def randomize(model: torch.nn.Module, seed: int, gain: float = 1.3) -> None:
    """Draw every parameter anew: matrices by their fan-in, norms around one, biases and embeddings of visible size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith(("decoder.final_layer_norm.weight", "language_model.model.norm.weight")):
                # Signs at random: with a tied head the model would otherwise repeat its last token for ever.
                value = noise
            elif "norm" in name.lower() and name.endswith("weight"):
                value = 1.0 + 0.2 * noise
            elif name.endswith("bias"):
                value = 0.2 * noise
            elif name.endswith("query_tokens") or ("embed" in name and "patch" not in name) or "shared" in name:
                value = 0.5 * noise
            else:
                fan_in = int(np.prod(parameter.shape[1:])) if parameter.dim() > 1 else parameter.numel()
                # The path of the picture is made wider, so that a token really depends on it.
                wide = 3.0 if "crossattention" in name or "language_projection" in name else 1.0
                value = noise * gain * wide / max(fan_in, 1) ** 0.5
            parameter.copy_(value.to(parameter.dtype))


def reference_class(config: Any) -> Any:
    """transformers' class for a config of either kind."""
    if config.qformer_config.to_dict().get("use_qformer_text_input"):
        return transformers.Blip2ForImageTextRetrieval
    instruct = config.model_type == "instructblip"
    return transformers.InstructBlipForConditionalGeneration if instruct else transformers.Blip2ForConditionalGeneration


def random_model(config: Any, seed: int = 0, gain: float = 1.3, own_head: bool = False) -> Any:
    """transformers' model with every parameter random, float32, ready to compare with.

    own_head: the head is not the embedding, whatever the config says (T5's always says it is).
    """
    torch.manual_seed(seed)
    model = reference_class(config)(config).eval().float()
    if own_head:
        head = model.language_model.lm_head
        head.weight = torch.nn.Parameter(head.weight.clone())
    randomize(model, seed, gain)
    return model


def random_checkpoint(
    path: str | Path,
    seed: int = 0,
    *,
    dtype: str = "float32",
    tokenizer: bool = False,
    max_shard_size: str | None = None,
    gain: float = 1.3,
    own_head: bool = False,
    instruct: bool = False,
    retrieval: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint with transformers and return its folder.

    overrides go to random_config(); instruct makes it an InstructBLIP, retrieval a model of pictures
    and texts. dtype is what the weights are stored as.
    tokenizer=True adds a processor.
    Load the reference with reference_model(path): the stored values in float32.
    """
    path = Path(path)
    make = random_instruct_config if instruct else random_retrieval_config if retrieval else random_config
    config = make(**overrides)
    model = random_model(config, seed, gain, own_head).to(getattr(torch, dtype))
    # One dtype throughout, as the Hub's files have it: transformers alone would keep the Q-Former in float32.
    shards = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(path, **shards)
    if tokenizer:
        random_processor(config).save_pretrained(path)
    return path


def word_tokenizer(vocab_size: int = 64) -> transformers.PreTrainedTokenizerFast:
    """A WordPiece tokenizer of BERT's kind: [CLS] text [SEP], pads at the right."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, mask_token="[MASK]", model_max_length=int(1e30), **names
    )


def random_processor(config: Any) -> Any:
    """transformers' processor (the exact, Pillow one) for a random_config() or random_instruct_config()."""
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    size = config.vision_config.image_size
    has_image_token = config.image_token_index is not None
    make = small_t5_tokenizer if config.text_config.model_type == "t5" else small_tokenizer
    text = make(config.text_config.vocab_size, has_image_token)
    image = BlipImageProcessorPil(size={"height": size, "width": size})
    queries = config.num_query_tokens if has_image_token else None
    if config.qformer_config.to_dict().get("use_qformer_text_input"):
        return transformers.Blip2Processor(image, word_tokenizer(config.qformer_config.vocab_size), queries)
    if config.model_type == "instructblip":
        words = word_tokenizer(config.qformer_config.vocab_size)
        return transformers.InstructBlipProcessor(image, text, words, num_query_tokens=queries)
    return transformers.Blip2Processor(image, text, num_query_tokens=queries)


# Norms, and what reads them, both by the name of the layer that holds them.
READERS = {
    "layer_norm1": ["self_attn.qkv"],
    "layer_norm2": ["mlp.fc1"],
    "self_attn_layer_norm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "final_layer_norm": ["fc1"],
    "input_layernorm": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "post_attention_layernorm": ["mlp.gate_proj", "mlp.up_proj"],
    "layer_norm": ["SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "EncDecAttention.q", "DenseReluDense.wi_0",
                   "DenseReluDense.wi_1"],
}  # fmt: skip


def readers_of(name: str, names: dict[str, Any]) -> list[str]:
    """The weights that read the norm `name`."""
    stem, _, norm = name.removesuffix(".weight").rpartition(".")
    if stem.endswith("language_model.encoder"):  # T5's: read by the cross-attentions
        return [n for n in names if n.endswith(("EncDecAttention.k.weight", "EncDecAttention.v.weight"))]
    return [n for n in (f"{stem}.{reader}.weight" for reader in READERS.get(norm, [])) if n in names]


def plant_outliers(path: str | Path, channels: int = 2, factor: float = 100.0, seed: int = 0) -> None:
    """The same function in float32 with activations as real models have them: scale channels of norms, undo it behind.

    Of every norm in front of linear layers, in vision and the language model, `channels` channels grow by `factor`; the
    columns of the weights that read them shrink by it.
    """
    file = Path(path) / "model.safetensors"
    weights = load_file(file)
    rng = np.random.default_rng(seed)
    planted = set()
    for name in sorted(weights):
        readers = [] if name.startswith("qformer") or not name.endswith(".weight") else readers_of(name, weights)
        chosen = rng.choice(weights[name].shape[0], channels, replace=False) if readers else []
        for grown in (name, name.replace(".weight", ".bias")):
            if readers and grown in weights:
                weights[grown][chosen] *= factor
        for reader in readers:
            weights[reader][:, chosen] /= factor
            planted.add(reader.split(".")[0])
    assert planted == {"vision_model", "language_model"}
    save_file(weights, file, {"format": "pt"})


def calm_queries(path: str | Path) -> None:
    """A random T5's queries divided by sqrt(d_kv), as T5 itself draws them: its attention has no such factor.

    Without it the softmax of random weights takes one key or another, and float16's rounding decides which.
    """
    file = Path(path) / "model.safetensors"
    weights, width = load_file(file), json.loads((Path(path) / "config.json").read_text())["text_config"]["d_kv"]
    queries = [name for name in weights if name.endswith("Attention.q.weight")]
    assert queries
    for name in queries:
        weights[name] /= width**0.5
    save_file(weights, file, {"format": "pt"})


def reference_model(path: str | Path, dtype: torch.dtype = torch.float32) -> Any:
    """The checkpoint in transformers with exactly its stored values, computing in `dtype` (float32 or float64)."""
    # Eager attention: one formula everywhere, and the only one that returns attention weights.
    config = transformers.AutoConfig.from_pretrained(str(path))
    model = reference_class(config).from_pretrained(str(path), dtype=torch.float32, attn_implementation="eager")
    return model.eval().to(dtype)


def random_pixels(config: Any, batch: int, seed: int = 0) -> np.ndarray:
    """[batch, 3, S, S] float32 of the spread that a normalised picture has."""
    size = config.vision_config.image_size
    return np.random.default_rng(seed).normal(size=(batch, 3, size, size)).astype(np.float32)


def prompt_ids(config: Any, batch: int, length: int, seed: int = 0) -> np.ndarray:
    """[batch, Q + 1 + length] int64: the image tokens, bos, then random text ids."""
    rng = np.random.default_rng(seed)
    image = np.full((batch, config.num_query_tokens), config.image_token_index, np.int64)
    bos = np.full((batch, 1), config.text_config.bos_token_id, np.int64)
    text = rng.integers(4, config.text_config.vocab_size - 1, (batch, length))
    return np.concatenate([image, bos, text], axis=1)


def edit_config(path: str | Path, **changes: Any) -> dict[str, Any]:
    """Change keys of path/config.json (text_config__hidden_size reaches inside, None removes); returns the new one."""
    file = Path(path) / "config.json"
    config = json.loads(file.read_text())
    for key, value in changes.items():
        *parents, last = key.split("__")
        inner = config
        for parent in parents:
            inner = inner[parent]
        if value is None:
            inner.pop(last, None)
        else:
            inner[last] = value
    file.write_text(json.dumps(config))
    return config
