"""What generate() does beside searching: every option that changes tokens, processors and stopping criteria in Python,
stop strings, streamers and returned dictionaries, all against transformers on random models of each family."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import generation as upstream

import blip2c
from helpers import prompt_ids, random_checkpoint, random_pixels, reference_model, small_tokenizer
from output_helpers import assert_same

FAMILIES = ["opt", "t5", "llama"]
BATCH, TEXT = 2, 3
VOCABULARY = 320


class Pair:
    """One random checkpoint in blip2c and in transformers, and a batch for both."""

    def __init__(self, folder: Path, family: str) -> None:
        random_checkpoint(folder, seed=7, gain=1.6, family=family)
        self.family = family
        self.ours = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)
        self.theirs = reference_model(folder)
        config = self.theirs.config
        ids = torch.from_numpy(prompt_ids(config, BATCH, TEXT, seed=3))
        self.inputs = {
            "pixel_values": torch.from_numpy(random_pixels(config, BATCH, seed=4)),
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
        }
        self.prompt = 1 if family == "t5" else ids.shape[1]

    def both(self, **options: Any) -> tuple[Any, Any]:
        """What the two give for the same call; callables may come as a function that makes new ones."""
        options = {"max_new_tokens": 8, **options}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = [{k: v() if isinstance(v, New) else v for k, v in options.items()} for _ in range(2)]
            return self.ours.generate(**self.inputs, **made[0]), self.theirs.generate(**self.inputs, **made[1])

    def same(self, **options: Any) -> np.ndarray:
        ours, theirs = self.both(**options)
        assert ours.tolist() == theirs.tolist(), options
        return ours.numpy()


class New:
    """Makes a callable anew for each of the two runs."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def __call__(self) -> Any:
        return self.make()


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tmp_path_factory.mktemp("opt"), "opt")


def last(ids: np.ndarray, position: int) -> int:
    return int(ids[0, position])


def test_every_deterministic_option_is_as_in_transformers(pair: Pair) -> None:
    """Greedy and with beams; each option is chosen by what is said without it, so that it must change something."""
    for beams in (1, 3):
        plain = pair.same(num_beams=beams)
        new = plain[0, pair.prompt :].tolist()
        first, second, end = new[0], new[1], 9
        options: dict[str, Any] = {
            "sequence_bias": {(first,): -5.0, (first, second): 3.0, (12,): 1.5},
            "begin_suppress_tokens": [first],
            "suppress_tokens": [first],
            "forced_eos_token_id": end,
            "exponential_decay_length_penalty": (1, 3.0),
            "remove_invalid_values": True,
            "renormalize_logits": True,
            "bad_words_ids": [[first]],
            "repetition_penalty": 2.5,
            "guidance_scale": 2.5,
        }
        for name, value in options.items():
            if name == "guidance_scale" and pair.family == "t5":
                continue
            changed = pair.same(num_beams=beams, eos_token_id=end, **{name: value})
            before = pair.same(num_beams=beams, eos_token_id=end)
            if name not in ("remove_invalid_values", "renormalize_logits"):
                assert changed.tolist() != before.tolist(), name


def test_a_forced_first_token_needs_a_prompt_of_one(pair: Pair) -> None:
    plain, forced = pair.same(), pair.same(forced_bos_token_id=17, begin_suppress_tokens=[5])
    assert (forced[:, pair.prompt] == 17).all() == (pair.family == "t5")
    assert pair.family == "t5" or plain.tolist() == forced.tolist()


def test_remove_invalid_values_lets_broken_logits_pass() -> None:
    from blip2c.search import beam_search, greedy_search

    def step(ids: np.ndarray) -> np.ndarray:
        logits = np.zeros((ids.shape[0], 9), np.float32)
        logits[:, 3], logits[:, 4] = np.nan, np.inf
        return logits

    with pytest.raises(blip2c.NumericError, match="NaN or Inf"):
        greedy_search(step, [[1]], max_new_tokens=2)
    assert greedy_search(step, [[1]], max_new_tokens=2, remove_invalid_values=True).sequences == [[4, 4]]
    beams = beam_search(step, [[1]], num_beams=2, max_new_tokens=2, remove_invalid_values=True)
    assert np.isfinite(beams.scores).all()


