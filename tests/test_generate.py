"""Tokens of generate() against transformers: greedy and beam search over random checkpoints, pictures and options.

Two right programs may differ where two candidates are nearly tied in float32. Such a mismatch is excused only if a
float64 run of transformers shows a margin between candidates that float32 can not tell, and is counted apart.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import blip2c
from blip2c.classes import model_class
from blip2c.config import core_config
from helpers import prompt_ids, random_checkpoint, random_pixels, reference_model

MARGIN = 1e-5
# With finite logits, prompts of more than one token and one token to draw from.
NEUTRAL = {"remove_invalid_values", "renormalize_logits", "forced_bos_token_id", "do_sample", "temperature", "top_p"}
ORDINARY_CASES, EXHAUSTIVE_CASES = {"opt": 320, "llama": 120, "t5": 120, "instructblip": 80}, 10_000
CHECKPOINTS: dict[str, list[dict[str, Any]]] = {
    "opt": [
        {},
        {"tied": False, "text": {"vocab_size": 48}},
        {"text": {"vocab_size": 30, "num_hidden_layers": 3}, "qformer": {"cross_attention_frequency": 1}},
        {"text": {"eos_token_id": [2, 7, 11], "vocab_size": 40}},
        {"text": {"do_layer_norm_before": False, "vocab_size": 64}},
    ],
    "llama": [
        {"family": "llama", "tied": False},
        {"family": "llama", "text": {"vocab_size": 40, "num_key_value_heads": 1, "head_dim": 12}},
        {"family": "mistral", "tied": False, "text": {"vocab_size": 48, "eos_token_id": [2, 7, 11]}},
        {"family": "qwen2", "tied": False, "text": {"vocab_size": 64}},
        {"family": "qwen3", "tied": False, "text": {"vocab_size": 30, "num_hidden_layers": 3, "rope_theta": 100.0}},
    ],
    "t5": [
        {"family": "t5"},
        {"family": "t5", "tied": False, "own_head": True, "text": {"vocab_size": 48}},
        {"family": "t5", "tied": False, "text": {"vocab_size": 30, "feed_forward_proj": "relu", "num_heads": 4}},
        {"family": "t5", "text": {"eos_token_id": [1, 7, 11], "vocab_size": 40, "scale_decoder_outputs": False}},
        {"family": "t5", "own_head": True, "text": {"decoder_start_token_id": 5, "dense_act_fn": "gelu"}},
    ],
    "instructblip": [
        {"instruct": True, "family": "llama", "tied": False},
        {"instruct": True, "family": "t5", "text": {"vocab_size": 48}},
        {"instruct": True, "family": "llama", "text": {"vocab_size": 40, "eos_token_id": [2, 7, 11]}},
        {"instruct": True, "family": "opt", "qformer": {"cross_attention_frequency": 1}},
    ],
}


@dataclass
class Tally:
    """What became of the cases."""

    cases: int = 0
    equal: int = 0
    excused: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    outputs: set[bytes] = field(default_factory=set)
    pictures_tried: int = 0
    pictures_mattered: int = 0
    options: Counter[str] = field(default_factory=Counter)
    options_mattered: Counter[str] = field(default_factory=Counter)


def make_pairs(tmp_path_factory: pytest.TempPathFactory, family: str) -> list[tuple[Any, Any, Path]]:
    made = []
    for seed, overrides in enumerate(CHECKPOINTS[family]):
        folder = tmp_path_factory.mktemp("generate")
        random_checkpoint(folder, seed=100 + seed, gain=1.6, **overrides)
        made.append((model_class(folder).from_pretrained(folder), reference_model(folder), folder))
    return made


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Any, Any, Path]]:
    return make_pairs(tmp_path_factory, "opt")


every_family = pytest.mark.parametrize("family", list(CHECKPOINTS))


def random_options(rng: np.random.Generator, config: Any, prompt: int) -> dict[str, Any]:
    """One option set: a few options at random, each with values that can bite."""
    vocabulary = config.text_config.vocab_size
    beams = int(rng.choice([1, 1, 2, 3, 5]))
    options: dict[str, Any] = {"num_beams": beams} if beams > 1 or rng.random() < 0.5 else {}
    if rng.random() < 0.85:
        options["max_new_tokens"] = int(rng.integers(1, 16))
    elif rng.random() < 0.5:
        options["max_length"] = prompt + int(rng.integers(1, 16))
    choices: dict[str, Any] = {
        "min_new_tokens": lambda: int(rng.integers(1, 12)),
        "min_length": lambda: prompt + int(rng.integers(0, 10)),
        "repetition_penalty": lambda: float(rng.choice([0.5, 1.1, 1.5, 3.0])),
        "no_repeat_ngram_size": lambda: int(rng.integers(1, 4)),
        "bad_words_ids": lambda: [
            rng.integers(3, vocabulary, int(rng.integers(1, 3))).tolist() for _ in range(int(rng.integers(1, 12)))
        ],
        "suppress_tokens": lambda: rng.integers(3, vocabulary, int(rng.integers(1, 10))).tolist(),
        "eos_token_id": lambda: rng.integers(0, vocabulary, int(rng.integers(1, 6))).tolist(),
        "pad_token_id": lambda: int(rng.integers(0, vocabulary)),
    }
    if beams > 1:
        choices |= {
            "length_penalty": lambda: float(rng.choice([-1.0, 0.0, 0.5, 2.0])),
            "early_stopping": lambda: [True, False, "never"][int(rng.integers(3))],
            "num_return_sequences": lambda: int(rng.integers(1, beams + 1)),
        }
    for name, draw in choices.items():
        if rng.random() < 0.3:
            options[name] = draw()
    for name, draw in rarer_choices(rng, vocabulary).items():
        if rng.random() < 0.12:
            options[name] = draw()
    if beams == 1 and rng.random() < 0.1:  # nothing is left to draw, through all that sampling does
        options |= {"do_sample": True, "top_k": 1, "temperature": float(rng.uniform(0.3, 2.0)), "top_p": 0.9}
    if "forced_eos_token_id" in options or "forced_bos_token_id" in options:  # nothing might be left
        options.pop("suppress_tokens", None)
        options.pop("begin_suppress_tokens", None)
    if "remove_invalid_values" in options:  # multiples of the largest number are Inf, and then NaN
        options.pop("exponential_decay_length_penalty", None)
    return options


def rarer_choices(rng: np.random.Generator, vocabulary: int) -> dict[str, Any]:
    def words() -> list[tuple[int, ...]]:
        return [tuple(rng.integers(3, vocabulary, int(rng.integers(1, 3))).tolist()) for _ in range(30)]

    return {
        "sequence_bias": lambda: {word: float(rng.normal() * 6) for word in words()},
        "begin_suppress_tokens": lambda: rng.integers(3, vocabulary, vocabulary // 2).tolist(),
        "forced_eos_token_id": lambda: rng.integers(3, vocabulary, int(rng.integers(1, 3))).tolist(),
        "forced_bos_token_id": lambda: int(rng.integers(3, vocabulary)),
        "exponential_decay_length_penalty": lambda: (int(rng.integers(0, 6)), float(rng.uniform(0.8, 2.5))),
        "remove_invalid_values": lambda: True,
        "renormalize_logits": lambda: True,
    }


def inputs_for(rng: np.random.Generator, config: Any) -> dict[str, Any]:
    batch, length = int(rng.integers(1, 4)), int(rng.integers(0, 5))
    pixels = random_pixels(config, batch, int(rng.integers(1 << 30)))
    inputs = {"pixel_values": pixels}
    if config.model_type == "instructblip":
        words = int(rng.integers(1, 9))
        inputs["qformer_input_ids"] = rng.integers(1, config.qformer_config.vocab_size, (batch, words))
        if rng.random() < 0.5:
            kept = rng.integers(1, words + 1, (batch, 1))
            inputs["qformer_attention_mask"] = (np.arange(words) < kept).astype(np.int64)
    if rng.random() < 0.3:
        return inputs
    ids = prompt_ids(config, batch, length, int(rng.integers(1 << 30)))
    inputs["input_ids"] = ids
    if rng.random() < 0.5:
        mask = np.ones_like(ids)
        queries = config.num_query_tokens
        for row in mask[:, queries:]:
            row[: int(rng.integers(0, length + 1))] = 0  # as a processor with left padding puts pads
        inputs["attention_mask"] = mask
    return inputs


def torch_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: torch.from_numpy(value) for name, value in inputs.items()}


def reference_tokens(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> np.ndarray:
    with torch.no_grad():
        result: np.ndarray = model.generate(**torch_inputs(inputs), **options).numpy()
    return result


class Margins(transformers.LogitsProcessor):
    """The smallest distance between two neighbours among the candidates that matter, over all steps and rows."""

    def __init__(self, candidates: int) -> None:
        self.candidates = candidates
        self.smallest = float("inf")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        values = torch.topk(scores, min(self.candidates + 1, scores.shape[-1])).values
        gaps = (values[:, :-1] - values[:, 1:])[torch.isfinite(values[:, 1:])]
        if gaps.numel():
            self.smallest = min(self.smallest, float(gaps.min()))
        return scores


def beam_margin(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> float:
    """As Margins, over the running candidates of all beams together: every top-k that beam search takes."""
    smallest = [float("inf")]
    original = torch.topk

    def watched(values: torch.Tensor, k: int, *args: Any, **kwargs: Any) -> Any:
        ordered = torch.sort(values.flatten(0, -2) if values.dim() > 1 else values, descending=True).values
        head = ordered[..., : k + 1]
        gaps = (head[..., :-1] - head[..., 1:])[head[..., 1:] > -1e8]
        if gaps.numel():
            smallest[0] = min(smallest[0], float(gaps.min()))
        return original(values, k, *args, **kwargs)

    torch.topk = watched  # type: ignore[assignment]
    try:
        reference_tokens(model, inputs, options)
    finally:
        torch.topk = original
    return smallest[0]


def first_logits(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        found = model.generate(
            **torch_inputs(inputs), max_new_tokens=1, return_dict_in_generate=True, output_logits=True
        )
    result: torch.Tensor = found.logits[0].double()
    return result


def excused(folder: Path, inputs: dict[str, Any], options: dict[str, Any]) -> bool:
    """Is a margin smaller than float32 can tell: 1e-5, or, where a model magnifies errors, four times transformers'?"""
    model = reference_model(folder, torch.float64)
    wide = {**inputs, "pixel_values": inputs["pixel_values"].astype(np.float64)}
    error = (first_logits(reference_model(folder), inputs) - first_logits(model, wide)).abs().max()
    margin = max(MARGIN, 4 * float(error))
    if options.get("num_beams", 1) > 1:
        return beam_margin(model, wide, options) < margin
    margins = Margins(1)
    with torch.no_grad():
        model.generate(**torch_inputs(wide), **options, logits_processor=[margins])
    return margins.smallest < margin


