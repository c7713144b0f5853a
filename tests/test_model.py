"""Every stage of the C model against transformers on random small checkpoints: hidden states, features, logits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from blip2c import _core
from blip2c.checkpoint import resolve_files
from blip2c.config import Blip2Config, core_config
from helpers import edit_config, prompt_ids, random_checkpoint, random_pixels, reference_model

HIDDEN_TOLERANCE = 1e-4  # relative to the largest value of the stage
LOGITS_TOLERANCE = 1e-3

# What a checkpoint may vary. Head widths: odd, 1, and the real 88, 80 and 64.
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "odd heads": {
        "vision": {"hidden_size": 21, "num_attention_heads": 3, "intermediate_size": 33},
        "qformer": {"hidden_size": 15, "num_attention_heads": 3, "intermediate_size": 17},
        "text": {"hidden_size": 33, "num_attention_heads": 3, "ffn_dim": 35},
    },
    "real head widths": {
        "vision": {"hidden_size": 176, "num_attention_heads": 2, "image_size": 56},
        "qformer": {"hidden_size": 128, "num_attention_heads": 2},
        "text": {"hidden_size": 160, "num_attention_heads": 2},
        "num_query_tokens": 32,
    },
    "heads of width one": {
        "vision": {"hidden_size": 6, "num_attention_heads": 6},
        "qformer": {"hidden_size": 5, "num_attention_heads": 5},
        "text": {"hidden_size": 4, "num_attention_heads": 4},
    },
    "one head, one layer": {
        "vision": {"num_attention_heads": 1, "num_hidden_layers": 1},
        "qformer": {"num_attention_heads": 1, "num_hidden_layers": 1},
        "text": {"num_attention_heads": 1, "num_hidden_layers": 1},
    },
    "no qkv bias": {"vision": {"qkv_bias": False}},
    "own head": {"tied": False},
    "patch does not divide the picture": {"vision": {"image_size": 31, "patch_size": 7}},
    "cross-attention in every layer": {"qformer": {"cross_attention_frequency": 1}},
    "cross-attention in every third layer": {"qformer": {"cross_attention_frequency": 3, "num_hidden_layers": 5}},
    "other activations": {
        "vision": {"hidden_act": "quick_gelu"},
        "qformer": {"hidden_act": "relu"},
        "text": {"activation_function": "gelu"},
    },
    "tanh gelu and silu": {"vision": {"hidden_act": "gelu_new"}, "qformer": {"hidden_act": "silu"}},
    "large epsilons": {"vision": {"layer_norm_eps": 0.1}, "qformer": {"layer_norm_eps": 0.2}},
    "norm after the sum": {"text": {"do_layer_norm_before": False}},
    "no final norm": {"text": {"_remove_final_layer_norm": True}},
    "no biases": {"text": {"enable_bias": False}},
    "no affine norms": {"text": {"layer_norm_elementwise_affine": False}},
    "one query": {"num_query_tokens": 1},
    "float16": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16, own head": {"dtype": "float16", "tied": False},
    "shards": {"max_shard_size": "20KB"},
}


def open_core(folder: Path, dtype: str = "auto") -> Any:
    return _core.Model([str(f) for f in resolve_files(folder)], core_config(Blip2Config.from_pretrained(folder)), dtype)


def relative_error(found: NDArray[Any], expected: Any) -> float:
    reference = expected.detach().double().numpy()
    assert found.shape == reference.shape
    return float(np.abs(found - reference).max() / np.abs(reference).max())


def packed(ids: NDArray[np.int64], image_token: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """[B, T] ids as the core takes them: packed, -1 for image places, offsets."""
    flat = np.where(ids == image_token, -1, ids).astype(np.int32).reshape(-1)
    return flat, np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]


@pytest.fixture(scope="module", params=list(VARIANTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The same checkpoint in blip2c and in transformers (float32)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    random_checkpoint(folder, seed=list(VARIANTS).index(request.param), **VARIANTS[request.param])
    return open_core(folder), reference_model(folder)


def test_vision_and_qformer_hidden_states(pair: tuple[Any, Any]) -> None:
    core, reference = pair
    pixels = random_pixels(reference.config, 3)
    found = core.encode_stages(pixels, hidden_states=True)
    with torch.no_grad():
        vision = reference.vision_model(torch.from_numpy(pixels), output_hidden_states=True)
        queries = reference.query_tokens.expand(3, -1, -1)
        qformer = reference.qformer(
            query_embeds=queries, encoder_hidden_states=vision.last_hidden_state, output_hidden_states=True
        )
        features = reference.language_projection(qformer.last_hidden_state)
    assert len(found["vision_hidden_states"]) == len(vision.hidden_states)
    assert len(found["qformer_hidden_states"]) == len(qformer.hidden_states)
    for ours, theirs in zip(found["vision_hidden_states"], vision.hidden_states, strict=True):
        assert relative_error(ours, theirs) <= HIDDEN_TOLERANCE
    for ours, theirs in zip(found["qformer_hidden_states"], qformer.hidden_states, strict=True):
        assert relative_error(ours, theirs) <= HIDDEN_TOLERANCE
    assert relative_error(found["vision"], vision.last_hidden_state) <= HIDDEN_TOLERANCE
    assert relative_error(found["pooled"], vision.pooler_output) <= HIDDEN_TOLERANCE
    assert relative_error(found["qformer"], qformer.last_hidden_state) <= HIDDEN_TOLERANCE
    assert relative_error(found["image_features"], features) <= HIDDEN_TOLERANCE
    np.testing.assert_array_equal(core.vision(pixels), found["vision"])
    np.testing.assert_array_equal(core.read(found["vision"]), found["image_features"])
    np.testing.assert_array_equal(core.encode(pixels), found["image_features"])
    with pytest.raises(ValueError, match="image_embeds: expected shape"):
        core.read(found["vision"][:, :, 1:])


def test_logits_and_language_hidden_states(pair: tuple[Any, Any]) -> None:
    core, reference = pair
    pixels, ids = random_pixels(reference.config, 3), prompt_ids(reference.config, 3, 6)
    flat, offsets = packed(ids, reference.config.image_token_index)
    found = core.forward(core.encode(pixels), flat, offsets, None, True)
    with torch.no_grad():
        expected = reference(
            pixel_values=torch.from_numpy(pixels), input_ids=torch.from_numpy(ids), output_hidden_states=True
        )
    states = expected.language_model_outputs.hidden_states
    assert len(found["hidden_states"]) == len(states)
    for ours, theirs in zip(found["hidden_states"], states, strict=True):
        assert relative_error(ours, theirs.flatten(0, 1)) <= HIDDEN_TOLERANCE
    difference = np.abs(found["logits"] - expected.logits.flatten(0, 1).numpy()).max()
    assert difference <= LOGITS_TOLERANCE


def test_pads_and_masks_as_transformers(pair: tuple[Any, Any]) -> None:
    core, reference = pair
    ids = prompt_ids(reference.config, 3, 8)
    mask = np.ones_like(ids)
    mask[0, -3:] = 0  # at the right
    queries = reference.config.num_query_tokens
    mask[1, queries : queries + 4] = 0  # between picture and text, where the processor puts them
    mask[2, queries + 2] = 0
    pixels = random_pixels(reference.config, 3)
    flat, offsets = packed(ids, reference.config.image_token_index)
    found = core.forward(core.encode(pixels), flat, offsets, mask.astype(np.uint8).reshape(-1))["logits"]
    with torch.no_grad():
        expected = reference(
            pixel_values=torch.from_numpy(pixels),
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
        ).logits
    assert np.abs(found - expected.flatten(0, 1).numpy()).max() <= LOGITS_TOLERANCE


def test_pictures_change_the_logits(pair: tuple[Any, Any]) -> None:
    core, reference = pair
    ids = prompt_ids(reference.config, 2, 4)
    ids[1] = ids[0]
    flat, offsets = packed(ids, reference.config.image_token_index)
    logits = core.forward(core.encode(random_pixels(reference.config, 2)), flat, offsets)["logits"]
    half = len(logits) // 2
    assert np.abs(logits[:half] - logits[half:]).max() > 1e-2


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A checkpoint wide enough that work is cut into several tiles and threads."""
    folder = tmp_path_factory.mktemp("wide")
    random_checkpoint(
        folder,
        seed=5,
        vision={"hidden_size": 352, "num_attention_heads": 4, "intermediate_size": 700, "image_size": 84},
        qformer={"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 400},
        text={"hidden_size": 320, "num_attention_heads": 4, "ffn_dim": 900, "vocab_size": 2000},
        num_query_tokens=8,
    )
    return open_core(folder), Blip2Config.from_pretrained(folder)


def test_places_in_a_batch_give_the_same_bits(wide: tuple[Any, Any]) -> None:
    core, config = wide
    pixels = random_pixels(config, 11)
    together = core.encode(pixels)
    assert len(np.unique(together[:, 0, 0])) == 11
    for place, picture in enumerate(pixels):
        np.testing.assert_array_equal(core.encode(picture[None])[0], together[place])
    order = np.random.default_rng(0).permutation(11)
    np.testing.assert_array_equal(core.encode(pixels[order]), together[order])


def test_ragged_rows_give_the_same_bits(wide: tuple[Any, Any]) -> None:
    core, config = wide
    features = core.encode(random_pixels(config, 7))
    rows = [packed(prompt_ids(config, 1, 3 * i, seed=i), config.image_token_index)[0] for i in range(7)]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    together = core.forward(features, np.concatenate(rows), offsets)["logits"]
    for i, row in enumerate(rows):
        alone = core.forward(features[i : i + 1], row, np.array([0, len(row)], np.int64))["logits"]
        np.testing.assert_array_equal(alone, together[offsets[i] : offsets[i + 1]])


def test_thread_counts_give_the_same_bits(wide: tuple[Any, Any]) -> None:
    core, config = wide
    pixels = random_pixels(config, 3)
    ids, offsets = packed(prompt_ids(config, 3, 5), config.image_token_index)
    before = _core.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 5, 8):
            _core.set_num_threads(threads)
            features = core.encode(pixels)
            results.append((features, core.forward(features, ids, offsets)["logits"]))
    finally:
        _core.set_num_threads(before)
    for features, logits in results[1:]:
        np.testing.assert_array_equal(features, results[0][0])
        np.testing.assert_array_equal(logits, results[0][1])


