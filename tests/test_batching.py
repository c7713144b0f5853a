"""Items that come and go get what each would get alone, to the bit; prefixes and conversations read nothing twice.

Then captioning: the batch is kept full, whatever goes wrong or is interrupted leaves no thread behind.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import blip2c
from blip2c import _core
from blip2c.flow import NAME, Flow
from helpers import TEXTS, random_checkpoint, random_pixels
from running import child_process
from test_api import picture as coarse

FAMILIES = ["opt", "mistral", "t5"]
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.7},
    "sampling": {"do_sample": True, "seed": 11, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "seed": 12, "num_beams": 3},
}


class Small:
    """A random checkpoint's core, and prompts for it."""

    def __init__(self, folder: Any, family: str, seed: int) -> None:
        random_checkpoint(folder, seed=seed, gain=1.6, family=family, text={"vocab_size": 60})
        model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)
        self.core: _core.Model = model._core
        self.config = model.config
        self.queries: int = model.config.num_query_tokens
        self.is_encoder_decoder = family == "t5"
        self.end = TEXTS[family]["eos_token_id"]

    def options(self, **changes: Any) -> dict[str, Any]:
        return {
            "max_length": None, "max_new_tokens": 12, "min_length": 0, "min_new_tokens": None, "num_beams": 1,
            "num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False, "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 0, "eos_ids": [self.end, 7, 23], "pad_id": 1, "bad_words": [], "suppress_ids": [],
            "temperature": 1.0, "top_h": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0,
            "epsilon_cutoff": 0.0, "eta_cutoff": 0.0, **changes,
        }  # fmt: skip

    def prompts(self, count: int, seed: int, pads: bool = False) -> list[dict[str, Any]]:
        """Pictures with texts of different lengths behind them."""
        rng = np.random.default_rng(seed)
        features = self.core.encode(random_pixels(self.config, count, seed))
        made = []
        for picture in features:
            text = rng.integers(4, 59, int(rng.integers(1, 9)))
            ids = np.concatenate([np.full(self.queries, -1), text]).astype(np.int32)
            mask = np.ones(len(ids), np.uint8)
            if pads:
                mask[self.queries : self.queries + int(rng.integers(0, len(text)))] = 0
            decoder = rng.integers(4, 59, int(rng.integers(1, 9))).astype(np.int32) if self.is_encoder_decoder else None
            made.append({"features": picture, "ids": ids, "mask": mask if pads else None, "decoder": decoder})
        return made

    def generate(self, prompts: list[dict[str, Any]], options: dict[str, Any], **more: Any) -> dict[str, Any]:
        def offsets(name: str) -> NDArray[np.int64]:
            return np.cumsum([0, *(len(prompt[name]) for prompt in prompts)]).astype(np.int64)

        def joined(name: str) -> Any:
            return None if prompts[0][name] is None else np.concatenate([prompt[name] for prompt in prompts])

        if self.is_encoder_decoder:
            more |= {"decoder_ids": joined("decoder"), "decoder_offsets": offsets("decoder")}
        pictures = None if prompts[0]["features"] is None else np.stack([prompt["features"] for prompt in prompts])
        rules = joined("decoder" if self.is_encoder_decoder else "ids")
        return self.core.generate(pictures, joined("ids"), offsets("ids"), joined("mask"), rules, options, **more)

    def alone(self, prompt: dict[str, Any], key: int, options: dict[str, Any], **more: Any) -> dict[str, Any]:
        return self.generate([prompt], options, keys=np.array([key], np.uint64), **more)


def rows(result: dict[str, Any]) -> list[tuple[list[int], bytes]]:
    """Tokens and the bits of the score of each row."""
    ids = [row[:length].tolist() for row, length in zip(result["ids"], result["lengths"], strict=True)]
    return [(row, score.tobytes()) for row, score in zip(ids, result["scores"], strict=True)]


@pytest.fixture(scope="module", params=FAMILIES)
def small(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small"), request.param, seed=61)


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("opt"), "opt", seed=62)


