"""Greedy and beam search against transformers' generate(): exactly the same tokens, whatever the options."""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from blip2c import _core
from blip2c.generation import GenerationConfig, core_options
from blip2c.search import SearchResult, beam_search, greedy_search
from search_helpers import (
    DEAD,
    EOS,
    PAD,
    Table,
    TableModel,
    random_options,
    random_prompts,
    smallest_margin,
    transformers_search,
)

TIE = 1e-5


class NothingAllowedError(Exception):
    """Ours for the ValueError that says so: upstream goes on with a forbidden token, or with nothing."""


def search(step: Any, prompts: Any, options: dict[str, Any]) -> SearchResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if options.get("num_beams", 1) > 1:
                return beam_search(step, prompts, **options)
            return greedy_search(step, prompts, **options)
        except ValueError as error:
            if "every token is forbidden" in str(error):
                raise NothingAllowedError from error
            raise


def same(ours: SearchResult, theirs: Any, prompt_length: int) -> bool:
    ids = theirs.sequences[:, prompt_length:].numpy()
    if ours.ids.shape != ids.shape or not np.array_equal(ours.ids, ids):
        return False
    scores = getattr(theirs, "sequences_scores", None)
    return scores is None or np.allclose(ours.scores, scores.numpy(), rtol=1e-5, atol=1e-4)


def check_forbidden(theirs: Any) -> None:
    """We refused because nothing was allowed: then upstream said a forbidden token or returned an empty slot."""
    if getattr(theirs, "sequences_scores", None) is not None:
        assert theirs.sequences_scores.max() < DEAD
    else:
        assert any((scores == -np.inf).all(dim=1).any() for scores in theirs.scores)


def compare_alone(step: Any, model: Any, prompt: np.ndarray, options: dict[str, Any]) -> str:
    theirs = transformers_search(model, prompt, options)
    try:
        ours = search(step, prompt, options)
    except NothingAllowedError:
        check_forbidden(theirs)
        return "forbidden"
    if same(ours, theirs, prompt.shape[1]):
        return "equal"
    wide = getattr(step, "in_float64", None) or (lambda rows: step(rows).astype(np.float64))
    margin = smallest_margin(wide, prompt[0].tolist(), options)
    assert margin < TIE, (prompt.tolist(), options, ours, theirs.sequences, theirs.get("sequences_scores"), margin)
    return "tie"


def compare(step: Any, model: Any, prompts: np.ndarray, options: dict[str, Any]) -> str:
    """One word: "equal" for the whole batch; else what each of its rows is alone.

    Upstream goes on with an item that has stopped until the others stop. That changes nothing, unless its result
    holds one of the -1e9 placeholders, or an item of the batch is refused here: those are compared one by one.
    """
    theirs = transformers_search(model, prompts, options)
    try:
        ours = search(step, prompts, options)
        if same(ours, theirs, prompts.shape[1]):
            return "equal"
    except NothingAllowedError:
        pass
    outcomes = [compare_alone(step, model, prompts[b : b + 1], options) for b in range(len(prompts))]
    scores = getattr(theirs, "sequences_scores", None)
    placeholders = scores is not None and bool(scores.min() < DEAD)
    assert placeholders or set(outcomes) != {"equal"}, (prompts.tolist(), options, theirs.sequences)
    return next((name for name in ("forbidden", "tie") if name in outcomes), "placeholder")


def random_case(rng: np.random.Generator, beams: bool) -> tuple[Table, np.ndarray, dict[str, Any]]:
    vocabulary = int(rng.integers(4, 40))
    table = Table(rng, vocabulary, peaks=float(rng.choice([0.5, 2.0, 4.0])), holes=float(rng.choice([0.0, 0.0, 0.3])))
    length = int(rng.integers(2, 8))
    prompts = random_prompts(rng, vocabulary, int(rng.integers(1, 4)), length)
    options = random_options(rng, vocabulary, length, beams)
    if isinstance(options["eos_token_id"], list):
        options["eos_token_id"] = options["eos_token_id"][: vocabulary - 1]
    return table, prompts, options


def run_tables(cases: int, seed: int) -> Counter[str]:
    rng = np.random.default_rng(seed)
    seen: Counter[str] = Counter()
    for case in range(cases):
        table, prompts, options = random_case(rng, beams=case % 3 != 0)
        seen[compare(table, TableModel(table), prompts, options)] += 1
    print(f"tables, {cases} option sets: {dict(seen)}")
    return seen


