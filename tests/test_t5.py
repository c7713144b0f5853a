"""T5 and Flan-T5 as the language model against transformers: stages, logits, tokens, files, text, half precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers.models.t5.modeling_t5 import T5Attention

import blip2c
from blip2c import Blip2Config, CheckpointError, UnsupportedError, _core, kernels
from blip2c.cli import main
from blip2c.config import core_config
from helpers import (
    prompt_ids,
    random_checkpoint,
    random_config,
    random_model,
    random_pixels,
    reference_model,
)

# (of the text config, has a head of its own)
VARIANTS: list[tuple[dict[str, Any], bool]] = [
    ({}, False),
    ({}, True),
    ({"tie_word_embeddings": False}, True),
    ({"tie_word_embeddings": False}, False),
    ({"feed_forward_proj": "relu", "d_kv": 4, "num_heads": 5}, False),
    ({"feed_forward_proj": "gated-silu", "num_heads": 1, "num_layers": 1, "num_decoder_layers": 3}, False),
    ({"dense_act_fn": "gelu", "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128}, True),
    ({"layer_norm_epsilon": 0.1, "d_ff": 7, "d_model": 33}, False),
]


def pair(folder: Path, seed: int = 3, **options: Any) -> tuple[Any, Any]:
    random_checkpoint(folder, seed=seed, family="t5", **options)
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder), reference_model(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return pair(tmp_path_factory.mktemp("t5"), tokenizer=True, gain=1.6)


def inputs(config: Any, decoder: int = 9) -> dict[str, np.ndarray]:
    """Three rows with pads on the right, in the middle and among the picture's places, and decoder ids."""
    ids = prompt_ids(config, 3, 14)
    mask, decoder_mask = np.ones_like(ids), np.ones((3, decoder), np.int64)
    mask[0, -4:], mask[1, 6:9], mask[2, 1:7] = 0, 0, 0
    decoder_mask[1, :3], decoder_mask[2, 4] = 0, 0
    decoder_ids = np.random.default_rng(1).integers(0, config.text_config.vocab_size, (3, decoder))
    return {
        "pixel_values": random_pixels(config, 3), "input_ids": ids, "attention_mask": mask,
        "decoder_input_ids": decoder_ids, "decoder_attention_mask": decoder_mask,
    }  # fmt: skip


def tensors(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}


def near(ours: np.ndarray, theirs: torch.Tensor, seen: np.ndarray, tolerance: float = 2e-4) -> None:
    """Equal where `seen`, measured against the largest value. T5's scores are not scaled: random ones are so large that
    the rounding of float32 shows.
    """
    expected = theirs.detach().float().numpy().reshape(ours.shape)[seen]
    assert np.abs(ours[seen] - expected).max() <= tolerance * max(1.0, np.abs(expected).max())


# ---- distances ----


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (32, 64), (8, 12), (4, 3), (5, 40), (64, 1000), (33, 128)])
def test_distances_fall_into_upstreams_buckets(buckets: int, most: int, bidirectional: bool) -> None:
    table = np.arange(2 * buckets, dtype=np.float32).reshape(buckets, 2)
    found = kernels.distance_bias(table, most, bidirectional)
    distances = torch.arange(-3 * most, 3 * most + 1)
    expected = T5Attention._relative_position_bucket(distances, bidirectional, buckets, most).numpy()
    clamped = np.clip(distances.numpy(), -most, most) + most
    if not bidirectional:  # hidden by the causal mask
        clamped, expected = clamped[distances <= 0], expected[distances <= 0]
    np.testing.assert_array_equal(found[:, clamped], table[expected].T)


def test_impossible_buckets_are_refused() -> None:
    with pytest.raises(ValueError, match="3 buckets"):
        kernels.distance_bias(np.zeros((3, 1), np.float32), 9, True)
    with pytest.raises(ValueError, match="distances up to 4"):
        kernels.distance_bias(np.zeros((8, 1), np.float32), 4, True)


# ---- stages ----