def as_item(prompt: dict[str, Any], prefix: Any = None, key: int = 0) -> tuple[Any, ...]:
    rules = prompt["ids"] if prompt["decoder"] is None else prompt["decoder"]
    return prompt["features"], prompt["ids"], rules, prompt["mask"], prefix, prompt["decoder"], key


def stream(
    small: Small, items: list[tuple[Any, ...]], options: dict[str, Any], places: int, hesitate: int = 0
) -> tuple[list[dict[str, Any]], list[int], dict[str, Any]]:
    """Results by item, the order in which they came, and the counters. Every `hesitate`-th answer is "none yet"."""
    waiting, results, order, asked = iter(items), {}, [], [0]

    def following(wait: bool) -> tuple[Any, ...] | None:
        asked[0] += 1
        if hesitate and not wait and asked[0] % hesitate:
            return None
        return next(waiting)

    def done(index: int, result: dict[str, Any]) -> None:
        order.append(index)
        results[index] = result

    longest = max(len(item[1]) + (len(item[4]) if item[4] is not None else 0) for item in items)
    decoder = max(len(item[5]) for item in items) if items[0][5] is not None else 0
    counters = small.core.generate_stream(
        following, done, options, places, longest, decoder, any(item[3] is not None for item in items)
    )
    return [results[i] for i in range(len(items))], order, counters


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("pads", [False, True])
def test_streamed_items_get_what_each_gets_alone(small: Small, mode: str, pads: bool) -> None:
    prompts = small.prompts(14, seed=1, pads=pads)
    options = small.options(max_new_tokens=None, max_length=20, **MODES[mode])  # so that each has its own limit
    expected = [rows(small.alone(prompt, key, options)) for key, prompt in enumerate(prompts)]
    assert len({str(row) for row in expected}) > 7
    for places, hesitate in ((3, 0), (5, 4)):
        results, order, counters = stream(
            small, [as_item(p, key=k) for k, p in enumerate(prompts)], options, places, hesitate
        )
        assert [rows(result) for result in results] == expected
        assert sorted(order) == list(range(14))
        assert order != list(range(14))
        assert counters["items"] == 14


def test_the_batch_is_kept_full(opt: Small) -> None:
    """While there are items left no place is empty, and the whole takes about as many steps as there is work."""
    prompts, options = opt.prompts(30, seed=2), opt.options(max_new_tokens=25)
    lengths = [int(opt.alone(prompt, 0, options)["lengths"][0]) for prompt in prompts]
    places, left = 4, iter(prompts)
    exhausted_at: list[int] = []
    finished = [0]

    def following(wait: bool) -> tuple[Any, ...]:
        try:
            return as_item(next(left))
        except StopIteration:
            exhausted_at.append(finished[0])
            raise

    def done(index: int, result: dict[str, Any]) -> None:
        finished[0] += 1

    counters = opt.core.generate_stream(following, done, options, places, 40)
    assert exhausted_at == [30 - places + 1]  # asked when the first place stayed empty, not before
    assert counters["items_advanced"] == counters["rows_advanced"] == sum(length - 1 for length in lengths)
    idle = counters["steps"] * places - counters["items_advanced"]
    assert 0 <= idle <= (places - 1) * 24  # only the last items, at most 24 steps each, run beside empty places
    one_after_another = sum(max(lengths[i : i + places]) - 1 for i in range(0, 30, places))
    assert counters["steps"] < 0.8 * one_after_another


def test_more_rows_than_run_together(small: Small) -> None:
    """generate() of many rows lets them in as others leave."""
    prompts, options = small.prompts(75, seed=3), small.options()
    together = small.generate(prompts, options)
    assert together["items"] == 75
    assert together["items_advanced"] < together["steps"] * 75
    for key in (0, 40, 74):
        assert rows(small.alone(prompts[key], key, options)) == rows(together)[key : key + 1]


@pytest.mark.parametrize("mode", list(MODES))
def test_steps_allocate_nothing_while_items_come_and_go(small: Small, mode: str) -> None:
    result = small.generate(small.prompts(70, seed=4), small.options(**MODES[mode]))
    assert result["items"] == 70
    assert result["items_advanced"] < result["steps"] * 70  # some entered while others ran
    assert result["step_allocations"] == 0