def same(ours: np.ndarray, theirs: np.ndarray) -> bool:
    return ours.shape == theirs.shape and bool((ours == theirs).all())


def one_case(rng: np.random.Generator, pair: tuple[Any, Any, Path], tally: Tally) -> None:
    model, reference, folder = pair
    inputs = inputs_for(rng, reference.config)
    prompt = inputs["input_ids"].shape[1] if "input_ids" in inputs else reference.config.num_query_tokens + 1
    if reference.config.text_config.is_encoder_decoder:  # what is counted is the decoder's
        prompt = 1
    options = random_options(rng, reference.config, prompt)
    tally.cases += 1
    try:
        ours = model.generate(**inputs, **options)
    except ValueError as error:
        if "every token is forbidden" not in str(error):
            raise
        tally.refused += 1  # upstream goes on with whatever stands first
        return
    theirs = reference_tokens(reference, inputs, options)
    tally.outputs.add(ours.tobytes())
    if same(ours, theirs):
        tally.equal += 1
    elif excused(folder, inputs, options):
        tally.excused += 1
    else:
        tally.wrong.append(f"{folder.name} {options}\n ours   {ours.tolist()}\n theirs {theirs.tolist()}")
    if rng.random() < 0.3:  # do the picture and each option change anything?
        tally.pictures_tried += 1
        swapped = {**inputs, "pixel_values": random_pixels(reference.config, len(ours), int(rng.integers(1 << 30)))}
        swapped["pixel_values"] = swapped["pixel_values"][: len(inputs["pixel_values"])]
        tally.pictures_mattered += not same(model.generate(**swapped, **options), ours)
    for name in options:
        tally.options[name] += 1
        if tally.options_mattered[name] < 3:
            rest = {key: value for key, value in options.items() if key != name}
            try:
                tally.options_mattered[name] += not same(model.generate(**inputs, **rest), ours)
            except ValueError:  # without num_beams the number of returned sequences contradicts
                tally.options_mattered[name] += 1