@pytest.mark.parametrize(("text", "own_head"), VARIANTS, ids=range(len(VARIANTS)))
def test_every_stage_and_logits(tmp_path: Path, text: dict[str, Any], own_head: bool) -> None:
    model, reference = pair(tmp_path, text=text, own_head=own_head)
    given = inputs(model.config)
    with torch.no_grad():
        expected = reference(**tensors(given), output_hidden_states=True)
    logits = model(**given).logits
    seen, decoded = given["attention_mask"].reshape(-1) == 1, given["decoder_attention_mask"].reshape(-1) == 1
    near(logits.reshape(-1, logits.shape[-1]), expected.logits, decoded)
    ids = np.where(given["input_ids"] == model.config.image_token_index, -1, given["input_ids"])
    found = model._core.forward(
        model._core.encode(given["pixel_values"]),
        ids.astype(np.int32).reshape(-1),
        np.arange(4, dtype=np.int64) * ids.shape[1],
        given["attention_mask"].astype(np.uint8).reshape(-1),
        hidden_states=True,
        decoder_ids=given["decoder_input_ids"].astype(np.int32).reshape(-1),
        decoder_offsets=np.arange(4, dtype=np.int64) * 9,
        decoder_mask=given["decoder_attention_mask"].astype(np.uint8).reshape(-1),
    )
    for name, rows in (("encoder_hidden_states", seen), ("decoder_hidden_states", decoded)):
        theirs = expected.language_model_outputs[name]
        assert len(found[name]) == len(theirs)
        for a, b in zip(found[name], theirs, strict=True):
            near(a, b, rows)


def test_longer_than_any_bucket(models: tuple[Any, Any]) -> None:
    """Distances beyond the last bucket; no number of positions ends a T5."""
    model, reference = models
    pixels, ids = random_pixels(model.config, 1), prompt_ids(model.config, 1, 600)
    decoder = np.random.default_rng(2).integers(0, 300, (1, 700))
    with torch.no_grad():
        expected = reference(**tensors({"pixel_values": pixels, "input_ids": ids, "decoder_input_ids": decoder}))
    logits = model(pixels, ids, decoder_input_ids=decoder).logits
    near(logits, expected.logits, np.ones(logits.shape[:2], bool))


def test_rows_are_packed_and_do_not_see_each_other(models: tuple[Any, Any]) -> None:
    """Rows of unequal length, on both sides, have the bits that each has alone, whatever the threads."""
    model = models[0]
    rng = np.random.default_rng(4)
    features = model._core.encode(random_pixels(model.config, 3))
    prompts = [np.r_[[-1] * features.shape[1], rng.integers(3, 300, n)].astype(np.int32) for n in (3, 21, 8)]
    decoders = [rng.integers(0, 300, n).astype(np.int32) for n in (12, 1, 5)]

    def run(rows: list[int]) -> np.ndarray:
        offsets, decoder_offsets = (
            np.cumsum([0] + [len(part[row]) for row in rows], dtype=np.int64) for part in (prompts, decoders)
        )
        return model._core.forward(
            np.ascontiguousarray(features[rows]), np.concatenate([prompts[row] for row in rows]), offsets,
            decoder_ids=np.concatenate([decoders[row] for row in rows]), decoder_offsets=decoder_offsets,
        )["logits"]  # fmt: skip

    alone = np.concatenate([run([row]) for row in range(3)])
    before = blip2c.get_num_threads()
    try:
        for threads in (1, 3):
            blip2c.set_num_threads(threads)
            assert run([0, 1, 2]).tobytes() == alone.tobytes()
    finally:
        blip2c.set_num_threads(before)


# ---- generate ----