def test_a_wait_for_the_next_item(opt: Small) -> None:
    """Where nothing runs the source is asked to wait, and only then."""
    prompts, options = opt.prompts(3, seed=5), opt.options()
    waits = []

    def one_by_one(wait: bool) -> tuple[Any, ...] | None:
        waits.append(wait)
        if wait and prompts:
            return as_item(prompts.pop())
        if wait:
            raise StopIteration
        return None

    counters = opt.core.generate_stream(one_by_one, lambda index, result: None, options, 2, 40)
    assert counters["items"] == 3
    assert counters["items_advanced"] == counters["steps"]
    assert waits.count(True) == 4


# -- prefixes ----------------------------------------------------------------------------------------------------------


def logits_of(small: Small, prompts: list[dict[str, Any]], options: dict[str, Any], **more: Any) -> list[NDArray[Any]]:
    seen: list[NDArray[Any]] = []
    small.generate(prompts, options, hooks={"logits": seen.append}, **more)
    return seen


def text_only(ids: Any) -> dict[str, Any]:
    return {"features": None, "ids": np.asarray(ids, np.int32), "mask": None, "decoder": None}


@pytest.fixture(scope="module", params=["opt", "mistral"])
def decoder_only(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("prefix"), request.param, seed=63)


@pytest.mark.parametrize("mode", list(MODES))
def test_one_picture_many_questions(decoder_only: Small, mode: str) -> None:
    """A prefix read once gives the bits of reading picture and question in one go."""
    small, options = decoder_only, decoder_only.options(**MODES[mode])
    picture = small.prompts(1, seed=6)[0]
    rng = np.random.default_rng(7)
    beginning = np.concatenate([picture["ids"], rng.integers(4, 59, 30)]).astype(np.int32)
    prefix = small.core.prefill(picture["features"], beginning, beginning)
    assert len(prefix) == len(beginning)
    np.testing.assert_array_equal(prefix.ids, beginning)
    questions = [rng.integers(4, 59, int(rng.integers(1, 9))) for _ in range(5)]
    whole = [{**picture, "ids": np.concatenate([beginning, q]).astype(np.int32)} for q in questions]
    expected = small.generate(whole, options)
    behind = [text_only(q) for q in questions]
    found = small.generate(behind, options, prefixes=[prefix] * 5)
    assert rows(found) == rows(expected)
    assert found["kv_bytes"] == expected["kv_bytes"]
    results, _, _ = stream(small, [as_item(p, prefix, k) for k, p in enumerate(behind)], options, 2)
    assert [row for result in results for row in rows(result)] == rows(expected)
    for k in range(2):
        ours = logits_of(small, behind[k : k + 1], options, prefixes=[prefix])
        for a, b in zip(ours, logits_of(small, whole[k : k + 1], options), strict=True):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_a_prefix_may_go_on_from_a_prefix(opt: Small) -> None:
    picture = opt.prompts(1, seed=8)[0]
    ids = np.concatenate([picture["ids"], np.arange(10, 40)]).astype(np.int32)
    short = opt.core.prefill(picture["features"], ids[:9], ids[:9])
    longer = opt.core.prefill(None, ids[9:25], ids[9:25], prefix=short)
    np.testing.assert_array_equal(longer.rule_ids, ids[:25])
    del short
    expected = logits_of(opt, [{**picture, "ids": ids}], opt.options())
    for a, b in zip(logits_of(opt, [text_only(ids[25:])], opt.options(), prefixes=[longer]), expected, strict=True):
        np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def test_a_beginning_of_a_prefix(decoder_only: Small) -> None:
    """What has been read may be cut where prompts begin to differ."""
    small, options = decoder_only, decoder_only.options()
    picture = small.prompts(1, seed=18)[0]
    ids = np.concatenate([picture["ids"], np.arange(10, 40)]).astype(np.int32)
    prefix = small.core.prefill(picture["features"], ids, ids)
    tail = np.array([50, 51, 52], np.int32)
    for length in (small.queries, 17, len(ids)):
        head = prefix.head(length)
        np.testing.assert_array_equal(head.ids, ids[:length])
        np.testing.assert_array_equal(head.rule_ids, ids[:length])
        expected = logits_of(small, [{**picture, "ids": np.concatenate([ids[:length], tail])}], options)
        for a, b in zip(logits_of(small, [text_only(tail)], options, prefixes=[head]), expected, strict=True):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))
    for length in (0, -1, len(ids) + 1):
        with pytest.raises(ValueError, match=f"length: expected 1 to {len(ids)}, found {length}"):
            prefix.head(length)


