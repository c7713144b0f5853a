"""The cases that transformers tries its generating models with, here against transformers on small random models.

Which cases there are: its tests/generation/test_utils.py and tests/models/{blip_2,instructblip}; what needs the Hub
or a training step are left out, assisted decoding and static caches are refused here.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import blip2c
from blip2c import UnsupportedError
from helpers import prompt_ids, random_checkpoint, random_pixels, reference_model
from output_helpers import assert_same

KINDS = {
    "opt": ("opt", False),
    "llama": ("llama", False),
    "t5": ("t5", False),
    "instruct-llama": ("llama", True),
    "instruct-t5": ("t5", True),
}
BATCH, TEXT, NEW = 2, 3, 5
# Sampling from one token only, so that both draw the same.
MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "top_k": 1, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "beams that stop early": {"num_beams": 2, "early_stopping": True, "eos_token_id": list(range(9, 200, 3))},
    "a beam for each": {"num_beams": 2, "num_return_sequences": 2, "renormalize_logits": True},
}


class Case:
    def __init__(self, kind: str, folder: Path) -> None:
        family, self.instruct = KINDS[kind]
        random_checkpoint(folder, seed=8, gain=1.6, family=family, instruct=self.instruct)
        make = blip2c.InstructBlipForConditionalGeneration if self.instruct else blip2c.Blip2ForConditionalGeneration
        self.ours, self.theirs = make.from_pretrained(folder), reference_model(folder)
        self.config = self.theirs.config
        self.has_encoder = family == "t5"
        ids = torch.from_numpy(prompt_ids(self.config, BATCH, TEXT, seed=5))
        self.inputs = {"pixel_values": torch.from_numpy(random_pixels(self.config, BATCH, seed=6)), "input_ids": ids}
        self.inputs["attention_mask"] = torch.ones_like(ids)
        if self.instruct:
            self.inputs["qformer_input_ids"] = torch.arange(12).reshape(2, 6) + 7
            self.inputs["qformer_attention_mask"] = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])
        self.prompt = 1 if self.has_encoder else ids.shape[1]

    def run(self, model: Any, change: dict[str, Any] | None = None, **options: Any) -> Any:
        inputs = {name: value for name, value in {**self.inputs, **(change or {})}.items() if value is not None}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return model.generate(**inputs, **{"max_new_tokens": NEW, **options})

    def both(self, change: dict[str, Any] | None = None, **options: Any) -> tuple[Any, Any]:
        return self.run(self.ours, change, **options), self.run(self.theirs, change, **options)


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.mark.parametrize("mode", list(MODES))
def test_everything_that_can_be_asked_for(case: Case, mode: str) -> None:
    """Names, types, lengths and shapes of every entry, and their values."""
    wanted = ("scores", "logits", "attentions", "hidden_states")
    options = {**MODES[mode], "return_dict_in_generate": True, **{f"output_{name}": True for name in wanted}}
    ours, theirs = case.both(**options)
    assert type(ours).__name__ == type(theirs).__name__
    assert [name for name in theirs if name != "past_key_values"] == list(ours)
    assert ours.sequences.dtype == torch.int64
    beams = options.get("num_beams", 1)
    rows = BATCH * (beams if beams > 1 else options.get("num_return_sequences", 1))
    steps = len(ours.scores)
    assert {score.shape for score in ours.scores} == {(rows, case.config.text_config.vocab_size)}
    name = "decoder_" if case.has_encoder else ""
    assert len(ours[f"{name}attentions"]) == len(ours[f"{name}hidden_states"]) == len(ours.logits) == steps
    assert_same(ours, theirs, 2e-3)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", list(MODES))
def test_transition_scores_make_up_the_sequences_scores(case: Case, mode: str, normalize: bool) -> None:
    options = {**MODES[mode], "return_dict_in_generate": True, "output_scores": True}
    ours, theirs = case.both(**options)
    beams = ours.get("beam_indices")
    mine = case.ours.compute_transition_scores(ours.sequences, ours.scores, beams, normalize)
    yours = case.theirs.language_model.compute_transition_scores(
        theirs.sequences, theirs.scores, theirs.get("beam_indices"), normalize
    )
    assert_same(mine, yours, 2e-3)
    if beams is not None and not normalize:
        length = (beams != -1).sum(dim=1) ** options.get("length_penalty", 1.0)
        torch.testing.assert_close(mine.sum(dim=1) / length, ours.sequences_scores, rtol=1e-4, atol=1e-4)


def test_pads_on_the_left_change_nothing(case: Case) -> None:
    """A padded row says what it says without its pads, and its next token's logits are the same."""
    pads = 4
    pad = case.config.text_config.pad_token_id
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    more = {
        "input_ids": torch.cat([torch.full((BATCH, pads), pad), ids], dim=1),
        "attention_mask": torch.cat([torch.zeros(BATCH, pads, dtype=torch.int64), mask], dim=1),
    }
    for options in ({}, {"num_beams": 3}):
        padded, theirs = case.both(more, **options, return_dict_in_generate=True, output_logits=True)
        plain = case.run(case.ours, **options, return_dict_in_generate=True, output_logits=True)
        begin = case.prompt + (0 if case.has_encoder else pads)
        assert padded.sequences.tolist() == theirs.sequences.tolist()
        assert padded.sequences[:, begin:].tolist() == plain.sequences[:, case.prompt :].tolist()
        torch.testing.assert_close(padded.logits[0], plain.logits[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"num_beams": 2, "min_length": 7}, {"max_length": 9}], ids=str
)
def test_prompts_as_embeddings(case: Case, options: dict[str, Any]) -> None:
    """As embeddings the prompt gives the same words; with the ids beside them the ids come out in front."""
    if "max_length" in options:
        options = {**options, "max_new_tokens": None}
    embeds = case.theirs.get_input_embeddings()(case.inputs["input_ids"]).detach()
    for change in ({"inputs_embeds": embeds, "input_ids": None}, {"inputs_embeds": embeds}):
        ours, theirs = case.both(change, **options)
        assert ours.tolist() == theirs.tolist()
    from_ids = case.run(case.ours, **options)
    if "max_length" not in options:
        assert ours[:, -3:].tolist() == from_ids[:, -3:].tolist()