def test_one_model_for_many_threads(wide: tuple[Any, Any]) -> None:
    core, config = wide
    pixels = [random_pixels(config, 2, seed) for seed in range(8)]
    expected = [core.encode(p) for p in pixels]
    found: list[Any] = [None] * 8

    def work(i: int) -> None:
        found[i] = core.encode(pixels[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrowed_weights_equal_transformers_rounded_ones(tmp_path: Path, dtype: str) -> None:
    """dtype= rounds the matrices as torch does; float16 leaves the Q-Former alone, as transformers does."""
    random_checkpoint(tmp_path, seed=9)
    core = open_core(tmp_path, dtype)
    reference = reference_model(tmp_path)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            kept = dtype == "float16" and name.startswith(("qformer", "query_tokens"))
            table = "position" in name or "class" in name or name == "query_tokens"
            if parameter.dim() > 1 and not kept and not table:
                parameter.copy_(parameter.to(getattr(torch, dtype)).float())
    pixels, ids = random_pixels(reference.config, 2), prompt_ids(reference.config, 2, 5)
    flat, offsets = packed(ids, reference.config.image_token_index)
    found = core.forward(core.encode(pixels), flat, offsets)["logits"]
    with torch.no_grad():
        expected = reference(pixel_values=torch.from_numpy(pixels), input_ids=torch.from_numpy(ids)).logits
    assert core.dtype == dtype
    tolerance = LOGITS_TOLERANCE
    if "-pairs" in core.policies:
        # bfloat16 by name also rounds activations where the processor multiplies bfloat16: less than transformers does.
        with torch.no_grad():
            rounded = reference.bfloat16()(
                pixel_values=torch.from_numpy(pixels).bfloat16(), input_ids=torch.from_numpy(ids)
            ).logits
        tolerance = float((rounded.float() - expected).abs().max())
    assert np.abs(found - expected.flatten(0, 1).numpy()).max() <= tolerance


def test_a_stored_half_read_as_float32_is_the_same_model(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, seed=3, dtype="float16")
    pixels = random_pixels(Blip2Config.from_pretrained(tmp_path), 2)
    auto, full = open_core(tmp_path), open_core(tmp_path, "float32")
    np.testing.assert_array_equal(auto.encode(pixels), full.encode(pixels))
    assert full.nbytes == auto.nbytes


def rewrite(folder: Path, change: Any) -> None:
    """Load the tensors, let `change` edit the dict, save them again."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_split_query_and_value_biases(tmp_path: Path) -> None:
    """LAVIS-style files keep q_bias and v_bias; the key's bias is zero."""
    random_checkpoint(tmp_path / "fused", seed=4)
    random_checkpoint(tmp_path / "split", seed=4)

    def zero_keys(tensors: dict[str, Any]) -> None:
        for name in [n for n in tensors if n.endswith("qkv.bias")]:
            width = len(tensors[name]) // 3
            tensors[name][width : 2 * width] = 0

    def split(tensors: dict[str, Any]) -> None:
        zero_keys(tensors)
        for name in [n for n in tensors if n.endswith("qkv.bias")]:
            query, _, value = tensors.pop(name).chunk(3)
            tensors[name.replace("qkv.bias", "q_bias")] = query.clone()
            tensors[name.replace("qkv.bias", "v_bias")] = value.clone()

    rewrite(tmp_path / "fused", zero_keys)
    rewrite(tmp_path / "split", split)
    pixels = random_pixels(Blip2Config.from_pretrained(tmp_path / "fused"), 2)
    fused, separate = open_core(tmp_path / "fused"), open_core(tmp_path / "split")
    np.testing.assert_array_equal(fused.encode(pixels), separate.encode(pixels))
    assert separate.unexpected == []


def logits_of(core: Any, config: Any) -> NDArray[Any]:
    flat, offsets = packed(prompt_ids(config, 1, 5), config.image_token_index)
    result: NDArray[Any] = core.forward(core.encode(random_pixels(config, 1)), flat, offsets)["logits"]
    return result


@pytest.mark.parametrize("head", ["copy", "only", "different"])
def test_head_and_table_in_the_file(tmp_path: Path, head: str) -> None:
    """tie_word_embeddings with the head as a copy, as the only one of the two, or with its own values."""
    table, own = "language_model.model.decoder.embed_tokens.weight", "language_model.lm_head.weight"
    random_checkpoint(tmp_path, seed=6)

    def change(tensors: dict[str, Any]) -> None:
        tensors[own] = tensors[table].clone() if head != "different" else torch.randn_like(tensors[table])
        if head == "only":
            del tensors[table]

    rewrite(tmp_path, change)
    core, config = open_core(tmp_path), Blip2Config.from_pretrained(tmp_path)
    reference = reference_model(tmp_path)
    pixels, ids = torch.from_numpy(random_pixels(config, 1)), torch.from_numpy(prompt_ids(config, 1, 5))
    with torch.no_grad():
        expected = reference(pixel_values=pixels, input_ids=ids).logits[0]
    assert np.abs(logits_of(core, config) - expected.numpy()).max() <= LOGITS_TOLERANCE
    assert core.unexpected == []


def test_missing_and_unexpected_tensors(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, seed=7)
    name = "qformer.encoder.layer.2.crossattention.attention.value.weight"
    rewrite(tmp_path, lambda tensors: tensors.update(surplus=torch.zeros(3)))
    assert open_core(tmp_path).unexpected == ["surplus"]
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(_core.CheckpointError, match=f"{name}: missing"):
        open_core(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("language_projection.weight", torch.zeros(20, 15), r"expected shape \[20, 16\] .*found \[20, 15\]"),
        ("language_projection.bias", torch.zeros(20, dtype=torch.int32), "expected dtype F32, F16 or BF16, found I32"),
        ("query_tokens", torch.zeros(4, 16), r"expected shape \[1, 4, 16\] from the config, found \[4, 16\]"),
        ("vision_model.embeddings.position_embedding", torch.zeros(1, 6, 24), r"expected shape \[1, 5, 24\]"),
    ],
)
def test_tensors_that_disagree_with_the_config(tmp_path: Path, name: str, tensor: Any, message: str) -> None:
    random_checkpoint(tmp_path, seed=8)
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensor}))
    with pytest.raises(_core.CheckpointError, match=f"{name}: {message}"):
        open_core(tmp_path)