def test_rows_with_and_without_a_prefix(opt: Small) -> None:
    """Some rows of a batch begin with a prefix; their rules see what stands in it."""
    a, b = opt.prompts(2, seed=9)
    a["ids"] = np.concatenate([a["ids"], np.arange(4, 50)]).astype(np.int32)
    prefix = opt.core.prefill(a["features"], a["ids"], a["ids"])
    options = opt.options(no_repeat_ngram_size=1, max_new_tokens=5)
    tail = np.arange(50, 53, dtype=np.int32)
    whole = [{**a, "ids": np.concatenate([a["ids"], tail])}, text_only(b["ids"][opt.queries :])]
    expected = [rows(opt.generate([row], options))[0] for row in whole]
    assert rows(opt.generate([text_only(tail), whole[1]], options, prefixes=[prefix, None])) == expected
    forgotten = np.full(len(a["ids"]), -1, np.int32)
    blind = opt.core.prefill(a["features"], a["ids"], forgotten)
    assert rows(opt.generate([text_only(tail)], options, prefixes=[blind])) != expected[:1]


@pytest.mark.parametrize("mode", list(MODES))
def test_a_conversation_goes_on(decoder_only: Small, mode: str) -> None:
    """What has been read and said is kept: the next question goes on from it with the bits of one long prompt."""
    small, options = decoder_only, decoder_only.options(**MODES[mode], eos_ids=[])
    prompts = small.prompts(3, seed=10)
    said = small.generate(prompts, options, keep=True)
    per_prompt = options["num_return_sequences"]
    assert len(said["prefixes"]) == 3 * per_prompt
    for o, (kept, answer) in enumerate(zip(said["prefixes"], said["ids"], strict=True)):
        prompt = prompts[o // per_prompt]
        np.testing.assert_array_equal(kept.ids, np.concatenate([prompt["ids"], answer[:-1]]))
        more = np.array([answer[-1], 30, 31, 32], np.int32)  # the answer's last token has not been read yet
        whole = {**prompt, "ids": np.concatenate([prompt["ids"], answer, [30, 31, 32]]).astype(np.int32)}
        again = small.options()
        expected = logits_of(small, [whole], again)
        for a, b in zip(logits_of(small, [text_only(more)], again, prefixes=[kept]), expected, strict=True):
            np.testing.assert_array_equal(a.view(np.uint32), b.view(np.uint32))


def refuse_steps(*seen: Any) -> None:
    raise AssertionError("the model was asked before it was known that the result can not be kept")


def test_prefixes_that_do_not_fit_are_named(opt: Small, tmp_path_factory: pytest.TempPathFactory) -> None:
    picture = opt.prompts(1, seed=11)[0]
    prefix = opt.core.prefill(picture["features"], picture["ids"], picture["ids"])
    row = text_only([5, 6])
    with pytest.raises(ValueError, match="prefixes: expected 1 entries, found 2"):
        opt.generate([row], opt.options(), prefixes=[prefix, None])
    with pytest.raises(TypeError, match="prefixes: expected a Prefix or None, found int"):
        opt.generate([row], opt.options(), prefixes=[3])
    with pytest.raises(TypeError, match="Prefix"):
        _core.Prefix()
    with pytest.raises(ValueError, match=r"image_features: expected shape \[places, 20\]"):
        opt.core.prefill(picture["features"][:, :3], picture["ids"], picture["ids"])
    with pytest.raises(ValueError, match="row 0: 4 image places in the prompt, expected 0"):
        opt.core.prefill(None, picture["ids"], picture["ids"])
    with pytest.raises(ValueError, match=r"the prompt has 1\d\d tokens, the language model has positions for 160"):
        opt.core.prefill(None, *[np.full(158, 5, np.int32)] * 2, prefix=prefix)
    other = Small(tmp_path_factory.mktemp("other"), "opt", seed=64)
    with pytest.raises(ValueError, match="row 0: prefix: it was made by another model"):
        other.generate([row], other.options(), prefixes=[prefix])
    t5 = Small(tmp_path_factory.mktemp("t5"), "t5", seed=65)
    prompt = t5.prompts(1, seed=12)[0]
    with pytest.raises(_core.UnsupportedError, match="an encoder reads the whole prompt at once"):
        t5.core.prefill(prompt["features"], prompt["ids"], prompt["ids"])
    with pytest.raises(_core.UnsupportedError, match="an encoder reads the whole prompt at once"):
        t5.generate([prompt], t5.options(), keep=True, tap=refuse_steps)
    many = opt.options(do_sample=True, num_return_sequences=2**30, seed=0)
    with pytest.raises(ValueError, match=r"1073741824 x \d+ new ones are too many"):
        opt.generate([picture], many, keep=True)
    masked = opt.prompts(1, seed=13, pads=True)
    with pytest.raises(ValueError, match="a prompt with a mask can not be kept"):
        opt.generate(masked, opt.options(), keep=True, tap=refuse_steps)


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class OddError(Exception):
    pass


def test_streams_that_go_wrong_are_named(opt: Small) -> None:
    prompts, options = opt.prompts(6, seed=14), opt.options()
    expected = rows(opt.generate(prompts, options))

    def run(following: Any = None, done: Any = lambda index, result: None, places: int = 2, longest: int = 40) -> Any:
        items: Iterator[Any] = iter([as_item(prompt) for prompt in prompts])
        return opt.core.generate_stream(following or (lambda wait: next(items)), done, options, places, longest)

    def raising(*_: Any) -> Any:
        raise OddError

    picture, ids = prompts[0]["features"], prompts[0]["ids"]
    with pytest.raises(OddError):
        run(following=raising)
    with pytest.raises(OddError):
        run(done=raising)
    with pytest.raises(ValueError, match="next: returned None where nothing runs"):
        run(following=lambda wait: None)
    with pytest.raises(TypeError, match=r"next: expected a tuple \(image_features, .*\), found list"):
        run(following=lambda wait: [1])
    with pytest.raises(ValueError, match="rule_ids: expected"):
        run(following=lambda wait: (picture, ids, ids[:2], None, None, None, 0))
    with pytest.raises(ValueError, match="mask: expected"):
        run(following=lambda wait: (picture, ids, ids, np.ones(2, np.uint8), None, None, 0))
    with pytest.raises(IndexError, match="row 0: token id 60 is outside the vocabulary"):
        run(
            following=lambda wait: (picture, np.append(ids, np.int32(60)), np.append(ids, ids[:1]), None, None, None, 0)
        )
    with pytest.raises(ValueError, match="decoder_ids: the language model has no encoder"):
        run(following=lambda wait: (picture, ids, ids[:1], None, None, ids[-1:], 0))
    with pytest.raises(ValueError, match=r"prompt 0: \d+ ids and 12 new tokens, there is room for 3 and 12"):
        run(longest=3)
    with pytest.raises(ValueError, match="places: expected 1 to 65536, found 0"):
        run(places=0)
    with pytest.raises(ValueError, match="places: expected 1 to 65536, found 65537"):
        run(places=65537)
    assert rows(opt.generate(prompts, options)) == expected


@pytest.mark.parametrize("most", [2**31, 2**61, 2**62, 2**63 - 1])
def test_more_tokens_than_can_be_counted(opt: Small, most: int) -> None:
    items = iter([as_item(prompt) for prompt in opt.prompts(1, 53)])
    with pytest.raises(MemoryError, match=f"max_new_tokens: {most} tokens"):
        opt.core.generate_stream(
            lambda wait: next(items), lambda index, result: None, opt.options(max_new_tokens=most), 1, 40
        )


def test_a_thread_s_calls_can_be_ended_from_another(opt: Small) -> None:
    prompts, options, began = opt.prompts(1, seed=19), opt.options(eos_ids=[]), threading.Event()
    ended: list[type[BaseException]] = []

    def following(wait: bool) -> tuple[Any, ...]:
        began.set()
        return as_item(prompts[0])

    def for_ever() -> None:
        try:
            opt.core.generate_stream(following, lambda index, result: None, options, 2, 40)
        except BaseException as error:
            ended.append(type(error))

    worker = threading.Thread(target=for_ever)
    worker.start()
    began.wait(10)
    _core.cancel_calls(threading.get_ident())  # another thread: nothing happens
    worker.join(0.05)
    assert worker.is_alive()
    _core.cancel_calls(worker.ident)
    worker.join(0.5)
    assert ended == [KeyboardInterrupt]
    assert opt.generate(prompts, options)["items"] == 1


def test_a_callable_may_use_the_model(opt: Small) -> None:
    """next() encodes pictures with the very model that is generating."""
    prompts, options = opt.prompts(5, seed=15), opt.options()
    expected = [rows(opt.alone(prompt, key, options)) for key, prompt in enumerate(prompts)]
    features = iter(range(5))
    results = {}

    def following(wait: bool) -> tuple[Any, ...]:
        k = next(features)
        picture = opt.core.encode(random_pixels(opt.config, 5, 15)[k : k + 1])[0]
        return as_item({**prompts[k], "features": picture})

    opt.core.generate_stream(following, results.__setitem__, options, 2, 40)
    assert [rows(results[k]) for k in range(5)] == expected


def test_every_failed_allocation_of_a_stream_is_a_memory_error(opt: Small) -> None:
    prompts, options = opt.prompts(4, seed=16), opt.options(num_beams=2, max_new_tokens=3)
    prefix = opt.core.prefill(prompts[0]["features"], prompts[0]["ids"], prompts[0]["ids"])
    items = [as_item(text_only([5, 6, 7 + k]), prefix) for k in range(4)]
    expected, _, _ = stream(opt, items, options, 2)
    for countdown in range(1, 200):
        _core._fail_allocation_after(countdown)
        try:
            found, _, _ = stream(opt, items, options, 2)
            break
        except MemoryError:
            pass
        finally:
            _core._fail_allocation_after(0)
    assert 20 < countdown < 199
    assert [rows(a) for a in found] == [rows(b) for b in expected]
    for countdown in range(1, 200):
        _core._fail_allocation_after(countdown)
        try:
            opt.generate(prompts[:2], options, keep=True)
            break
        except MemoryError:
            pass
        finally:
            _core._fail_allocation_after(0)
    assert 20 < countdown < 199


def test_taps_see_every_step(opt: Small) -> None:
    """Hidden states and attention weights of generation are those of forward() over the finished row."""
    prompt = opt.prompts(1, seed=17)[0]
    seen: list[tuple[str, str, int, NDArray[Any]]] = []
    out = opt.generate([prompt], opt.options(eos_ids=[]), tap=lambda *call: seen.append(call), tap_weights=True)
    ids = np.concatenate([prompt["ids"], out["ids"][0, :-1]]).astype(np.int32)
    offsets = np.array([0, len(ids)])
    whole = opt.core.forward(prompt["features"][None], ids, offsets, hidden_states=True, attentions=True)
    hidden = [array for kind, stage, layer, array in seen if (kind, stage, layer) == ("hidden", "language_model", 1)]
    assert len(hidden) == 12
    np.testing.assert_array_equal(np.concatenate(hidden), whole["hidden_states"][1].reshape(len(ids), -1))
    weights = [array for kind, _, layer, array in seen if kind == "attention" and layer == 1]
    last = weights[-1].reshape(2, 1, len(ids))
    np.testing.assert_allclose(last[:, 0], whole["attentions"][1][0][:, -1], atol=1e-6)

    seen.clear()
    opt.generate([prompt], opt.options(eos_ids=[]), tap=lambda *call: seen.append(call))
    assert {kind for kind, *_ in seen} == {"hidden"}, "weights that nobody asked for"

    def raising(*_: Any) -> None:
        raise OddError

    with pytest.raises(OddError):
        opt.generate([prompt], opt.options(), tap=raising)
    with pytest.raises(TypeError, match="tap: expected a callable"):
        opt.generate([prompt], opt.options(), tap=3)


# -- captioning --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioner(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = random_checkpoint(
        tmp_path_factory.mktemp("captioner"), 5, tokenizer=True, gain=1.6, text={"eos_token_id": 300}
    )
    return blip2c.load(folder)


