"""Writes a random checkpoint of true size (float16, 7.5 to 7.9 GB), for timing: blip2-opt-2.7b, the same with a LLaMA,
blip2-flan-t5-xl, or (2.4 GB) blip2-itm-vit-g, which has no language model.

The weights are scaled so that activations stay finite; the captions are nonsense, the work is that of the real model.

    python benchmarks/make_checkpoint.py /tmp/blip2-opt-2.7b-random
    python benchmarks/make_checkpoint.py /tmp/blip2-llama-2.7b-random --language llama
    python benchmarks/make_checkpoint.py /tmp/blip2-flan-t5-xl-random --language t5
    python benchmarks/make_checkpoint.py /tmp/blip2-itm-vit-g-random --language none
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

VISION = {"hidden_size": 1408, "intermediate_size": 6144, "num_hidden_layers": 39, "num_attention_heads": 16}
QFORMER = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
OPT = {
    "model_type": "opt", "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32, "num_attention_heads": 32,
    "vocab_size": 50304, "max_position_embeddings": 2048, "bos_token_id": 2, "eos_token_id": 50118, "pad_token_id": 1,
    "word_embed_proj_dim": 2560, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
T5 = {
    "model_type": "t5", "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_layers": 24, "num_decoder_layers": 24,
    "num_heads": 32, "feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu", "is_gated_act": True,
    "relative_attention_num_buckets": 32, "vocab_size": 32128, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
    "decoder_start_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
TEXT_SIDE = {"vocab_size": 30523, "max_position_embeddings": 512, "use_qformer_text_input": True}
PROJECTION = 256
QUERIES = 32
IMAGE_SIZE, PATCH = 224, 14

Shapes = dict[str, tuple[int, ...]]


def linear(name: str, rows: int, cols: int) -> Shapes:
    return {f"{name}.weight": (rows, cols), f"{name}.bias": (rows,)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def vision_shapes() -> Shapes:
    width, inner = VISION["hidden_size"], VISION["intermediate_size"]
    top = "vision_model."
    shapes: Shapes = {
        f"{top}embeddings.class_embedding": (1, 1, width),
        f"{top}embeddings.position_embedding": (1, 1 + (IMAGE_SIZE // PATCH) ** 2, width),
        f"{top}embeddings.patch_embedding.weight": (width, 3, PATCH, PATCH),
        f"{top}embeddings.patch_embedding.bias": (width,),
        **norm(f"{top}post_layernorm", width),
    }
    for i in range(VISION["num_hidden_layers"]):
        layer = f"{top}encoder.layers.{i}."
        shapes |= norm(f"{layer}layer_norm1", width) | norm(f"{layer}layer_norm2", width)
        shapes |= linear(f"{layer}self_attn.qkv", 3 * width, width)
        shapes |= linear(f"{layer}self_attn.projection", width, width)
        shapes |= linear(f"{layer}mlp.fc1", inner, width) | linear(f"{layer}mlp.fc2", width, inner)
    return shapes


def qformer_shapes() -> Shapes:
    width, inner = QFORMER["hidden_size"], QFORMER["intermediate_size"]
    shapes: Shapes = {"query_tokens": (1, QUERIES, width), **norm("qformer.layernorm", width)}
    for i in range(QFORMER["num_hidden_layers"]):
        layer = f"qformer.encoder.layer.{i}."
        sources = {"attention": width} | ({"crossattention": VISION["hidden_size"]} if i % 2 == 0 else {})
        for part, source in sources.items():
            shapes |= linear(f"{layer}{part}.attention.query", width, width)
            shapes |= linear(f"{layer}{part}.attention.key", width, source)
            shapes |= linear(f"{layer}{part}.attention.value", width, source)
            shapes |= linear(f"{layer}{part}.output.dense", width, width)
            shapes |= norm(f"{layer}{part}.output.LayerNorm", width)
        shapes |= linear(f"{layer}intermediate_query.dense", inner, width)
        shapes |= linear(f"{layer}output_query.dense", width, inner)
        shapes |= norm(f"{layer}output_query.LayerNorm", width)
    return shapes


def opt_shapes() -> Shapes:
    width, inner, vocabulary = OPT["hidden_size"], OPT["ffn_dim"], OPT["vocab_size"]
    top = "language_model.model.decoder."
    shapes: Shapes = {
        f"{top}embed_tokens.weight": (vocabulary, width),
        f"{top}embed_positions.weight": (OPT["max_position_embeddings"] + 2, width),
        **norm(f"{top}final_layer_norm", width),
    }
    for i in range(OPT["num_hidden_layers"]):
        layer = f"{top}layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= linear(f"{layer}self_attn.{part}", width, width)
        shapes |= norm(f"{layer}self_attn_layer_norm", width) | norm(f"{layer}final_layer_norm", width)
        shapes |= linear(f"{layer}fc1", inner, width) | linear(f"{layer}fc2", width, inner)
    return shapes


def llama_shapes() -> Shapes:
    width, inner, vocabulary = LLAMA["hidden_size"], LLAMA["intermediate_size"], LLAMA["vocab_size"]
    top = "language_model.model."
    shapes: Shapes = {
        f"{top}embed_tokens.weight": (vocabulary, width),
        f"{top}norm.weight": (width,),
        "language_model.lm_head.weight": (vocabulary, width),
    }
    for i in range(LLAMA["num_hidden_layers"]):
        layer = f"{top}layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{layer}self_attn.{part}.weight"] = (width, width)
        for part in ("gate_proj", "up_proj"):
            shapes[f"{layer}mlp.{part}.weight"] = (inner, width)
        shapes[f"{layer}mlp.down_proj.weight"] = (width, inner)
        shapes[f"{layer}input_layernorm.weight"] = shapes[f"{layer}post_attention_layernorm.weight"] = (width,)
    return shapes


def t5_shapes() -> Shapes:
    width, inner, heads = T5["d_model"], T5["d_ff"], T5["num_heads"] * T5["d_kv"]
    top = "language_model."
    shapes: Shapes = {f"{top}{name}.weight": (T5["vocab_size"], width) for name in ("shared", "lm_head")}
    for stack, count in (("encoder", T5["num_layers"]), ("decoder", T5["num_decoder_layers"])):
        attentions = ("SelfAttention",) if stack == "encoder" else ("SelfAttention", "EncDecAttention")
        shapes[f"{top}{stack}.final_layer_norm.weight"] = (width,)
        shapes[f"{top}{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (
            T5["relative_attention_num_buckets"],
            T5["num_heads"],
        )
        for i in range(count):
            layer = f"{top}{stack}.block.{i}.layer."
            for j, attention in enumerate(attentions):
                for part in "qkv":
                    shapes[f"{layer}{j}.{attention}.{part}.weight"] = (heads, width)
                shapes[f"{layer}{j}.{attention}.o.weight"] = (width, heads)
            for part in ("wi_0", "wi_1"):
                shapes[f"{layer}{len(attentions)}.DenseReluDense.{part}.weight"] = (inner, width)
            shapes[f"{layer}{len(attentions)}.DenseReluDense.wo.weight"] = (width, inner)
            shapes |= {f"{layer}{j}.layer_norm.weight": (width,) for j in range(len(attentions) + 1)}
    return shapes


def retrieval_shapes() -> Shapes:
    width, inner = QFORMER["hidden_size"], QFORMER["intermediate_size"]
    shapes: Shapes = {
        "embeddings.word_embeddings.weight": (TEXT_SIDE["vocab_size"], width),
        "embeddings.position_embeddings.weight": (TEXT_SIDE["max_position_embeddings"], width),
        **linear("vision_projection", PROJECTION, width),
        **linear("text_projection", PROJECTION, width),
        **linear("itm_head", 2, width),
    }
    for i in range(QFORMER["num_hidden_layers"]):
        layer = f"qformer.encoder.layer.{i}."
        shapes |= linear(f"{layer}intermediate.dense", inner, width) | linear(f"{layer}output.dense", width, inner)
        shapes |= norm(f"{layer}output.LayerNorm", width)
    return shapes


class Language(NamedTuple):
    """A language model's config, its width, where its vocabulary has room for the picture, and its weights.

    width 0: there is none, and the weights are those of retrieval.
    """

    config: dict[str, Any]
    width: int
    image_token: int
    shapes: Callable[[], Shapes]


LANGUAGES = {
    "opt": Language(OPT, OPT["hidden_size"], 50265, opt_shapes),
    "llama": Language(LLAMA, LLAMA["hidden_size"], 32000, llama_shapes),
    "t5": Language(T5, T5["d_model"], 32100, t5_shapes),
    "none": Language(OPT, 0, TEXT_SIDE["vocab_size"], retrieval_shapes),
}


def config(language: Language) -> dict[str, object]:
    """config.json as transformers writes it."""
    text = language.config
    return {
        "architectures": ["Blip2ForConditionalGeneration" if language.width else "Blip2ForImageTextRetrieval"],
        "model_type": "blip-2",
        "dtype": "float16",
        "num_query_tokens": QUERIES,
        "image_token_index": language.image_token,
        "image_text_hidden_size": PROJECTION,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "vision_config": {"model_type": "blip_2_vision_model", "image_size": IMAGE_SIZE, "patch_size": PATCH, **VISION},
        "qformer_config": {
            "model_type": "blip_2_qformer", "cross_attention_frequency": 2, "encoder_hidden_size": 1408, **QFORMER,
            **({} if language.width else TEXT_SIDE),
        },
        "text_config": text,
    }  # fmt: skip


def values(name: str, shape: tuple[int, ...], pool: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Normal numbers of a fitting size, cut from a pool at a random place: drawing 3.7 G of them would take minutes."""
    count = int(np.prod(shape))
    if "norm" in name.lower():
        return np.full(shape, 1.0 if name.endswith("weight") else 0.0, np.float16)
    fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 10_000
    # T5 has no factor in its attention: as it is drawn for training, its queries hold it.
    factor = 0.7 / fan_in**0.5 / (8.0 if name.endswith("Attention.q.weight") else 1.0)
    start = int(rng.integers(0, pool.size - 1))
    flat = np.take(pool, np.arange(start, start + count), mode="wrap")
    return (flat * np.float16(factor)).astype(np.float16).reshape(shape)


def tensors(shapes: Shapes, seed: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(seed)
    pool = rng.standard_normal(1 << 24, dtype=np.float32).astype(np.float16)
    for name, shape in shapes.items():
        yield values(name, shape, pool, rng)


def write(folder: Path, seed: int, language: Language) -> int:
    """The checkpoint, streamed tensor by tensor; returns its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    projection = linear("language_projection", language.width, QFORMER["hidden_size"]) if language.width else {}
    shapes = {**vision_shapes(), **qformer_shapes(), **projection, **language.shapes()}
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors(shapes, seed):
            file.write(array.tobytes())
    (folder / "config.json").write_text(json.dumps(config(language), indent=2))
    preprocessor = {
        "image_processor_type": "BlipImageProcessor", "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711],
        "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "resample": 3,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor, indent=2))
    return offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--language", choices=sorted(LANGUAGES), default="opt")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    size = write(arguments.folder, arguments.seed, LANGUAGES[arguments.language])
    print(f"{arguments.folder}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