def run_cases(pairs: list[tuple[Any, Any, Path]], count: int, seed: int) -> Tally:
    tally = Tally()
    rng = np.random.default_rng(seed)
    for i in range(count):
        one_case(rng, pairs[i % len(pairs)], tally)
    return tally


def judge(tally: Tally, record: Any) -> None:
    record("cases", tally.cases)
    record("equal", tally.equal)
    record("excused", tally.excused)
    record("distinct_outputs", len(tally.outputs))
    counts = (
        f"{tally.equal} equal, {tally.excused} excused, {tally.refused} refused, {len(tally.outputs)} distinct outputs"
    )
    print(f"\n{tally.cases} option sets: {counts}")
    print(f"pictures mattered in {tally.pictures_mattered} of {tally.pictures_tried}; options {dict(tally.options)}")
    assert not tally.wrong, "\n".join(tally.wrong[:5])
    assert tally.excused <= tally.cases // 100
    assert tally.refused <= tally.cases // 100
    assert len(tally.outputs) >= 0.9 * tally.cases
    assert tally.pictures_mattered >= 0.8 * tally.pictures_tried  # a forced token does not look at them
    # One that seldom matters must have been tried often enough; some are there to change nothing.
    tried = {name for name, count in tally.options.items() if count >= 30 and name not in NEUTRAL}
    never = [name for name in tried if tally.options_mattered[name] == 0]
    assert not never, f"options that never changed an output: {never}"