# The machine that runs the tests may be busy.
SLACK = 5
ENDS = {"eos_token_id": [300, *range(4, 60)], "max_new_tokens": 20}


def flow_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(NAME)]


def test_captioning_keeps_the_batch_full(captioner: Any) -> None:
    pictures, places = [coarse(seed) for seed in range(40)], 4
    alone = [captioner.caption(image, **ENDS) for image in pictures]
    lengths = [len(caption.ids) for caption in alone]
    assert len(set(lengths)) > 3
    flow = Flow(captioner.prompts, captioner.prompts.plan(ENDS), pictures, [(i, None) for i in range(40)], places)
    try:
        found = list(flow.in_order())
    finally:
        flow.close()
    assert [caption.ids for caption in found] == [caption.ids for caption in alone]
    counters = flow.counters
    assert counters["items"] == 40
    assert counters["items_advanced"] == sum(length - 1 for length in lengths)
    # Only the last few run beside empty places.
    assert counters["steps"] * places - counters["items_advanced"] <= (places - 1) * 19
    assert counters["steps"] < sum(max(lengths[i : i + places]) - 1 for i in range(0, 40, places))
    assert flow_threads() == []


def test_results_come_in_order_or_as_they_finish(captioner: Any) -> None:
    pictures = [coarse(seed) for seed in range(12)]
    rows = [(i % 12, prompt) for i, prompt in enumerate([None, "a", "two cats"] * 8)]
    expected = [captioner.caption(pictures[i], prompt, **ENDS).ids for i, prompt in rows]
    for batch in (1, 3, 50):
        assert [c.ids for c in captioner.stream(pictures, rows, batch, **ENDS)] == expected
    numbers, found = zip(*captioner.stream(pictures, rows, 5, as_finished=True, **ENDS), strict=True)
    assert sorted(numbers) == list(range(24))
    assert list(numbers) != list(range(24))
    assert [found[numbers.index(i)].ids for i in range(24)] == expected
    drawn = {"do_sample": True, "seed": 4, "max_new_tokens": 6}
    one = [c.ids for c in captioner.stream(pictures, rows, 1, **drawn)]
    assert one == [c.ids for c in captioner.stream(pictures, rows, 7, **drawn)]
    assert len({str(ids) for ids in one}) > 12


