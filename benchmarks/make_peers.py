"""Gives the parts of a random checkpoint to the peers that have no BLIP-2, for timing beside it.

    python benchmarks/make_peers.py /tmp/blip2-opt-2.7b-random   /tmp/opt-2.7b-ct2      (CTranslate2, int8)
    python benchmarks/make_peers.py /tmp/blip2-llama-2.7b-random /tmp/llama-2.7b.gguf   (llama.cpp, Q8_0 and Q4_0)

OPT checkpoints become a CTranslate2 folder, with the vision encoder in a folder `vision` in it (CTranslate2 has no
vision encoder: its text encoder with the same layers), LLaMA checkpoints two files: OUT with Q8_0, and Q4_0 beside it
with "-q4" before the suffix. Needs `pip install ctranslate2` or `pip install gguf`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

Weights = Any  # a safetensors file: keys() and get_tensor(name)


class Reader:
    """Fills in CTranslate2's specifications from the tensors below `top`."""

    def __init__(self, weights: Weights, top: str) -> None:
        self.weights, self.top = weights, top

    def tensor(self, name: str) -> np.ndarray:
        # Matrices stay as stored until they are quantised one by one: in float32 they would take twice the memory.
        values: np.ndarray = self.weights.get_tensor(self.top + name)
        return values if values.ndim == 2 else values.astype(np.float32)

    def linear(self, spec: Any, *names: str) -> None:
        spec.weight = np.concatenate([self.tensor(f"{name}.weight") for name in names])
        spec.bias = np.concatenate([self.tensor(f"{name}.bias") for name in names])

    def norm(self, spec: Any, name: str) -> None:
        spec.gamma, spec.beta = self.tensor(f"{name}.weight"), self.tensor(f"{name}.bias")


def save_ctranslate2(model: Any, words: int, out: Path) -> None:
    """int8 as its converter quantises (one scale an output channel); the vocabulary is made up."""
    model.register_vocabulary([f"<{i}>" for i in range(words)])
    for name in ("bos_token", "eos_token", "unk_token"):
        if hasattr(model.config, name):
            setattr(model.config, name, "<2>")
    model.validate()
    model.optimize(quantization="int8")
    out.mkdir(parents=True, exist_ok=True)
    model.save(str(out))


def make_ctranslate2(weights: Weights, text: dict[str, Any], out: Path) -> None:
    """An OPT decoder in CTranslate2's own format."""
    from ctranslate2.specs import common_spec, transformer_spec

    read = Reader(weights, "language_model.model.decoder.")
    model = transformer_spec.TransformerDecoderModelSpec.from_config(
        text["num_hidden_layers"], text["num_attention_heads"], pre_norm=True, activation=common_spec.Activation.RELU
    )
    decoder = model.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = read.tensor("embed_tokens.weight")
    decoder.position_encodings.encodings = read.tensor("embed_positions.weight")[2:].astype(np.float32)
    decoder.projection.weight = decoder.embeddings.weight
    read.norm(decoder.layer_norm, "final_layer_norm")
    for i, layer in enumerate(decoder.layer):
        name = f"layers.{i}."
        read.linear(layer.self_attention.linear[0], *(f"{name}self_attn.{part}_proj" for part in "qkv"))
        read.linear(layer.self_attention.linear[1], f"{name}self_attn.out_proj")
        read.norm(layer.self_attention.layer_norm, f"{name}self_attn_layer_norm")
        read.linear(layer.ffn.linear_0, f"{name}fc1")
        read.linear(layer.ffn.linear_1, f"{name}fc2")
        read.norm(layer.ffn.layer_norm, f"{name}final_layer_norm")
    save_ctranslate2(model, text["vocab_size"], out)


def make_ctranslate2_vision(weights: Weights, vision: dict[str, Any], out: Path) -> None:
    """The layers of the vision encoder as a text encoder, which reads a token where the original has a patch."""
    from ctranslate2.specs import common_spec, transformer_spec

    read = Reader(weights, "vision_model.")
    encoder = transformer_spec.TransformerEncoderSpec(
        vision["num_hidden_layers"], vision["num_attention_heads"], activation=common_spec.Activation.GELU
    )
    positions = read.tensor("embeddings.position_embedding")[0]  # [T, D]
    encoder.scale_embeddings = False
    encoder.embeddings[0].weight = positions[::-1].copy()  # equal ones would become one, and both be quantised
    encoder.position_encodings.encodings = positions
    read.norm(encoder.layer_norm, "post_layernorm")
    for i, layer in enumerate(encoder.layer):
        name = f"encoder.layers.{i}."
        read.linear(layer.self_attention.linear[0], f"{name}self_attn.qkv")
        read.linear(layer.self_attention.linear[1], f"{name}self_attn.projection")
        read.norm(layer.self_attention.layer_norm, f"{name}layer_norm1")
        read.linear(layer.ffn.linear_0, f"{name}mlp.fc1")
        read.linear(layer.ffn.linear_1, f"{name}mlp.fc2")
        read.norm(layer.ffn.layer_norm, f"{name}layer_norm2")
    save_ctranslate2(transformer_spec.TransformerEncoderModelSpec(encoder), len(positions), out)


GGUF_LAYER = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def make_gguf(weights: Weights, text: dict[str, Any], out: Path, kind: str) -> None:
    """A LLaMA in llama.cpp's format; kind "Q8_0" or "Q4_0" for every matrix. The vocabulary is made up."""
    import gguf

    quantisation = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(text["hidden_size"])
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_feed_forward_length(text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(text.get("num_key_value_heads", text["num_attention_heads"]))
    writer.add_layer_norm_rms_eps(text.get("rms_norm_eps", 1e-6))
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list([f"<{i}>" for i in range(text["vocab_size"])])
    writer.add_token_scores([0.0] * text["vocab_size"])
    writer.add_token_types([gguf.TokenType.NORMAL] * text["vocab_size"])

    def matrix(name: str, source: str) -> None:
        values = np.asarray(weights.get_tensor(source), np.float32)
        writer.add_tensor(name, gguf.quants.quantize(values, quantisation), raw_dtype=quantisation)

    def norm(name: str, source: str) -> None:
        writer.add_tensor(name, np.asarray(weights.get_tensor(source), np.float32))

    top = "language_model.model."
    matrix("token_embd.weight", f"{top}embed_tokens.weight")
    matrix("output.weight", "language_model.lm_head.weight")
    norm("output_norm.weight", f"{top}norm.weight")
    for i in range(text["num_hidden_layers"]):
        for part, source in GGUF_LAYER.items():
            matrix(f"blk.{i}.{part}.weight", f"{top}layers.{i}.{source}.weight")
        norm(f"blk.{i}.attn_norm.weight", f"{top}layers.{i}.input_layernorm.weight")
        norm(f"blk.{i}.ffn_norm.weight", f"{top}layers.{i}.post_attention_layernorm.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    config = json.loads((arguments.folder / "config.json").read_text())
    text = config["text_config"]
    with safe_open(arguments.folder / "model.safetensors", "np") as weights:
        if text["model_type"] == "opt":
            make_ctranslate2(weights, text, arguments.out)
            make_ctranslate2_vision(weights, config["vision_config"], arguments.out / "vision")
        elif text["model_type"] == "llama":
            make_gguf(weights, text, arguments.out, "Q8_0")
            make_gguf(weights, text, arguments.out.with_stem(f"{arguments.out.stem}-q4"), "Q4_0")
        else:
            parser.error(f"no peer for a language model of type {text['model_type']}")


if __name__ == "__main__":
    main()