@every_family
@pytest.mark.filterwarnings("ignore")
def test_tokens_equal_transformers(family: str, tmp_path_factory: pytest.TempPathFactory, record_property: Any) -> None:
    judge(run_cases(make_pairs(tmp_path_factory, family), ORDINARY_CASES[family], 1), record_property)


@every_family
@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_tokens_equal_transformers_ten_thousand_times(
    family: str, tmp_path_factory: pytest.TempPathFactory, record_property: Any
) -> None:
    judge(run_cases(make_pairs(tmp_path_factory, family), EXHAUSTIVE_CASES, 2), record_property)


def core_options(**changes: Any) -> dict[str, Any]:
    """Explicit options as the C part takes them: greedy, four tokens, no end token."""
    return {
        "max_length": None, "max_new_tokens": 4, "min_length": 0, "min_new_tokens": None, "num_beams": 1,
        "num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False, "repetition_penalty": 1.0,
        "no_repeat_ngram_size": 0, "eos_ids": [], "pad_id": 1, "bad_words": [], "suppress_ids": [], **changes,
    }  # fmt: skip


def core_inputs(model: Any, batch: int, length: int) -> tuple[Any, ...]:
    config = model.config
    ids = prompt_ids(config, batch, length)
    flat = np.where(ids == config.image_token_index, -1, ids).astype(np.int32).reshape(-1)
    offsets = np.arange(batch + 1, dtype=np.int64) * ids.shape[1]
    return model._core.encode(random_pixels(config, batch)), flat, offsets, None, ids.astype(np.int32).reshape(-1)


@pytest.mark.parametrize(("beams", "tokens"), [(1, 2), (1, 9), (2, 9), (5, 12)])
def test_cache_holds_each_prompt_once(pairs: list[tuple[Any, Any, Path]], beams: int, tokens: int) -> None:
    """KV bytes = 2 x layers x (prompt tokens + beams x suffix) x width x 4, where the last token needs no key."""
    model = pairs[0][0]
    text = model.config.text_config
    inputs = core_inputs(model, 3, 5)
    result = model._core.generate(*inputs, core_options(num_beams=beams, max_new_tokens=tokens))
    per_token = 2 * text.num_hidden_layers * text.hidden_size * 4
    assert result["kv_bytes"] == per_token * (len(inputs[1]) + 3 * beams * (tokens - 1))
    assert result["steps"] == tokens - 1


@pytest.mark.parametrize("beams", [1, 4])
def test_no_allocation_per_step(pairs: list[tuple[Any, Any, Path]], beams: int) -> None:
    model = pairs[0][0]
    inputs = core_inputs(model, 2, 3)
    options = core_options(num_beams=beams, max_new_tokens=40, repetition_penalty=1.3, no_repeat_ngram_size=3,
                           bad_words=[[5, 6]], suppress_ids=[7])  # fmt: skip
    result = model._core.generate(*inputs, options)
    assert result["steps"] == 39
    assert result["step_allocations"] == 0