def test_row_errors_beside_captions(captioner: Any, tmp_path: Path) -> None:
    """More bad pictures than are looked ahead, draws of the others not disturbed."""
    (tmp_path / "bad.png").write_bytes(b"no picture")
    options = {"do_sample": True, "seed": 9, "max_new_tokens": 4}
    pictures = [coarse(1), *[tmp_path / "bad.png"] * 90, coarse(2), *[tmp_path / "none.png"] * 3]
    found = captioner.caption(pictures, errors="return", batch_size=2, **options)
    expected = list(captioner.stream([coarse(1), coarse(2)], [(0, None)] * 91 + [(1, None)], 2, **options))
    assert [type(f).__name__ for f in found[1:91]] == ["PictureError"] * 90
    assert [type(f).__name__ for f in found[92:]] == ["FileNotFoundError"] * 3
    assert (found[0].ids, found[91].ids) == (expected[0].ids, expected[91].ids)


def test_a_slow_taker_bounds_what_is_done_ahead(captioner: Any) -> None:
    taken: list[int] = []

    class Counted:
        def __len__(self) -> int:
            return 400

        def __getitem__(self, index: int) -> Any:
            if index >= 400:
                raise IndexError
            taken.append(index)
            return coarse(index % 3)

    results = captioner.stream(Counted(), [(i, None) for i in range(400)], 2, max_new_tokens=2)
    next(results)
    time.sleep(0.3)
    assert max(taken[400:]) < 80  # the first 400 looks ask whether they are states
    results.close()
    assert flow_threads() == []