@pytest.mark.parametrize("beams", [1, 3])
def test_infinite_scores_of_a_processor(pair: Pair, beams: int) -> None:
    """The largest score for argmax; sums of beams would become NaN with the next -Inf."""

    def push(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores[:, ::2], scores[:, 11] = -torch.inf, torch.inf
        return scores

    if beams == 1:
        assert (pair.same(logits_processor=[push])[:, -1] == 11).all()
        return
    with pytest.raises(blip2c.NumericError, match="token 11: Inf"):
        pair.same(num_beams=beams, logits_processor=[push])


def test_huge_biases_do_not_make_nan() -> None:
    from blip2c.search import beam_search

    def step(ids: np.ndarray) -> np.ndarray:
        return np.tile(np.linspace(0, 1, 9, dtype=np.float32), (ids.shape[0], 1))

    bias, forbidden = [[[3], 3e38], [[5], 3e38]], [0, 1, 2]
    found = beam_search(step, [[1]], num_beams=3, max_new_tokens=6, sequence_bias=bias, suppress_tokens=forbidden)
    assert np.isfinite(found.scores).all()
    assert set(found.sequences[0]) <= {3, 5}


# -- processors --------------------------------------------------------------------------------------------------


class Push(transformers.LogitsProcessor):
    """Pushes a token that depends on the row's last one; looks at every row and the whole prompt."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, ...]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert input_ids.dtype == torch.int64
        self.seen.append((*input_ids.shape, *scores.shape, int(input_ids.sum())))
        scores = scores.clone()
        scores[torch.arange(len(scores)), (input_ids[:, -1] * 7 + input_ids[:, 0]) % scores.shape[1]] += 12.0
        return scores


def test_processors_see_and_do_what_they_do_in_transformers(pair: Pair) -> None:
    for beams in (1, 3):
        made: list[Push] = []
        push = New(lambda made=made: made.append(Push()) or transformers.LogitsProcessorList([made[-1]]))
        options = {"num_beams": beams, "eos_token_id": [9, 30], "no_repeat_ngram_size": 2}
        changed = pair.same(logits_processor=push, **options)
        assert made[0].seen == made[1].seen
        assert changed.tolist() != pair.same(**options).tolist()


def test_processors_stand_in_transformers_order(pair: Pair) -> None:
    """Around them are rules before (a bias) and after (renormalize_logits); one takes a rule's place."""

    def floor() -> Any:
        return [upstream.RepetitionPenaltyLogitsProcessor(0.3), Push(), upstream.TopKLogitsWarper(4)]

    for beams in (1, 2):
        options = {"num_beams": beams, "sequence_bias": {(11,): 4.0}, "renormalize_logits": True}
        for penalty in (None, 3.0):
            pair.same(logits_processor=New(floor), repetition_penalty=penalty, **options)


def test_functions_of_numpy_get_numpy(opt: Pair) -> None:
    inputs = {name: value.numpy() for name, value in opt.inputs.items()}
    seen = []

    def double(ids: np.ndarray, scores: np.ndarray) -> np.ndarray:
        seen.append((type(ids), type(scores), ids.dtype, scores.dtype))
        scores[:, 5:9] += 8
        return scores

    ours = opt.ours.generate(**inputs, max_new_tokens=3, logits_processor=[double])
    assert isinstance(ours, np.ndarray)
    assert ((ours[:, opt.prompt :] >= 5) & (ours[:, opt.prompt :] < 9)).all()
    assert set(seen) == {(np.ndarray, np.ndarray, np.dtype(np.int64), np.dtype(np.float32))}


def test_prefix_allowed_tokens_fn_is_as_in_transformers(pair: Pair) -> None:
    def allowed(item: int, ids: torch.Tensor) -> list[int]:
        assert ids.ndim == 1
        return [4 + item, (int(ids[-1]) * 5 + len(ids)) % VOCABULARY, 20, 21]

    for beams in (1, 3):
        new = pair.same(num_beams=beams, prefix_allowed_tokens_fn=allowed)
        assert new.tolist() != pair.same(num_beams=beams).tolist()
        pair.same(num_beams=beams, prefix_allowed_tokens_fn=allowed, suppress_tokens=[4], min_new_tokens=4)
        # Everything that is allowed is forbidden by a rule before: the constraint wins.
        pair.same(num_beams=beams, prefix_allowed_tokens_fn=lambda item, ids: [6], bad_words_ids=[[6]])


def test_guidance_with_negative_prompts(opt: Pair) -> None:
    negative = torch.tensor([[2, 5, 6], [2, 8, 9]])
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    options: dict[str, Any] = {"guidance_scale": 1.7}
    assert (
        opt.same(negative_prompt_ids=negative, **options).tolist()
        != opt.same(negative_prompt_ids=negative, negative_prompt_attention_mask=mask, **options).tolist()
    )
    with pytest.raises(ValueError, match="negative_prompt_ids: expected 2 rows"):
        opt.ours.generate(**opt.inputs, max_new_tokens=2, negative_prompt_ids=negative[:1], **options)
    with pytest.warns(UserWarning, match="`negative_prompt_ids` has no effect without `guidance_scale`"):
        opt.ours.generate(**opt.inputs, max_new_tokens=2, negative_prompt_ids=negative)


def test_watermarks_of_transformers(opt: Pair) -> None:
    config = upstream.WatermarkingConfig(bias=4.0)
    opt.theirs.language_model.config.vocab_size = VOCABULARY
    assert opt.same(watermarking_config=config).tolist() != opt.same().tolist()
    with pytest.raises(blip2c.UnsupportedError, match="watermarking_config="):
        opt.ours.generate(**opt.inputs, max_new_tokens=2, watermarking_config={"bias": 1.0})


# -- stopping ----------------------------------------------------------------------------------------------------


def enough(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
    """Ends a row by its own last token; scores are there only if they are recorded."""
    return ids[:, -1] % 3 == 1


class Said(transformers.StoppingCriteria):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.seen.append((tuple(input_ids.shape), None if scores is None else [tuple(s.shape) for s in scores]))
        return torch.full((input_ids.shape[0],), input_ids.shape[1] % 5 == 0)


def test_stopping_criteria_are_as_in_transformers(pair: Pair) -> None:
    for beams in (1, 3):
        for eos in ([9, 30], None):
            options = {"num_beams": beams, "eos_token_id": eos, "pad_token_id": 1}
            stopped = pair.same(stopping_criteria=New(lambda: [enough]), **options)
            assert eos is None or stopped.tolist() != pair.same(**options).tolist()
        made: list[Said] = []
        said = New(lambda made=made: made.append(Said()) or transformers.StoppingCriteriaList([made[-1]]))
        pair.both(num_beams=beams, stopping_criteria=said, return_dict_in_generate=True, output_scores=True)
        assert made[0].seen == made[1].seen
        pair.same(num_beams=beams, stopping_criteria=New(lambda: [upstream.MaxLengthCriteria(pair.prompt + 3)]))


def test_criteria_that_would_replace_the_limits_are_refused(opt: Pair) -> None:
    for criterion, words in (
        (upstream.MaxLengthCriteria(500), "MaxLengthCriteria\\(500\\) is longer than max_length"),
        (upstream.EosTokenCriteria(5), "EosTokenCriteria beside another eos_token_id"),
    ):
        with pytest.raises(blip2c.UnsupportedError, match=words):
            opt.ours.generate(**opt.inputs, max_new_tokens=4, stopping_criteria=[criterion])


def test_time_runs_out(opt: Pair) -> None:
    def slow(ids: Any, scores: Any) -> Any:
        time.sleep(0.03)
        return scores

    ids = opt.ours.generate(**opt.inputs, max_new_tokens=100, eos_token_id=None, max_time=0.1, logits_processor=[slow])
    assert 1 <= ids.shape[1] - opt.prompt <= 5
    with pytest.raises(ValueError, match="max_time: expected a number"):
        opt.ours.generate(**opt.inputs, max_new_tokens=4, max_time="long")


def test_stop_strings_are_as_in_transformers(opt: Pair) -> None:
    tokenizer = small_tokenizer(VOCABULARY)
    rng = np.random.default_rng(0)
    plain = opt.same(max_new_tokens=20, eos_token_id=[2])
    stopped = set()
    for _ in range(30):
        strings = ["never said"]
        for row in plain[:, opt.prompt :]:
            at = int(rng.integers(len(row) - 3))
            text = tokenizer.decode(row[at : at + 3])
            cut = int(rng.integers(0, len(text)))
            strings.append(text[cut : cut + int(rng.integers(1, 4))])
        ids = opt.same(max_new_tokens=20, eos_token_id=[2], stop_strings=strings, tokenizer=tokenizer)
        stopped.add(ids.shape[1])
    assert len(stopped) > 3
    opt.same(max_new_tokens=20, num_beams=2, stop_strings=strings[0], tokenizer=tokenizer)
    with pytest.raises(ValueError, match="pass the model's tokenizer"):
        opt.ours.generate(**opt.inputs, max_new_tokens=2, stop_strings="x")
    with pytest.raises(ValueError, match="stop_strings: expected a string"):
        opt.ours.generate(**opt.inputs, max_new_tokens=2, stop_strings=[""], tokenizer=tokenizer)


def test_stop_strings_over_other_tokenizers() -> None:
    """As transformers' StopStringCriteria on random rows, for a tokenizer of pieces with byte fallback."""
    from tokenizers import Tokenizer, decoders, models

    from blip2c.stop_strings import StopStrings

    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "b", "ab", "▁stop", "st", "op", "é"]
    pieces += ["abcdef", "▁abcdef"]
    backend = Tokenizer(models.Unigram([(piece, -1.0 - i * 0.01) for i, piece in enumerate(pieces)], 0, True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    strings = ["stop", "aé", "b a", "é"]
    ours, theirs = StopStrings(strings, tokenizer), upstream.StopStringCriteria(tokenizer, strings)
    rng = np.random.default_rng(0)
    ids = rng.integers(257, len(pieces) - 2, (3000, 6))
    ids = np.where(rng.random(ids.shape) < 0.2, np.where(rng.random(ids.shape) < 0.5, 1 + 0xC3, 1 + 0xA9), ids)
    expected = theirs(torch.from_numpy(ids), None).tolist()
    assert [ours.ends(row) for row in ids.tolist()] == expected
    assert 100 < sum(expected) < 2900


# -- streamers ---------------------------------------------------------------------------------------------------


class Tape:
    def __init__(self) -> None:
        self.said: list[Any] = []

    def put(self, value: Any) -> None:
        self.said.append((type(value), value.dtype, value.tolist()))

    def end(self) -> None:
        self.said.append("end")


def test_streamers_hear_what_they_hear_in_transformers(pair: Pair) -> None:
    tapes: list[Tape] = []
    pair.both(streamer=New(lambda: tapes.append(Tape()) or tapes[-1]), eos_token_id=[9, 30])
    assert tapes[0].said == tapes[1].said
    assert tapes[0].said[-1] == "end"
    assert len(tapes[0].said) == 10
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        pair.ours.generate(**pair.inputs, max_new_tokens=3, num_beams=2, streamer=Tape())


def test_text_streams_from_a_thread(opt: Pair) -> None:
    tokenizer = small_tokenizer(VOCABULARY)
    inputs = {name: value[:1] for name, value in opt.inputs.items()}
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=20)
    options = {**inputs, "max_new_tokens": 12}
    worker = threading.Thread(target=opt.ours.generate, kwargs={**options, "streamer": streamer})
    worker.start()
    text = "".join(streamer)
    worker.join(20)
    assert text == tokenizer.decode(opt.ours.generate(**options)[0, opt.prompt :])


# -- returned dictionaries ---------------------------------------------------------------------------------------


def compare_outputs(pair: Pair, ours: Any, theirs: Any) -> None:
    assert type(ours).__name__ == type(theirs).__name__
    assert [name for name in theirs if name != "past_key_values"] == list(ours)
    assert ours.sequences.tolist() == theirs.sequences.tolist() == ours[0].tolist()
    for name in ("scores", "logits"):
        if getattr(theirs, name) is None:
            assert getattr(ours, name) is None
            continue
        assert len(ours[name]) == len(theirs[name])
        for mine, yours in zip(ours[name], theirs[name], strict=True):
            assert (mine.dtype, mine.shape) == (yours.dtype, yours.shape)
            torch.testing.assert_close(mine, yours, rtol=0, atol=2e-3)
    if "beam_indices" in theirs:
        assert ours.beam_indices.dtype == theirs.beam_indices.dtype
        assert ours.beam_indices.tolist() == theirs.beam_indices.tolist()
    if "sequences_scores" in theirs:
        torch.testing.assert_close(ours.sequences_scores, theirs.sequences_scores, rtol=1e-4, atol=1e-4)
    if theirs.scores is None:
        return
    beams = theirs.get("beam_indices")
    for normalize in (False, True):
        mine = pair.ours.compute_transition_scores(ours.sequences, ours.scores, beams, normalize)
        yours = pair.theirs.language_model.compute_transition_scores(theirs.sequences, theirs.scores, beams, normalize)
        torch.testing.assert_close(mine, yours, rtol=1e-4, atol=2e-3)


@pytest.mark.parametrize("beams", [1, 3])
def test_returned_dictionaries_are_as_in_transformers(pair: Pair, beams: int) -> None:
    for wanted in (("output_scores", "output_logits"), ("output_logits",), ()):
        options: dict[str, Any] = {name: True for name in wanted} | {"num_beams": beams, "eos_token_id": [9, 30]}
        options |= {"num_return_sequences": min(beams, 2), "return_dict_in_generate": True, "repetition_penalty": 1.3}
        ours, theirs = pair.both(**options)
        compare_outputs(pair, ours, theirs)


STATES = {
    "opt": ("attentions", "hidden_states"),
    "t5": ("encoder_attentions", "encoder_hidden_states", "decoder_attentions", "cross_attentions",
           "decoder_hidden_states"),
}  # fmt: skip


def compare_states(pair: Pair, **options: Any) -> None:
    options = {"return_dict_in_generate": True, "eos_token_id": [9, 30], **options}
    ours, theirs = pair.both(**options)
    compare_outputs(pair, ours, theirs)
    count = 0
    for name in STATES.get(pair.family, STATES["opt"]):
        assert (ours[name] is None) == (theirs[name] is None) if name in theirs else name not in ours, name
        if name in theirs:
            count += assert_same(ours[name], theirs[name], 2e-3)
    assert count > 0


@pytest.mark.parametrize("beams", [1, 3])
def test_states_of_every_step_are_as_in_transformers(pair: Pair, beams: int) -> None:
    """Also of rows that have ended, of rows with pads, and, where nothing is left to draw, of sampled sequences."""
    wanted = {"output_attentions": True, "output_hidden_states": True, "num_beams": beams}
    compare_states(pair, **wanted, num_return_sequences=min(beams, 2), output_scores=True)
    compare_states(pair, output_attentions=True, num_beams=beams, max_new_tokens=1)
    compare_states(pair, output_hidden_states=True, num_beams=beams, max_new_tokens=3)
    compare_states(pair, **wanted, do_sample=beams == 1, top_k=1, num_return_sequences=2, max_new_tokens=4)


def test_states_of_sliding_layers_forget_what_is_out_of_sight(tmp_path: Path) -> None:
    for family in ("mistral", "qwen2"):
        pair = Pair(tmp_path / family, family)
        compare_states(pair, output_attentions=True, output_hidden_states=True, num_beams=2)


# -- when something goes wrong -----------------------------------------------------------------------------------


class OwnError(Exception):
    pass


def raiser(*_: Any, **__: Any) -> Any:
    raise OwnError("from the callable")


def test_exceptions_of_callables_come_out_unchanged(opt: Pair) -> None:
    good = opt.ours.generate(**opt.inputs, max_new_tokens=4)
    tape = Tape()
    tape.put = raiser  # type: ignore[method-assign]
    for options in (
        {"logits_processor": [raiser]},
        {"stopping_criteria": [raiser]},
        {"prefix_allowed_tokens_fn": raiser},
        {"streamer": tape},
    ):
        for beams in (1, 2):
            if beams == 2 and "streamer" in options:
                continue
            with pytest.raises(OwnError, match="from the callable"):
                opt.ours.generate(**opt.inputs, max_new_tokens=4, num_beams=beams, **options)
            assert opt.ours.generate(**opt.inputs, max_new_tokens=4).tolist() == good.tolist()


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"logits_processor": [lambda i, s: s[:, :4]]}, ValueError, r"returned .*\[2, 4\], expected floats \[2, 320\]"),
        ({"logits_processor": [lambda i, s: s * float("nan")]}, ArithmeticError, "logits_processor: .* returned NaN"),
        ({"logits_processor": [lambda i, s: None]}, ValueError, "logits_processor: <lambda> returned object"),
        ({"logits_processor": [3]}, TypeError, "logits_processor: expected callables, found int"),
        ({"logits_processor": raiser}, TypeError, "logits_processor: expected a list of callables"),
        ({"stopping_criteria": [3]}, TypeError, "stopping_criteria: expected callables, found int"),
        ({"stopping_criteria": [lambda i, s: i]}, ValueError, r"stopping_criteria: expected bool \[2\], found int64"),
        ({"prefix_allowed_tokens_fn": lambda b, i: []}, ValueError, "returned an empty list for batch ID 0"),
        ({"prefix_allowed_tokens_fn": lambda b, i: [999]}, ValueError, "batch ID 0: expected ids from 0 to 319"),
        ({"prefix_allowed_tokens_fn": 3}, TypeError, "prefix_allowed_tokens_fn: expected a callable"),
        ({"streamer": 3}, TypeError, "streamer: expected put"),
    ],
)
def test_wrong_callables_are_named(opt: Pair, options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        opt.ours.generate(**opt.inputs, max_new_tokens=4, **options)


def test_a_signal_is_answered_between_callables(opt: Pair) -> None:
    started = []

    def wait(ids: Any, scores: Any) -> Any:
        started.append(time.perf_counter())
        if len(started) == 2:
            signal.raise_signal(signal.SIGINT)
        return scores

    with pytest.raises(KeyboardInterrupt):
        opt.ours.generate(**opt.inputs, max_new_tokens=100, eos_token_id=None, logits_processor=[wait])
    assert time.perf_counter() - started[1] < 0.1
    assert len(started) == 2