BEGINNINGS: list[dict[str, Any]] = [
    {"max_new_tokens": 12},
    {"max_length": 9},
    {"num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 10},
    {"max_new_tokens": 5, "decoder_input_ids": np.array([[0, 7, 8], [0, 9, 4], [0, 3, 4]])},
    {"max_new_tokens": 5, "decoder_input_ids": np.array([[7, 8], [9, 4], [3, 4]]), "num_beams": 2},
    {
        "max_new_tokens": 6, "repetition_penalty": 1.7, "decoder_input_ids": np.array([[7, 8], [9, 0], [3, 4]]),
        "decoder_attention_mask": np.array([[0, 1], [1, 1], [1, 0]]),
    },
    {"max_new_tokens": 6, "decoder_start_token_id": 5},
    {"max_new_tokens": 6, "decoder_start_token_id": [5, 6, 7], "min_length": 4},
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", BEGINNINGS, ids=range(len(BEGINNINGS)))
def test_decoder_ids_equal_transformers(models: tuple[Any, Any], options: dict[str, Any], masked: bool) -> None:
    model, reference = models
    given = {k: v for k, v in inputs(model.config).items() if not k.startswith("decoder")}
    if not masked:
        del given["attention_mask"]
    found = model.generate(**given, **options)
    np.testing.assert_array_equal(found, reference.generate(**tensors(given), **tensors(options)).numpy())
    assert found[0, 0] == np.ravel(options.get("decoder_start_token_id", 0))[0]


def test_without_a_prompt_and_as_a_tensor(models: tuple[Any, Any]) -> None:
    model, reference = models
    pixels = torch.from_numpy(random_pixels(model.config, 2))
    found = model.generate(pixels, max_new_tokens=8)
    assert torch.equal(found, reference.generate(pixels, max_new_tokens=8))
    other = torch.from_numpy(random_pixels(model.config, 2, seed=9))
    assert not torch.equal(found, model.generate(other, max_new_tokens=8))  # the picture is seen


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"decoder_input_ids": np.array([[0, 1]])}, ValueError, "decoder_input_ids has 1 rows, input_ids has 2"),
        ({"decoder_input_ids": np.array([[0], [320]])}, ValueError, r"decoder_input_ids\[1, 0\] is 320"),
        ({"decoder_input_ids": np.zeros((2, 0), np.int64)}, ValueError, "decoder_input_ids is empty"),
        ({"decoder_attention_mask": np.ones((2, 2))}, ValueError, r"decoder_attention_mask has shape \(2, 2\)"),
        ({"decoder_start_token_id": [1, 2, 3]}, ValueError, "has 3 entries, expected one for each of 2 rows"),
        ({"decoder_start_token_id": 4000}, ValueError, r"decoder_start_token_id\[0, 0\] is 4000"),
        ({"decoder_start_token_id": 0.5}, TypeError, "must be an integer"),
        ({"max_length": 1}, ValueError, "max_length"),
    ],
)
def test_wrong_beginnings_are_named(
    models: tuple[Any, Any], options: dict[str, Any], error: type[Exception], words: str
) -> None:
    model = models[0]
    with pytest.raises(error, match=words):
        model.generate(random_pixels(model.config, 2), prompt_ids(model.config, 2, 2), **options)


def test_more_tokens_than_can_be_counted(models: tuple[Any, Any]) -> None:
    """There are no learned positions whose number could be named."""
    with pytest.raises(ValueError, match=r"up to 4611686018427387904 new ones, but no more than 2147483647 tokens"):
        models[0].generate(random_pixels(models[1].config, 1), max_new_tokens=2**62)


def test_forward_needs_decoder_ids(models: tuple[Any, Any]) -> None:
    model = models[0]
    with pytest.raises(ValueError, match="decoder_input_ids must be given"):
        model(random_pixels(model.config, 1), prompt_ids(model.config, 1, 2))


def test_without_a_start_token(tmp_path: Path) -> None:
    model, _ = pair(tmp_path, text={"decoder_start_token_id": None, "bos_token_id": None})
    pixels, ids = random_pixels(model.config, 1), np.full((1, 5), model.config.image_token_index)
    ids[0, -1] = 4
    with pytest.raises(ValueError, match="decoder_start_token_id or bos_token_id must be given"):
        model.generate(pixels, ids, max_new_tokens=2)
    assert model.generate(pixels, ids, max_new_tokens=2, bos_token_id=9)[0, 0] == 9