def test_nothing_is_left_behind(captioner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures, rows = [coarse(0), coarse(1)], [(i % 2, None) for i in range(500)]
    results = captioner.stream(pictures, rows, 2, max_new_tokens=20)
    next(results)
    del results
    gc.collect()
    assert flow_threads() == []
    captioner.stream(pictures, rows)  # never begun
    assert flow_threads() == []

    def raising(*_: Any, **__: Any) -> Any:
        raise OddError

    for name in ("encode", "texts"):
        with monkeypatch.context() as patch:
            patch.setattr(captioner.prompts, name, raising)
            with pytest.raises(OddError):
                captioner.caption(pictures, errors="return")
        assert flow_threads() == []
    assert len(captioner.caption(pictures, max_new_tokens=2)) == 2


def test_closing_does_not_wait_for_what_runs(captioner: Any) -> None:
    options = {"num_beams": 60, "max_new_tokens": 140, "eos_token_id": None, "pad_token_id": 1}
    plan, rows = captioner.prompts.plan(options), [(i, None) for i in range(8)]
    pictures = [coarse(i) for i in range(8)]

    def run(seconds: float | None) -> float:
        flow = Flow(captioner.prompts, plan, pictures, rows, 8)
        try:
            if seconds is None:
                next(flow.in_order())
            else:
                time.sleep(seconds)
        finally:
            start = time.perf_counter()
            flow.close()
        return time.perf_counter() - start

    start = time.perf_counter()
    run(None)
    whole = time.perf_counter() - start
    assert run(0.2 * whole) < 0.3 * whole
    assert flow_threads() == []


INTERRUPTED = """
import os, signal, sys, threading, time
import blip2c
model = blip2c.load()
picture = blip2c.sample_path() / "pictures" / "two.png"
began = threading.Event()
def interrupt():
    began.wait()
    time.sleep(float(sys.argv[1]))
    sent.append(time.perf_counter())
    os.kill(os.getpid(), signal.SIGINT)
sent = []
threading.Thread(target=interrupt, daemon=True).start()
try:
    for number, caption in enumerate(model.stream([picture] * 5000, [(i, None) for i in range(5000)], num_beams=4)):
        began.set()
except KeyboardInterrupt:
    print(time.perf_counter() - sent[0], [t.name for t in threading.enumerate() if t.name.startswith("blip2c")])
print(model.caption(picture))
"""


@pytest.mark.parametrize("after", [0.0, 0.05])
def test_ctrl_c_ends_captioning_at_once(after: float) -> None:
    command = [sys.executable, "-c", INTERRUPTED, str(after)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, **child_process())
    first, second = done.stdout.splitlines()
    assert second == blip2c.load().caption(blip2c.sample_path() / "pictures" / "two.png")
    seconds, threads = first.split(" ", 1)
    assert threads == "[]"
    assert float(seconds) < 0.1 * SLACK


def test_an_unfinished_stream_does_not_hold_up_the_end() -> None:
    code = """
import blip2c
model = blip2c.load()
picture = blip2c.sample_path() / "pictures" / "two.png"
results = model.stream([picture] * 5000, [(i, None) for i in range(5000)], max_new_tokens=9)
print(next(results))
"""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, **child_process())
    assert (done.returncode, done.stderr) == (0, "")
    assert time.perf_counter() - start < 20