def test_tables_equal_transformers() -> None:
    seen = run_tables(900, seed=1)
    assert seen["equal"] >= 0.95 * 900
    assert seen["tie"] <= 3


@pytest.mark.exhaustive
def test_ten_thousand_tables_equal_transformers() -> None:
    seen = run_tables(10_000, seed=2)
    assert seen["equal"] >= 0.95 * 10_000
    assert seen["tie"] <= 30


class OPTStep:
    """A small random OPT without memory: peaked logits, so that near ties are rare."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        config = transformers.OPTConfig(
            vocab_size=48, hidden_size=16, word_embed_proj_dim=16, ffn_dim=32, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=64, eos_token_id=EOS, pad_token_id=PAD, bos_token_id=0,
        )  # fmt: skip
        self.model = transformers.OPTForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.normal_(0.0, 0.6 if parameter.ndim > 1 else 0.3)
        self.wide = transformers.OPTForCausalLM(config).double().eval()
        self.wide.load_state_dict({name: value.double() for name, value in self.model.state_dict().items()})

    def __call__(self, ids: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self.model(torch.from_numpy(ids)).logits[:, -1].numpy().copy()

    def in_float64(self, rows: list[list[int]]) -> np.ndarray:
        with torch.no_grad():
            return self.wide(torch.tensor(rows)).logits[:, -1].numpy().copy()


def test_random_opt_equals_transformers() -> None:
    rng = np.random.default_rng(3)
    seen: Counter[str] = Counter()
    for case in range(300):
        if case % 30 == 0:
            step = OPTStep(case)
        length = int(rng.integers(2, 10))
        prompts = random_prompts(rng, 48, int(rng.integers(1, 4)), length)
        options = random_options(rng, 48, length, beams=case % 3 != 0)
        seen[compare(step, step.model, prompts, options)] += 1
    print(f"OPT, 300 option sets: {dict(seen)}")
    assert seen["equal"] >= 290
    assert seen["tie"] <= 3


def test_every_option_matters() -> None:
    """Each option changes the result of some case, so that the comparisons above say something about it."""
    rng = np.random.default_rng(4)
    changed: Counter[str] = Counter()

    def result(options: dict[str, Any]) -> Any:
        try:
            found = search(table, prompts, options)
        except NothingAllowedError:
            return None
        return found.sequences, found.ids.tolist()

    for case in range(400):
        table, prompts, options = random_case(rng, beams=case % 3 != 0)
        before = result(options)
        for name in options:
            less = {other: value for other, value in options.items() if other != name}
            if name == "num_beams":
                less["num_return_sequences"] = 1
            after = result(less)
            changed[name] += before is not None and after is not None and before != after
    names = [
        "max_new_tokens", "max_length", "eos_token_id", "pad_token_id", "repetition_penalty", "no_repeat_ngram_size",
        "bad_words_ids", "suppress_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences",
        "early_stopping", "length_penalty",
    ]  # fmt: skip
    assert [name for name in names if changed[name] == 0] == []


def test_topk_order_of_equals_is_torch_order() -> None:
    """Upstream keeps the hypotheses that torch.topk puts first; where all allowed tokens are equally likely
    only that decides."""
    rng = np.random.default_rng(5)
    for case in range(60):
        vocabulary = int(rng.choice([3, 5, 17, 70, 700]))
        logits = np.zeros((7, vocabulary), np.float32)
        logits[:, 3:][rng.random((7, vocabulary - 3)) < 0.3 * (case % 2)] = -np.inf

        def step(ids: np.ndarray, logits: np.ndarray = logits) -> np.ndarray:
            return logits[ids.shape[1] % 7][None].repeat(len(ids), 0)

        options = {"num_beams": int(rng.integers(2, 5)), "max_new_tokens": 4, "eos_token_id": EOS}
        options["num_return_sequences"] = options["num_beams"]
        prompts = np.array([[0, 1]])
        theirs = transformers_search(TableModel(step), prompts, options)
        assert same(search(step, prompts, options), theirs, 2), options


def test_unequal_prompts_get_what_each_gets_alone() -> None:
    rng = np.random.default_rng(6)
    for case in range(120):
        table, _, options = random_case(rng, beams=case % 2 == 0)
        if "max_length" in options:
            options["max_new_tokens"] = options.pop("max_length")
        options.pop("min_length", None)
        vocabulary = table.logits.shape[0]
        prompts = [rng.integers(0, vocabulary, int(rng.integers(2, 9))).tolist() for _ in range(4)]
        try:
            alone = [search(table, [prompt], options) for prompt in prompts]
        except NothingAllowedError:
            continue
        together = search(table, prompts, options)
        assert together.sequences == [row for result in alone for row in result.sequences]
        assert np.array_equal(together.scores, np.concatenate([result.scores for result in alone]))
        assert together.steps == max(result.steps for result in alone)


def test_unequal_prompts_count_from_their_own() -> None:
    table = Table(np.random.default_rng(7), 12, 2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = greedy_search(table, [[3, 4], [3, 4, 5, 6]], max_length=6, eos_token_id=None, pad_token_id=9)
    assert result.lengths.tolist() == [4, 2]
    assert result.ids[1, 2:].tolist() == [9, 9]


def test_threads_do_not_change_a_bit() -> None:
    rng = np.random.default_rng(8)
    table = Table(rng, 30, 1.0)
    prompts = rng.integers(0, 30, (5, 4))
    before = _core.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            _core.set_num_threads(threads)
            results.append(search(table, prompts, {"num_beams": 4, "max_new_tokens": 12, "repetition_penalty": 1.3}))
    finally:
        _core.set_num_threads(before)
    for other in results[1:]:
        assert np.array_equal(results[0].ids, other.ids)
        assert np.array_equal(results[0].scores, other.scores)


def test_ended_rows_are_not_asked_for() -> None:
    sizes = []

    def step(ids: np.ndarray) -> np.ndarray:
        sizes.append(len(ids))
        logits = np.zeros((len(ids), 8), np.float32)
        logits[:, 5] = 1.0
        logits[ids.shape[1] >= ids[:, 0] + 3, EOS] = 2.0  # row with first id k ends with its (k+2)-th new token
        return logits

    result = greedy_search(step, [[0, 7], [1, 7], [3, 7]], max_new_tokens=10, eos_token_id=EOS, pad_token_id=PAD)
    assert result.sequences == [[5, 2], [5, 5, 2], [5, 5, 5, 5, 2]]
    assert sizes == [3, 3, 2, 1, 1]
    assert result.ids[0].tolist() == [5, 2, PAD, PAD, PAD]
    assert result.steps == 4


@pytest.mark.parametrize("beams", [1, 4])
def test_steps_allocate_nothing(beams: int) -> None:
    table = Table(np.random.default_rng(9), 50, 1.0)
    counts = []

    def step(ids: np.ndarray) -> np.ndarray:
        counts.append(_core._allocation_count())
        return table(ids)

    options = {"num_beams": beams, "max_new_tokens": 30, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3}
    search(step, np.array([[3, 4], [5, 6]]), {**options, "bad_words_ids": [[4, 5]]})
    assert len(counts) == 30
    assert len(set(counts[2:])) == 1  # the pool starts its threads in the first step


@pytest.mark.parametrize("beams", [1, 3])
def test_every_failed_allocation_is_a_memory_error(beams: int) -> None:
    table = Table(np.random.default_rng(10), 9, 1.0)
    options = {"num_beams": beams, "max_new_tokens": 5, "bad_words_ids": [[4, 5]], "suppress_tokens": [3]}
    want = search(table, np.array([[3, 4], [5, 6]]), options)
    for countdown in range(1, 100):
        _core._fail_allocation_after(countdown)
        try:
            got = search(table, np.array([[3, 4], [5, 6]]), options)
            break
        except MemoryError:
            pass
        finally:
            _core._fail_allocation_after(0)
    assert countdown > 10
    assert np.array_equal(got.ids, want.ids)


def test_exceptions_of_the_step_come_out_unchanged() -> None:
    class OddError(Exception):
        pass

    calls = 0
    odd = OddError("third call")

    def step(ids: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise odd
        return np.zeros((len(ids), 6), np.float32)

    with pytest.raises(OddError) as caught:
        beam_search(step, [[3, 4]], num_beams=2, max_new_tokens=9)
    assert caught.value is odd
    calls = 2
    with pytest.raises(OddError):
        greedy_search(step, [[3, 4]], max_new_tokens=9)


def answers(later: Any) -> Any:
    """Zeros at the first call, `later(n)` after that."""
    calls = []

    def step(ids: np.ndarray) -> Any:
        calls.append(1)
        return np.zeros((len(ids), 6), np.float32) if len(calls) == 1 else later(len(ids))

    return step


@pytest.mark.parametrize(
    ("later", "error", "words"),
    [
        (lambda n: np.zeros((n, 6)), TypeError, "expected an array of float32, found float64"),
        (lambda n: [[0.0] * 6] * n, TypeError, "expected a numpy array, found list"),
        (lambda n: None, TypeError, "found NoneType"),
        (lambda n: np.zeros((n, 7), np.float32), ValueError, r"expected shape \[2, 6\], found \[2, 7\]"),
        (lambda n: np.zeros((n + 1, 6), np.float32), ValueError, r"expected shape \[2, 6\], found \[3, 6\]"),
        (lambda n: np.zeros((n, 1, 6), np.float32), ValueError, "expected 2 axes, found 3"),
    ],
)
def test_wrong_logits_are_named(later: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=f"logits returned by step.*{words}"):
        greedy_search(answers(later), [[3], [4]], max_new_tokens=4)
    with pytest.raises(error, match=f"logits returned by step.*{words}"):
        beam_search(answers(later), [[3]], num_beams=2, max_new_tokens=4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_inf_name_step_and_row(bad: float) -> None:
    def later(n: int) -> np.ndarray:
        logits = np.zeros((n, 6), np.float32)
        logits[1, 4] = bad
        return logits

    with pytest.raises(_core.NumericError, match="row 1 at step 1: NaN or Inf"):
        greedy_search(answers(later), [[3], [4]], max_new_tokens=4)
    with pytest.raises(_core.NumericError, match="row 0, beam 1 at step 1: NaN or Inf"):
        beam_search(answers(later), [[3]], num_beams=2, max_new_tokens=4)


def test_nothing_allowed_is_said() -> None:
    def step(ids: np.ndarray) -> np.ndarray:
        return np.zeros((len(ids), 4), np.float32)

    with pytest.raises(ValueError, match="row 0 at step 0: every token is forbidden"):
        greedy_search(step, [[3]], max_new_tokens=4, suppress_tokens=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="row 0 at step 3: every token is forbidden"):
        beam_search(step, [[3]], num_beams=2, max_new_tokens=9, no_repeat_ngram_size=1)


def test_non_contiguous_and_foreign_logits_are_read_right() -> None:
    table = Table(np.random.default_rng(11), 9, 2.0)
    prompts = np.array([[3, 4], [5, 6]])
    want = search(table, prompts, {"num_beams": 3, "max_new_tokens": 6})
    for change in (np.asfortranarray, lambda x: np.repeat(x, 2, axis=1)[:, ::2], lambda x: x.astype(">f4")):
        got = search(lambda ids, change=change: change(table(ids)), prompts, {"num_beams": 3, "max_new_tokens": 6})
        assert np.array_equal(got.ids, want.ids)


@pytest.mark.parametrize(
    ("prompts", "error", "words"),
    [
        ([], ValueError, "expected at least one"),
        ([3, 4], TypeError, "row 0: expected a sequence of ints"),
        ([[3.5]], TypeError, "row 0: expected a sequence of ints"),
        ([[3], [-1]], ValueError, "row 1: ids must be from 0"),
    ],
)
def test_wrong_prompts_are_named(prompts: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        greedy_search(Table(np.random.default_rng(0), 5, 1.0), prompts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_beams": 0}, "num_beams: expected at least 1, found 0"),
        ({"num_return_sequences": 3}, r"num_return_sequences \(3\) must not exceed num_beams \(2\)"),
        ({"num_return_sequences": 0}, "num_return_sequences: expected at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"max_new_tokens": None}, "max_new_tokens: neither it nor max_length is set"),
        ({"max_length": 2}, "prompt 0 has 2 tokens already, max_length is 2"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty: expected a number above 0"),
        ({"length_penalty": float("inf")}, "length_penalty: expected a finite number"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: expected at least 0"),
        ({"bad_words": [[3], []]}, "bad_words_ids: sequence 1 is empty"),
        ({"bad_words": [[3, 9]]}, "bad_words_ids: id 9 is outside the vocabulary of 9"),
        ({"suppress_ids": [-1]}, "suppress_tokens: id -1 is outside the vocabulary of 9"),
        ({"eos_ids": list(range(9))}, "num_beams: beam search over 9 end tokens needs a vocabulary of at least 10"),
        ({"early_stopping": "always"}, "early_stopping: expected True, False or 'never'"),
        ({"min_length": -1}, "min_length: expected an integer from 0"),
        ({"num_beams": 2**40}, "num_beams: expected an integer from"),
        ({"wrong": 1}, "options: unknown option 'wrong'"),
    ],
)
def test_the_c_part_checks_options_itself(changes: dict[str, Any], words: str) -> None:
    table = Table(np.random.default_rng(0), 9, 1.0)
    options = core_options(GenerationConfig(), {"num_beams": 2, "max_new_tokens": 4}, [2])
    ids, offsets = np.array([3, 4], np.int32), np.array([0, 2])
    _core.search(table, ids, offsets, options, True)
    with pytest.raises(ValueError, match=words):
        _core.search(table, ids, offsets, {**options, **changes}, True)


@pytest.mark.parametrize("name", ["max_length", "eos_ids", "bad_words", "early_stopping"])
def test_a_missing_or_mistyped_option_is_named(name: str) -> None:
    options = core_options(GenerationConfig(), {"num_beams": 2, "max_new_tokens": 4}, [2])
    ids, offsets = np.array([3, 4], np.int32), np.array([0, 2])
    table = Table(np.random.default_rng(0), 9, 1.0)
    with pytest.raises((TypeError, ValueError), match=f"{name}: expected"):
        _core.search(table, ids, offsets, {**options, name: 1.5}, True)
    del options[name]
    with pytest.raises(ValueError, match=f"'{name}' is missing"):
        _core.search(table, ids, offsets, options, True)


def test_offsets_are_checked() -> None:
    options = core_options(GenerationConfig(), {"max_new_tokens": 4}, [2])
    table = Table(np.random.default_rng(0), 9, 1.0)
    for offsets in ([0], [0, 1], [1, 2], [0, 3, 2], [0, -1, 2]):
        with pytest.raises(ValueError, match="offsets: expected"):
            _core.search(table, np.array([3, 4], np.int32), np.array(offsets), options, True)


def test_keyboard_interrupt_is_answered_within_a_tenth_of_a_second() -> None:
    logits = np.zeros((1, 50_000), np.float32)
    sent: list[float] = []

    def interrupt() -> None:
        sent.append(time.perf_counter())
        signal.raise_signal(signal.SIGINT)

    timer = threading.Timer(0.3, interrupt)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            greedy_search(lambda ids: logits, [[3]], max_new_tokens=10**6, eos_token_id=None)
        late = time.perf_counter() - sent[0]
    finally:
        timer.join()
    assert late < 0.1


def test_other_threads_run_while_it_searches() -> None:
    """The interpreter is held in the step only: a thread makes progress during one long search without Python steps."""
    logits = np.zeros((1, 50_000), np.float32)
    ticks = 0
    stop = threading.Event()

    def count() -> None:
        nonlocal ticks
        while not stop.is_set():
            ticks += 1
            time.sleep(0.0005)

    thread = threading.Thread(target=count)
    thread.start()
    greedy_search(lambda ids: logits, [[3]], max_new_tokens=2000, eos_token_id=None)
    stop.set()
    thread.join()
    assert ticks > 20


def test_greedy_search_refuses_beams() -> None:
    with pytest.raises(ValueError, match="num_beams: greedy_search has one beam, found 3"):
        greedy_search(Table(np.random.default_rng(0), 5, 1.0), [[3, 4]], num_beams=3)


def test_lists_that_grow_while_they_are_read() -> None:
    """__index__ is somebody's code: it may append to the very list that is being copied."""

    class Grower:
        def __init__(self, ids: list[Any]) -> None:
            self.ids = ids

        def __index__(self) -> int:
            self.ids.extend([3] * 4000)
            return 2

    options = core_options(GenerationConfig(), {"max_new_tokens": 2, "bad_words_ids": [[4, 5]]}, [1])
    ids, offsets = np.array([3], np.int32), np.array([0, 1], np.int64)
    for name in ("eos_ids", "suppress_ids", "bad_words"):
        grown: list[Any] = []
        grown += [Grower(grown), 2]
        result = _core.search(
            lambda rows: np.zeros((len(rows), 8), np.float32),
            ids,
            offsets,
            {**options, name: [grown] if name == "bad_words" else grown},
            True,
        )
        assert result["lengths"].tolist() == [2]