# ---- files ----

TABLES = ("shared", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head")


def rewrite(folder: Path, tables: dict[str, torch.Tensor]) -> None:
    """Leave only these token tables in the file."""
    file = folder / "model.safetensors"
    weights = {k: v for k, v in load_file(file).items() if not k.endswith(tuple(f"{name}.weight" for name in TABLES))}
    save_file({**weights, **{f"language_model.{k}.weight": v for k, v in tables.items()}}, file, {"format": "pt"})


@pytest.mark.filterwarnings("ignore:The tied weights")
@pytest.mark.parametrize(
    "names", ["s", "sed", "sedh", "sH", "d", "h", "e", "edh", "dH", "sEh"], ids=lambda names: f"tables-{names}"
)
def test_names_of_the_token_table(tmp_path: Path, names: str) -> None:
    """s, e, d, h: the table under this name; in capitals: another one."""
    random_checkpoint(tmp_path, seed=6, family="t5")
    table = load_file(tmp_path / "model.safetensors")["language_model.shared.weight"]
    of = {"s": "shared", "e": "encoder.embed_tokens", "d": "decoder.embed_tokens", "h": "lm_head"}
    rewrite(tmp_path, {of[n.lower()]: (table.clone() if n.islower() else table.flip(0).contiguous()) for n in names})
    model, reference = blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path), reference_model(tmp_path)
    given = inputs(model.config)
    with torch.no_grad():
        expected = reference(**tensors(given)).logits
    near(model(**given).logits, expected, given["decoder_attention_mask"] == 1)
    assert model.num_parameters() == reference.num_parameters() - (table.numel() if "E" in names else 0)


def test_tables_that_are_not_computed_or_missing(tmp_path: Path) -> None:
    random_checkpoint(tmp_path, seed=6, family="t5")
    table = load_file(tmp_path / "model.safetensors")["language_model.shared.weight"]
    rewrite(tmp_path, {"shared": table, "decoder.embed_tokens": table.flip(0).contiguous()})
    with pytest.raises(
        UnsupportedError, match=r"decoder.embed_tokens.weight: differs from language_model.shared.weight"
    ):
        blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    rewrite(tmp_path, {})
    with pytest.raises(CheckpointError, match=r"language_model.shared.weight: missing"):
        blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path)


@pytest.mark.filterwarnings("error")
def test_a_bias_that_nobody_reads_is_known(tmp_path: Path) -> None:
    """Files of the first T5 hold a relative bias for cross-attention, which upstream ignores."""
    random_checkpoint(tmp_path, family="t5")
    file = tmp_path / "model.safetensors"
    extra = {"language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.ones(8, 3)}
    save_file({**load_file(file), **extra}, file, {"format": "pt"})
    assert blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path)._core.unexpected == []


@pytest.mark.parametrize("own_head", [False, True])
def test_saved_models_come_back_here_and_there(tmp_path: Path, own_head: bool) -> None:
    model, _ = pair(tmp_path / "a", text={"scale_decoder_outputs": False}, own_head=own_head)
    model.save_pretrained(tmp_path / "b")
    again, there = blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "b"), reference_model(tmp_path / "b")
    given = inputs(model.config)
    assert again(**given).logits.tobytes() == model(**given).logits.tobytes()
    with torch.no_grad():
        near(model(**given).logits, there(**tensors(given)).logits, given["decoder_attention_mask"] == 1)


# ---- the configuration ----