def test_places_and_threads_give_the_same_tokens(pairs: list[tuple[Any, Any, Path]]) -> None:
    model = pairs[0][0]
    pixels, ids = random_pixels(model.config, 5), prompt_ids(model.config, 5, 3)
    options = {"max_new_tokens": 12, "num_beams": 3}
    together = model.generate(pixel_values=pixels, input_ids=ids, **options)
    before = blip2c.get_num_threads()
    try:
        for threads in (1, 3):
            blip2c.set_num_threads(threads)
            order = [3, 0, 4, 2, 1]
            again = model.generate(pixel_values=pixels[order], input_ids=ids[order], **options)
            np.testing.assert_array_equal(again, together[order])
            for i in range(5):
                alone = model.generate(pixel_values=pixels[i : i + 1], input_ids=ids[i : i + 1], **options)[0]
                np.testing.assert_array_equal(alone, together[i, : len(alone)])
    finally:
        blip2c.set_num_threads(before)


def test_old_checkpoints_without_an_image_token(tmp_path: Path) -> None:
    """The queries go in front; the oracle is the same weights with an image token in the config."""
    old, new = tmp_path / "old", tmp_path / "new"
    random_checkpoint(old, seed=21, image_token=False)
    random_checkpoint(new, seed=21, image_token=True)
    model, reference = blip2c.Blip2ForConditionalGeneration.from_pretrained(old), reference_model(new)
    config = reference.config
    pixels, ids = random_pixels(config, 2), prompt_ids(config, 2, 4)
    options = {"max_new_tokens": 10, "num_beams": 3}
    ours = model.generate(pixel_values=pixels, input_ids=ids[:, config.num_query_tokens :], **options)
    theirs = reference_tokens(reference, {"pixel_values": pixels, "input_ids": ids}, options)
    np.testing.assert_array_equal(ours, theirs[:, config.num_query_tokens :])
    theirs = reference_tokens(reference, {"pixel_values": pixels}, {"max_new_tokens": 6})
    np.testing.assert_array_equal(
        model.generate(pixel_values=pixels, max_new_tokens=6), theirs[:, config.num_query_tokens :]
    )


