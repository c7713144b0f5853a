"""Draws have the distribution of torch.multinomial's, and a search shows of itself what transformers' does."""

from __future__ import annotations

from collections import Counter
from itertools import combinations, permutations
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray

from blip2c import _core
from search_helpers import DEAD, EOS, Table, TableModel, random_options, random_prompts, transformers_search

OFF = {
    "max_length": None, "max_new_tokens": 1, "min_length": 0, "min_new_tokens": None, "num_beams": 1,
    "num_return_sequences": 1, "length_penalty": 1.0, "early_stopping": False, "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0, "eos_ids": [], "pad_id": 1, "bad_words": [], "suppress_ids": [], "temperature": 1.0,
    "top_h": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
LOGITS = np.array([0.0, 1.5, -np.inf, 3.0, 2.9, -1.0, 0.3, -30.0, 2.0], np.float32)


def search(step: Any, prompts: Any, hooks: Any = None, **options: Any) -> dict[str, Any]:
    ids = np.asarray(prompts, np.int32)
    offsets = np.arange(len(ids) + 1, dtype=np.int64) * ids.shape[1]
    return _core.search(step, ids.reshape(-1), offsets, {**OFF, **options}, True, hooks)


def always(logits: NDArray[np.float32]) -> Any:
    return lambda ids: np.repeat(logits[None], len(ids), axis=0)


def probabilities(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    e = np.exp(logits.astype(np.float64) - logits.max())
    return e / e.sum()


def chi_square(counts: NDArray[Any], expected: NDArray[np.float64]) -> float:
    """Standard deviations by which the statistic exceeds its mean, over the cells expected at least five times."""
    assert counts[expected < 1e-6].sum() == 0
    cells = expected >= 5
    pooled_counts = np.append(counts[cells], counts[~cells].sum())
    pooled = np.append(expected[cells], expected[~cells].sum() + 1e-9)
    freedom = len(pooled) - 1
    return float((((pooled_counts - pooled) ** 2 / pooled).sum() - freedom) / np.sqrt(2 * freedom))


def philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox 4x32-10 as its authors define it (Salmon et al. 2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def noise(seed: int, item: int, row: int, step: int, tokens: int) -> NDArray[np.float64]:
    halves = [seed & 0xFFFFFFFF, seed >> 32]
    key = philox([item & 0xFFFFFFFF, item >> 32, row, 1], halves)[:2]
    words = [word for block in range(-(-tokens // 4)) for word in philox([block, step, 0, 0], key)][:tokens]
    return -np.log(-np.log((np.array(words, np.float64) + 0.5) * 2.0**-32))


def test_the_generator_is_the_published_one() -> None:
    assert philox([0] * 4, [0] * 2) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]  # Random123's known answers
    assert philox([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2) == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 3, 2**64 - 1])
def test_draws_are_what_their_definition_says(seed: int) -> None:
    """A function of seed, item, row and step alone, so that any program can make the same draws."""
    table = Table(np.random.default_rng(0), 30, 1.0)
    found = search(table, [[3, 4], [5, 6]], do_sample=True, seed=seed, max_new_tokens=6, num_return_sequences=3)
    for o, row in enumerate(found["ids"].tolist()):
        history = [[3, 4], [5, 6]][o // 3]
        for step, token in enumerate(row):
            race = table.row(history).astype(np.float64) + noise(seed, o // 3, o % 3, step, 30)
            assert token == int(race.argmax())
            history = [*history, token]


def test_draws_have_the_distribution_of_the_scores() -> None:
    draws = search(always(LOGITS), [[3]] * 40, do_sample=True, seed=5, num_return_sequences=500, max_new_tokens=2)[
        "ids"
    ]
    p = probabilities(LOGITS)
    assert draws.shape == (20_000, 2)
    for step in range(2):
        assert abs(chi_square(np.bincount(draws[:, step], minlength=9), p * 20_000)) < 4
    pairs = np.bincount(draws[:, 0] * 9 + draws[:, 1], minlength=81)
    assert abs(chi_square(pairs, np.outer(p, p).reshape(-1) * 20_000)) < 4  # steps do not depend on each other
    neighbours = np.bincount(draws[:-1, 0] * 9 + draws[1:, 0], minlength=81)
    assert abs(chi_square(neighbours, np.outer(p, p).reshape(-1) * 19_999)) < 4  # nor do rows
    warm = search(always(LOGITS), [[3]] * 40, do_sample=True, seed=5, num_return_sequences=500, temperature=2.0)["ids"]
    assert abs(chi_square(np.bincount(warm[:, 0], minlength=9), probabilities(LOGITS / 2) * 20_000)) < 4
    assert abs(chi_square(np.bincount(warm[:, 0], minlength=9), p * 20_000)) > 20  # the test can fail


def test_beam_sampling_draws_without_replacement() -> None:
    """Of 2 beams the first 2 of 4 candidates, drawn one after another from softmax(scores), end at the limit of one
    token; transformers on torch's draws agrees with the same expectation."""
    logits, p, n = LOGITS, probabilities(LOGITS), 4000
    options = {"num_beams": 2, "num_return_sequences": 2, "do_sample": True}
    ours = search(always(logits), [[3]] * n, **options, seed=9)["ids"].reshape(n, 2)
    torch.manual_seed(9)
    theirs = transformers_search(
        TableModel(always(logits)), np.full((n, 1), 3), {**options, "max_new_tokens": 1, "top_k": 0}
    ).sequences[:, 1].reshape(n, 2)  # fmt: skip
    sets = list(combinations(range(9), 2))
    likely = np.array([sum(p[a] * p[b] / (1 - p[a]) for a, b in permutations(pair)) for pair in sets])
    for name, draws in (("ours", ours), ("theirs", theirs.numpy())):
        seen = Counter(tuple(sorted(row)) for row in draws.tolist())
        assert sum(seen[pair] for pair in sets) == n, name  # never the same token twice
        assert abs(chi_square(np.array([seen[pair] for pair in sets]), likely * n)) < 4, name


def test_seeds_and_keys() -> None:
    table = Table(np.random.default_rng(1), 30, 1.0)
    options = {"do_sample": True, "max_new_tokens": 8}
    first = search(table, [[3, 4]] * 3, **options, seed=1)["ids"]
    assert np.array_equal(first, search(table, [[3, 4]] * 3, **options, seed=1)["ids"])
    assert len({row.tobytes() for row in first}) == 3
    assert not np.array_equal(first, search(table, [[3, 4]] * 3, **options, seed=2)["ids"])
    assert np.array_equal(first[:2], search(table, [[3, 4], [3, 4], [5, 6]], **options, seed=1)["ids"][:2])


def test_nothing_to_draw_from_is_said() -> None:
    nothing = np.full(5, -np.inf, np.float32)
    for beams in (1, 2):
        with pytest.raises(ValueError, match="row 0 at step 0: every token is forbidden"):
            search(always(nothing), [[3]], do_sample=True, seed=1, num_beams=beams)


def test_return_sequences_need_beams_or_draws() -> None:
    with pytest.raises(ValueError, match=r"num_return_sequences \(3\) must not exceed num_beams \(1\)"):
        search(always(LOGITS), [[3]], num_return_sequences=3)


# -- what callables and records see ------------------------------------------------------------------------------------


class Watch(transformers.LogitsProcessor):
    """Every call's ids and scores; adds a little to one token, so that it matters."""

    def __init__(self) -> None:
        self.calls: list[tuple[NDArray[Any], NDArray[Any]]] = []

    def change(self, ids: NDArray[Any], scores: NDArray[np.float32]) -> NDArray[np.float32]:
        self.calls.append((ids, scores.copy()))
        scores = scores.copy()
        scores[:, 3 % scores.shape[1]] += np.float32(0.5) * ids.shape[1]
        return scores

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.change(input_ids.numpy(), scores.numpy()))


class Ends(transformers.StoppingCriteria):
    """Ends rows whose last token is divisible by five, once they have three ids."""

    def __init__(self) -> None:
        self.calls: list[NDArray[Any]] = []

    def flags(self, ids: NDArray[Any]) -> NDArray[Any]:
        self.calls.append(ids.copy())
        return (ids[:, -1] % 5 == 0) & (ids.shape[1] > 4)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.from_numpy(self.flags(input_ids.numpy()))


def core_options(options: dict[str, Any]) -> dict[str, Any]:
    """Options of random_options() as C takes them, for prompts of one length."""
    eos = options.get("eos_token_id")
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    pad = options.get("pad_token_id")
    beams = options.get("num_beams", 1)
    pad = (pad or ends[0] if ends else -1) if beams > 1 else pad if pad is not None else ends[0] if ends else -1
    names = [
        "max_length", "num_beams", "num_return_sequences", "length_penalty", "early_stopping", "repetition_penalty",
        "no_repeat_ngram_size", "min_length", "min_new_tokens",
    ]  # fmt: skip
    words = [w for w in options.get("bad_words_ids", []) if not (len(w) == 1 and w[0] in ends)]
    return {
        **{name: options[name] for name in names if name in options},
        "max_new_tokens": options.get("max_new_tokens"),
        "eos_ids": ends,
        "pad_id": pad,
        "bad_words": words,
        "suppress_ids": options.get("suppress_tokens", []),
    }


def prompt_rows(prompts: NDArray[Any], rows: int) -> NDArray[Any]:
    return np.repeat(prompts, rows // len(prompts), axis=0)


@pytest.mark.parametrize("beams", [False, True])
@pytest.mark.parametrize("called", [False, True])
def test_records_and_callables_see_what_transformers_shows_them(beams: bool, called: bool) -> None:
    """scores, logits, beam_indices, sequences_scores, and every argument of processors and stopping criteria: rows that
    have ended included, step by step."""
    rng, compared = np.random.default_rng(20 + beams), Counter[str]()
    for _ in range(60):
        vocabulary = int(rng.integers(8, 30))
        table = Table(rng, vocabulary, 2.0)
        prompts = random_prompts(rng, vocabulary, int(rng.integers(1, 4)), 3)
        options = random_options(rng, vocabulary, 3, beams)
        watch, ends = Watch(), Ends()
        more = {"logits_processor": [watch], "stopping_criteria": [ends]} if called else {}
        theirs = transformers_search(TableModel(table), prompts, {**options, "output_logits": True, **more})
        mine, my_ends, logits, scores = Watch(), Ends(), [], []
        hooks: dict[str, Any] = {"logits": logits.append, "scores": scores.append}
        c_options = core_options(options)

        def whole(ids: NDArray[Any], prompts: NDArray[Any] = prompts) -> NDArray[Any]:
            return np.concatenate([prompt_rows(prompts, len(ids)), ids], axis=1)

        if called:  # a processor takes the place of all rules: ours applies them as the wrappers in Python do

            def process(ids: NDArray[Any], raw: NDArray[Any], mine: Watch = mine, o: Any = c_options) -> NDArray[Any]:
                ids = whole(ids)
                ruled = _core.apply_rules(
                    raw, ids.astype(np.int32), 3, None, {**OFF, **o}, _core.RULES[0], "logits_processor"
                )
                return mine.change(ids, ruled)

            hooks |= {"process": process, "stop": lambda ids, my_ends=my_ends: my_ends.flags(whole(ids))}
        try:
            ours = search(table, prompts, hooks, **c_options)
        except ValueError as error:
            if "every token is forbidden" not in str(error):
                raise
            compared["forbidden"] += 1
            continue
        ids = theirs.sequences[:, 3:].numpy()
        if ours["ids"].shape != ids.shape or not np.array_equal(ours["ids"], ids):
            compared["other tokens"] += 1
            continue
        compared["same tokens"] += 1
        assert len(scores) == len(theirs.scores)
        for kind, a, b in (("scores", scores, theirs.scores), ("logits", logits, theirs.logits)):
            for x, y in zip(a, b, strict=True):
                np.testing.assert_allclose(x, y.numpy(), rtol=1e-5, atol=2e-5, err_msg=kind)
        if beams:
            np.testing.assert_array_equal(ours["beam_indices"], theirs.beam_indices.numpy())
            np.testing.assert_allclose(ours["scores"], theirs.sequences_scores.numpy(), rtol=1e-5, atol=1e-4)
            compared["real beams"] += bool(ours["scores"].min() > DEAD)
        compared["several steps"] += len(scores) > 2
        compared["rows behind their end"] += bool((ours["lengths"] < len(scores)).any())
        for (a, x), (b, y) in zip(mine.calls, watch.calls, strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-5)
        for a, b in zip(my_ends.calls, ends.calls, strict=True):
            np.testing.assert_array_equal(a, b)
    assert compared["other tokens"] <= 1
    assert compared["several steps"] > 25
    assert compared["rows behind their end"] > 5


def test_hooks_change_nothing_by_looking() -> None:
    table = Table(np.random.default_rng(3), 20, 2.0)
    put: list[Any] = []
    for beams in (1, 3):
        options = {"num_beams": beams, "max_new_tokens": 9, "eos_ids": [EOS, 7], "repetition_penalty": 1.2}
        plain = search(table, [[3, 4], [5, 6], [8, 9]], **options)
        seen = search(table, [[3, 4], [5, 6], [8, 9]], {"put": put.append}, **options)
        assert np.array_equal(plain["ids"], seen["ids"])
        assert np.array_equal(plain["scores"], seen["scores"])
        if beams == 1:
            np.testing.assert_array_equal(np.stack(put, axis=1), plain["ids"])


def test_hooks_need_prompts_of_one_length() -> None:
    table = Table(np.random.default_rng(4), 20, 2.0)
    ids, offsets = np.array([3, 4, 5, 6, 7], np.int32), np.array([0, 2, 5])
    with pytest.raises(ValueError, match="need prompts of one length; row 1 has 3 ids, row 0 has 2"):
        _core.search(table, ids, offsets, OFF, False, {"put": print})
    with pytest.raises(ValueError, match="pad_token_id: rows that have ended go on with it, and -1 is outside"):
        search(table, [[3, 4]], {"put": print}, eos_ids=[2], pad_id=-1)