FLAN = {
    "model_type": "t5", "_name_or_path": "google/flan-t5-xl", "architectures": ["T5ForConditionalGeneration"],
    "bos_token_id": 1, "d_ff": 5120, "d_kv": 64, "d_model": 2048, "decoder_start_token_id": 0, "dense_act_fn": "gelu",
    "dropout_rate": 0.1, "feed_forward_proj": "gated-gelu", "initializer_factor": 1.0, "is_encoder_decoder": True,
    "is_gated_act": True, "num_decoder_layers": 24, "num_heads": 32, "num_layers": 24, "output_past": True,
    "relative_attention_num_buckets": 32, "tie_word_embeddings": False, "vocab_size": 32128,
}  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        FLAN,
        {"model_type": "t5"},
        {"model_type": "t5", "feed_forward_proj": "gated-gelu"},
        {"model_type": "t5", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4},
        {"model_type": "t5", "tie_word_embeddings": True, "scale_decoder_outputs": False},
    ],
)
def test_configurations_are_read_as_there(text: dict[str, Any]) -> None:
    ours = Blip2Config.from_dict({"text_config": text})
    theirs = transformers.Blip2Config(text_config=dict(text))
    derived = ["is_gated_act", "dense_act_fn", "scale_decoder_outputs", "tie_word_embeddings", "hidden_size"]
    for name in [*type(ours.text_config)._defaults(), *derived]:
        if name not in ("dtype", "transformers_version", "architectures"):
            assert getattr(ours.text_config, name) == getattr(theirs.text_config, name, None), name
    assert ours.use_decoder_only_language_model is theirs.use_decoder_only_language_model is False
    again = Blip2Config.from_dict(ours.to_dict())
    assert core_config(again) == core_config(ours)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"feed_forward_proj": "twice-gelu"}, CheckpointError, "'twice-gelu'"),
        ({"feed_forward_proj": "gated-mish"}, UnsupportedError, "dense_act_fn 'mish'"),
        ({"relative_attention_num_buckets": 2}, CheckpointError, "relative_attention_num_buckets must be in 4"),
        ({"relative_attention_max_distance": 16}, CheckpointError, "max_distance must be in 17"),
        ({"d_kv": 64.0}, CheckpointError, "d_kv must be an integer"),
        ({"num_decoder_layers": 0}, CheckpointError, "num_decoder_layers must be in 1"),
        ({"is_gated_act": "yes"}, CheckpointError, "is_gated_act must be true or false"),
    ],
)
def test_wrong_configurations_are_named(change: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        core_config(Blip2Config.from_dict({"text_config": {"model_type": "t5", **change}}))


# ---- half precision ----


def test_half_precision_is_right_where_upstream_overflows(tmp_path: Path) -> None:
    """The products of wo leave float16's range: upstream in float16 clamps them and says something else."""
    config = random_config(family="t5")
    model = random_model(config, seed=8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("wo.weight"):
                parameter *= 3e4
    model.half().save_pretrained(tmp_path)
    reference, half = reference_model(tmp_path), reference_model(tmp_path, torch.float16)
    ours = blip2c.Blip2ForConditionalGeneration.from_pretrained(tmp_path)
    assert ours._core.dtype == "float16"
    given = inputs(config)
    with torch.no_grad():
        exact = reference(**tensors(given)).logits.numpy()
        there = half(**{k: v.half() if v.is_floating_point() else v for k, v in tensors(given).items()})
    seen = given["decoder_attention_mask"] == 1
    found = ours(**given).logits
    scale = np.abs(exact).max()
    assert np.abs(found - exact)[seen].max() <= 1e-4 * scale
    wrong = np.abs(there.logits.float().numpy() - exact)[seen]
    assert not np.isfinite(wrong).all() or wrong.max() > 0.1 * scale
    options = {"max_new_tokens": 8}
    prompt = {name: given[name] for name in ("pixel_values", "input_ids", "attention_mask")}
    np.testing.assert_array_equal(
        ours.generate(**prompt, **options), reference.generate(**tensors(prompt), **options).numpy()
    )


# ---- text, people, the command line ----

TEXTS = ["a small red circle", "  two   green,triangles!  ", "", "ünïcode ﬁ </s> x <extra_id_1>", "it 's . a dog ?"]


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (40, 50, 3), dtype=np.uint8))