def test_without_input_ids(case: Case) -> None:
    for change in ({"input_ids": None, "attention_mask": None}, {"input_ids": None}):
        if change.keys() == {"input_ids"}:
            change["attention_mask"] = torch.ones(BATCH, case.config.num_query_tokens + 1, dtype=torch.int64)
        ours, theirs = case.both(change)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_one_end_token_or_a_list_of_them(case: Case, beams: int) -> None:
    free = case.run(case.ours, num_beams=beams)
    end = int(free[0, case.prompt + 1])
    one, theirs = case.both(num_beams=beams, eos_token_id=end)
    assert one.tolist() == theirs.tolist()
    for ends in ([end], torch.tensor([end]), [end, 3]):
        ours, theirs = case.both(num_beams=beams, eos_token_id=ends)
        assert ours.tolist() == theirs.tolist()
    assert one.tolist() == case.run(case.ours, num_beams=beams, eos_token_id=[end]).tolist() != free.tolist()


def test_processors_that_write_in_place(case: Case) -> None:
    """Raw logits stay raw, the ids that a processor gets are not the search's own, and scores are what it made."""

    def write(ids: Any, scores: Any) -> Any:
        scores[:, ::2] = -50.0
        ids[:] = 3
        return scores

    options = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    for beams in (1, 2):
        ours = case.run(case.ours, logits_processor=[write], num_beams=beams, **options)
        copied = case.run(
            case.ours, logits_processor=[lambda i, s: write(i.clone(), s.clone())], num_beams=beams, **options
        )
        assert ours.sequences.tolist() == copied.sequences.tolist()
        assert_same(ours.logits, copied.logits, 0.0)
        assert all(
            (scores[:, ::2] != logits[:, ::2]).all() for scores, logits in zip(ours.scores, ours.logits, strict=True)
        )
        made = [lambda i, s: write(i.clone(), s.clone())]
        theirs = case.run(case.theirs, logits_processor=made, num_beams=beams, **options)
        assert ours.sequences.tolist() == theirs.sequences.tolist()
        assert_same(ours.logits, theirs.logits, 2e-3)


def test_a_criterion_of_one_s_own_beside_the_limits(case: Case) -> None:
    def ends(ids: Any, scores: Any) -> Any:
        return torch.tensor([row % 2 == 0 and ids.shape[1] >= case.prompt + 2 for row in range(ids.shape[0])])

    for beams in (1, 3):
        ours, theirs = case.both(stopping_criteria=[ends], num_beams=beams)
        assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("beams", [1, 2])
def test_with_and_without_a_cache(case: Case, beams: int) -> None:
    """use_cache=False says the same; the states of all tokens that it would give at every step are refused by name."""
    ours, theirs = case.both(use_cache=False, num_beams=beams, output_scores=True, return_dict_in_generate=True)
    assert_same(ours, theirs, 2e-3)
    for name in ("output_attentions", "output_hidden_states"):
        with pytest.raises(UnsupportedError, match=f"use_cache=False.*{name}"):
            case.run(case.ours, use_cache=False, return_dict_in_generate=True, **{name: True})