def test_torch_in_torch_out(pairs: list[tuple[Any, Any, Path]]) -> None:
    model, reference, _ = pairs[0]
    pixels, ids = random_pixels(model.config, 2), prompt_ids(model.config, 2, 3)
    inputs = torch_inputs({"pixel_values": pixels, "input_ids": ids})
    found = model.generate(**inputs, max_new_tokens=7)
    assert isinstance(found, torch.Tensor)
    assert found.dtype == torch.int64
    assert torch.equal(found, reference.generate(**inputs, max_new_tokens=7))
    with torch.no_grad():
        expected = reference(**inputs).logits
    logits = model(**inputs).logits
    assert isinstance(logits, torch.Tensor)
    assert (logits - expected).abs().max() <= 1e-3
    for kind in (torch.float16, torch.bfloat16):
        rounded = {**inputs, "pixel_values": inputs["pixel_values"].to(kind)}
        exact = {**inputs, "pixel_values": rounded["pixel_values"].float()}
        assert torch.equal(model.generate(**rounded, max_new_tokens=7), model.generate(**exact, max_new_tokens=7))


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model that takes seconds for a long generation, with stages of visible length."""
    folder = tmp_path_factory.mktemp("slow")
    random_checkpoint(
        folder,
        seed=31,
        vision={"hidden_size": 768, "num_attention_heads": 8, "intermediate_size": 3072, "image_size": 224,
                "num_hidden_layers": 12},
        text={"hidden_size": 768, "num_attention_heads": 8, "ffn_dim": 3072, "num_hidden_layers": 8,
              "vocab_size": 8000, "max_position_embeddings": 4000, "eos_token_id": 3},
        dtype="float16",
    )  # fmt: skip
    return blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)


class SignalError(Exception):
    pass


@pytest.mark.parametrize("stage", ["vision", "decoding", "beams"])
def test_a_signal_is_answered_in_every_stage(slow: Any, stage: str) -> None:
    """The handler runs while C computes, its exception comes out, and the model works afterwards."""
    batch = 64 if stage == "vision" else 1
    pixels = random_pixels(slow.config, batch)
    options = {"max_new_tokens": 1 if stage == "vision" else 3000, "num_beams": 4 if stage == "beams" else 1,
               "eos_token_id": 7999, "suppress_tokens": [7999]}  # fmt: skip
    started = time.monotonic()
    answered = []

    def handler(number: int, frame: Any) -> None:
        answered.append(time.monotonic())
        raise SignalError

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.5)
    try:
        with pytest.raises(SignalError):
            slow.generate(pixel_values=pixels, **options)
        returned = time.monotonic()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    print(
        f"{stage}: handler {answered[0] - started - 0.5:.3f} s after the signal, out {returned - answered[0]:.3f} s on"
    )
    assert len(answered) == 1
    expected = slow.generate(pixel_values=pixels[:1], max_new_tokens=3)
    np.testing.assert_array_equal(slow.generate(pixel_values=pixels[:1], max_new_tokens=3), expected)


def test_the_gil_is_free_while_computing(slow: Any) -> None:
    """A Python thread counts while generate() runs: without the GIL released it could not count at all."""
    counted, stop = [0], threading.Event()

    def count() -> None:
        while not stop.is_set():
            counted[0] += 1

    thread = threading.Thread(target=count)
    thread.start()
    try:
        before = counted[0]
        slow.generate(pixel_values=random_pixels(slow.config, 1), max_new_tokens=40, suppress_tokens=[3])
        during = counted[0] - before
    finally:
        stop.set()
        thread.join()
    assert during > 10_000


def test_positions_run_out_with_a_message(pairs: list[tuple[Any, Any, Path]]) -> None:
    model = pairs[0][0]
    limit = model.config.text_config.max_position_embeddings
    pixels = random_pixels(model.config, 1)
    with pytest.raises(ValueError, match=str(limit)):
        model.generate(pixel_values=pixels, max_new_tokens=limit + 1, suppress_tokens=[2])
    assert model.generate(pixel_values=pixels, max_new_tokens=2).shape[0] == 1


def test_failed_allocations_while_generating(pairs: list[tuple[Any, Any, Path]]) -> None:
    model = pairs[0][0]
    inputs = core_inputs(model, 2, 3)
    options = core_options(num_beams=3)
    expected = model._core.generate(*inputs, options)["ids"]
    for k in range(1, 1000):
        blip2c._core._fail_allocation_after(k)
        try:
            model._core.generate(*inputs, options)
            break
        except MemoryError:
            pass
        finally:
            blip2c._core._fail_allocation_after(0)
    assert 5 < k < 999
    np.testing.assert_array_equal(model._core.generate(*inputs, options)["ids"], expected)


@pytest.mark.parametrize(
    ("beams", "words"), [(-5, "num_beams: expected at least 1, found -5"), (2**31 - 1, "num_beams: 2147483647 beams")]
)
def test_beams_are_judged_before_memory_is_taken(pairs: list[tuple[Any, Any, Path]], beams: int, words: str) -> None:
    model = pairs[0][0]
    inputs = core_inputs(model, 2, 3)
    before = blip2c._core._allocation_count()
    with pytest.raises(ValueError, match=words):
        model._core.generate(*inputs, core_options(num_beams=beams))
    assert blip2c._core._allocation_count() - before < 10  # the options alone


def test_loading_answers_a_signal(tmp_path: Path) -> None:
    """A load is cancelled by a handler that raises, and the next one works."""
    random_checkpoint(tmp_path, seed=41, text={"vocab_size": 60_000, "hidden_size": 640, "num_attention_heads": 8})
    files, config = [str(tmp_path / "model.safetensors")], core_config(blip2c.Blip2Config.from_pretrained(tmp_path))

    def handler(number: int, frame: Any) -> None:
        raise SignalError

    before = signal.signal(signal.SIGALRM, handler)
    interrupted = 0
    try:
        for _ in range(200):
            try:
                signal.setitimer(signal.ITIMER_REAL, 0.01)
                while True:
                    blip2c._core.Model(files, config)
            except SignalError:
                interrupted += 1
                if interrupted == 3:
                    break
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted == 3
    assert blip2c._core.Model(files, config).nbytes > 0