def test_the_processor_reads_and_writes_as_there(models: tuple[Any, Any], tmp_path: Path) -> None:
    folder = Path(models[0].name_or_path)
    ours, theirs = blip2c.Blip2Processor.from_pretrained(folder), transformers.Blip2Processor.from_pretrained(folder)
    ours.save_pretrained(tmp_path)
    saved = transformers.Blip2Processor.from_pretrained(tmp_path)
    for options in ({}, {"padding": True}, {"padding": "max_length", "max_length": 30, "truncation": True}):
        found = ours(images=[picture()] * len(TEXTS), text=TEXTS, **options)
        for there in (theirs, saved):
            expected = there(images=[picture()] * len(TEXTS), text=TEXTS, **options)
            assert found["input_ids"] == expected["input_ids"]
            assert found["attention_mask"] == expected["attention_mask"]
    for row in found["input_ids"]:
        for skip in (True, False):
            for clean in (None, True, False):
                assert ours.decode(row, skip_special_tokens=skip, clean_up_tokenization_spaces=clean) == theirs.decode(
                    row, skip_special_tokens=skip, clean_up_tokenization_spaces=clean
                )


def test_captions_and_answers(models: tuple[Any, Any]) -> None:
    """The prompt goes to the encoder and is no part of the text; one at a time is what a batch gives."""
    folder, reference = Path(models[0].name_or_path), models[1]
    captioner, processor = blip2c.load(folder), transformers.Blip2Processor.from_pretrained(folder)
    pictures, question = [picture(seed) for seed in range(3)], "how many circles are there?"

    def there(image: Image.Image, text: str | None, **options: Any) -> str:
        batch = processor(images=image, text=text, return_tensors="pt")
        return processor.decode(reference.generate(**batch, **options)[0], skip_special_tokens=True).strip()

    found = captioner.caption(pictures, max_new_tokens=7, num_beams=3)
    assert found == [there(image, None, max_new_tokens=7, num_beams=3) for image in pictures]
    answers = captioner.ask(pictures[1], ["what?", question], max_new_tokens=6)
    assert answers[1] == there(pictures[1], f"Question: {question} Answer:", max_new_tokens=6)
    assert captioner.ask(pictures[1], question, max_new_tokens=6) == answers[1]
    begun = captioner.caption(pictures[0], max_new_tokens=5, decoder_input_ids=np.array([[7, 8]]))
    assert len(begun.ids) == 5
    with pytest.raises(ValueError, match="the decoder begins with 1 tokens; max_length is 1"):
        captioner.caption(pictures[0], max_length=1)


def test_the_command_line(models: tuple[Any, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = models[0].name_or_path
    picture(3).save(tmp_path / "p.png")
    assert main(["caption", str(tmp_path / "p.png"), "--model", folder, "--max-new-tokens", "5"]) == 0
    assert blip2c.load(folder).caption(picture(3), max_new_tokens=5) in capsys.readouterr().out
    assert main(["info", folder]) == 0
    assert "t5" in capsys.readouterr().out


def test_decoder_rows_that_do_not_belong(models: tuple[Any, Any]) -> None:
    ids, offsets = np.array([4, 5], np.int32), np.array([0, 2], np.int64)
    core = models[0]._core
    with pytest.raises(ValueError, match="decoder_ids: an encoder-decoder needs them"):
        core.forward(None, ids, offsets)
    for bad, words in ((np.array([-1], np.int32), "-1"), (np.array([320], np.int32), "320")):
        with pytest.raises(IndexError, match=f"token id {words} is outside"):
            core.forward(None, ids, offsets, decoder_ids=bad, decoder_offsets=np.array([0, 1], np.int64))
    with pytest.raises(ValueError, match="row 0: the decoder's prompt is empty"):
        core.forward(None, ids, offsets, decoder_ids=ids[:0], decoder_offsets=np.array([0, 0], np.int64))
    with pytest.raises(ValueError, match="decoder_offsets: expected to begin with 0, found 1"):
        core.forward(None, ids, offsets, decoder_ids=ids, decoder_offsets=np.array([1, 2], np.int64))
    assert isinstance(core, _core.Model)