def test_rows_say_what_each_says_alone(case: Case) -> None:
    for beams in (1, 3):
        together = case.run(case.ours, num_beams=beams)
        for row in range(BATCH):
            alone = case.run(case.ours, {k: v[row : row + 1] for k, v in case.inputs.items()}, num_beams=beams)
            assert alone[0].tolist() == together[row, : alone.shape[1]].tolist()


# -- InstructBLIP's forward() ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["instruct-llama", "instruct-t5"])
def instruct(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(request.param, tmp_path_factory.mktemp(f"{request.param}-forward"))


def passes(case: Case, **options: Any) -> tuple[Any, Any]:
    labels = case.inputs["input_ids"].clone()
    labels[0, -2] = -100
    if case.has_encoder:
        labels = labels[:, -4:].contiguous()
    given = {**case.inputs, "labels": labels, **options}
    with torch.no_grad():
        return case.ours(**given), case.theirs(**given)


def test_forward_with_labels_and_every_state(instruct: Case) -> None:
    wanted = {"output_attentions": True, "output_hidden_states": True}
    ours, theirs = passes(instruct, **wanted)
    assert_same(ours.loss, theirs.loss)
    assert_same(ours.logits, theirs.logits, 1e-3)
    assert_same(ours.language_model_outputs.logits, theirs.language_model_outputs.logits, 1e-3)
    with torch.no_grad():
        names = ("pixel_values", "qformer_input_ids", "qformer_attention_mask")
        asked = {name: instruct.inputs[name] for name in names}
        features = instruct.theirs.get_image_features(**asked, **wanted)
    assert_same(ours.vision_outputs, features.vision_outputs)
    assert_same(ours.qformer_outputs.hidden_states, features.qformer_outputs.hidden_states)
    assert_same(ours.qformer_outputs.cross_attentions, features.qformer_outputs.cross_attentions)
    # The instruction's tokens stand behind the queries.
    queries, words = instruct.config.num_query_tokens, instruct.inputs["qformer_input_ids"].shape[1]
    assert ours.qformer_outputs.attentions[0].shape[-2:] == (queries + words, queries + words)
    assert ours.qformer_outputs.cross_attentions[0].shape[-2] == queries
    for name in ("labels", "pixel_values", "qformer_input_ids"):
        changed = {name: torch.flip({**instruct.inputs, "labels": instruct.inputs["input_ids"]}[name][:, -4:], (0,))}
        if name == "labels" and not instruct.has_encoder:
            continue
        if name == "pixel_values":
            changed = {name: torch.flip(instruct.inputs[name], (0,))}
        if name == "qformer_input_ids":
            changed["qformer_attention_mask"] = None
        assert abs(float(passes(instruct, **changed)[0].loss) - float(ours.loss)) > 1e-5, name


def test_forward_as_a_tuple_and_as_arrays(instruct: Case) -> None:
    ours, theirs = passes(instruct, return_dict=False)
    assert isinstance(ours, tuple)
    assert_same(ours[:2], theirs[:2], 1e-3)
    arrays = {name: value.numpy() for name, value in instruct.inputs.items()}
    decoder = {"decoder_input_ids": arrays["input_ids"][:, -4:]} if instruct.has_encoder else {}
    found = instruct.ours(**arrays, **decoder, output_hidden_states=True)
    assert isinstance(found.logits, np.ndarray)
    assert found.logits.dtype == np.float32
    assert isinstance(found.qformer_outputs.hidden_states[0], np.ndarray)


@pytest.mark.parametrize("size", [(42, 28), (14, 56)])
def test_pictures_of_another_size(instruct: Case, size: tuple[int, int]) -> None:
    pixels = torch.from_numpy(np.random.default_rng(3).normal(size=(BATCH, 3, *size)).astype(np.float32))
    ours, theirs = passes(instruct, pixel_values=pixels, interpolate_pos_encoding=True)
    assert_same(ours.loss, theirs.loss)
    assert_same(ours.logits, theirs.logits, 1e-3)
    assert_same(ours.vision_outputs.last_hidden_state, theirs.vision_outputs.last_hidden_state)
    said, expected = instruct.both({"pixel_values": pixels}, interpolate_pos_encoding=True)
    assert said.tolist() == expected.tolist()
    with pytest.raises(ValueError, match="pixel_values"):
        instruct.ours(**{**instruct.inputs, "pixel_values": pixels})