def test_configs_that_disagree_with_the_weights(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, seed=8)
    edit_config(tmp_path, text_config__num_hidden_layers=3)
    with pytest.raises(_core.CheckpointError, match=r"decoder\.layers\.2\..*missing"):
        open_core(tmp_path)
    edit_config(tmp_path, text_config__num_hidden_layers=2, vision_config__intermediate_size=41)
    with pytest.raises(_core.CheckpointError, match=r"mlp\.fc1\.weight: expected shape \[41, 24\]"):
        open_core(tmp_path)


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("vision_model.embeddings.class_embedding", "vision embeddings"),
        ("vision_model.encoder.layers.1.mlp.fc2.bias", "vision layer 1"),
        ("query_tokens", "qformer embeddings"),
        ("qformer.encoder.layer.2.crossattention.attention.value.bias", "qformer layer 2"),
        ("language_model.model.decoder.layers.1.fc1.weight", "language_model layer 1"),
        ("language_model.model.decoder.final_layer_norm.bias", "language_model head"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_numbers_in_weights_name_the_layer(tmp_path: Path, name: str, where: str, value: float) -> None:
    random_checkpoint(tmp_path, seed=10)

    def poison(tensors: dict[str, Any]) -> None:
        tensors[name].view(-1)[:] = value

    rewrite(tmp_path, poison)
    core, config = open_core(tmp_path), Blip2Config.from_pretrained(tmp_path)
    flat, offsets = packed(prompt_ids(config, 1, 3), config.image_token_index)
    options = {
        "max_length": None, "max_new_tokens": 2, "min_length": 0, "min_new_tokens": None, "num_beams": 1,
        "num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False, "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0, "eos_ids": [2], "pad_id": 1, "bad_words": [], "suppress_ids": [],
    }  # fmt: skip
    with pytest.raises(_core.NumericError, match=f"{where}: NaN or Inf"):
        core.generate(core.encode(random_pixels(config, 1)), flat, offsets, None, flat, options)


def test_bad_pixels_and_rows_leave_the_model_usable(wide: tuple[Any, Any]) -> None:
    core, config = wide
    good = random_pixels(config, 1)
    expected = core.encode(good)
    bad = good.copy()
    bad[0, 1, 3, 4] = np.nan
    with pytest.raises(_core.NumericError, match="vision embeddings"):
        core.encode(bad)
    with pytest.raises(ValueError, match=r"pixel_values: expected shape \[batch, 3, 84, 84\]"):
        core.encode(good[:, :, :70])
    with pytest.raises(TypeError, match=r"pixel_values: expected an array of .*float32"):
        core.encode(good.astype(np.float64))
    with pytest.raises(TypeError, match="expected a numpy array, found list"):
        core.encode([1, 2])
    ids, offsets = packed(prompt_ids(config, 1, 3), config.image_token_index)
    with pytest.raises(ValueError, match="row 0: 7 image places in the prompt, expected 8"):
        core.forward(expected, ids[1:], offsets - [0, 1])
    with pytest.raises(IndexError, match="token id 2000 is outside the vocabulary of 2000"):
        core.forward(expected, np.where(ids == 2, 2000, ids).astype(np.int32), offsets)
    with pytest.raises(ValueError, match="the prompt is empty"):
        core.forward(None, ids[:0], np.array([0, 0], np.int64))
    long = np.concatenate([ids, np.full(200, 5, np.int32)])
    with pytest.raises(ValueError, match="the prompt has 212 tokens, the language model has positions for 160"):
        core.forward(expected, long, np.array([0, len(long)], np.int64))
    np.testing.assert_array_equal(core.encode(good), expected)
    assert core.encode(good[:0]).shape == (0, 8, 320)


def test_strided_and_read_only_arrays(wide: tuple[Any, Any]) -> None:
    core, config = wide
    pixels = random_pixels(config, 2)
    expected = core.encode(pixels)
    np.testing.assert_array_equal(core.encode(np.asfortranarray(pixels)), expected)
    np.testing.assert_array_equal(core.encode(np.repeat(pixels, 2, axis=0)[::2]), expected)
    pixels.setflags(write=False)
    np.testing.assert_array_equal(core.encode(pixels), expected)


def test_failed_allocations_are_memory_errors(tmp_path: Path) -> None:
    """Fail the k-th allocation of each call for every k: MemoryError, and the next try works."""
    random_checkpoint(tmp_path, seed=11)
    pixels = random_pixels(Blip2Config.from_pretrained(tmp_path), 1)
    expected = open_core(tmp_path).encode(pixels)
    core = open_core(tmp_path)
    ids, offsets = np.full(3, 5, np.int32), np.array([0, 3], np.int64)
    calls: list[tuple[Any, int]] = [
        (lambda: open_core(tmp_path), 40),
        (lambda: core.encode(pixels), 20),
        (lambda: core.encode_stages(pixels, hidden_states=True), 5),
        (lambda: core.forward(None, ids, offsets, hidden_states=True), 5),
    ]
    for work, count in calls:
        failures = 0
        for k in range(1, 2000):
            _core._fail_allocation_after(k)
            try:
                work()
                break
            except MemoryError:
                failures += 1
            finally:
                _core._fail_allocation_after(0)
        assert failures >= min(count, 1)
        assert failures < 1999
    np.testing.assert_array_equal(core.encode(pixels), expected)


def test_scratch_for_a_model_wider_than_its_inner_layer_and_vocabulary(tmp_path: Path) -> None:
    """The plan counts the widest input of a product, whichever it is; more rows ask for more, so several counts."""
    text = {"hidden_size": 1024, "num_attention_heads": 64, "ffn_dim": 16, "num_hidden_layers": 1}
    random_checkpoint(tmp_path, seed=14, text={**text, "vocab_size": 64, "max_position_embeddings": 1100})
    core = open_core(tmp_path)
    for tokens in (1, 16, 60, 80, 120, 300, 1024):
        ids = np.full(tokens, 5, np.int32)
        logits = core.forward(None, ids, np.array([0, tokens], np.int64))["logits"]
        assert np.isfinite(logits).all()


def test_a_model_is_loaded_once(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, seed=15)
    paths, config = [str(f) for f in resolve_files(tmp_path)], core_config(Blip2Config.from_pretrained(tmp_path))
    core = _core.Model.__new__(_core.Model)

    class Loader(dict[str, Any]):
        """Loads the same object while its configuration is read, as another thread may while files are read."""

        def __getitem__(self, key: str) -> Any:
            if key == "num_query_tokens":
                core.__init__(paths, config)
            return super().__getitem__(key)

    with pytest.raises(RuntimeError, match="already loaded"):
        core.__init__(paths, Loader(config))
    assert np.isfinite(core.encode(random_pixels(Blip2Config.from_pretrained(tmp_path), 1))).all()


def test_tokens_of_no_row_are_refused(wide: tuple[Any, Any]) -> None:
    """Their logits would be memory that nobody wrote."""
    core, _ = wide
    with pytest.raises(ValueError, match="offsets: expected to begin with 0, found 5"):
        core.forward(None, np.full(5, 3, np.int32), np.array([5], np.int64))
    assert core.forward(None, np.zeros(0, np.int32), np.zeros(1, np.int64))["logits"].shape[0] == 0
