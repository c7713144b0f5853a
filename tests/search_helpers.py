"""transformers' own search over models small enough to be driven thousands of times, and random options for it."""

from __future__ import annotations

import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers
from transformers.modeling_outputs import CausalLMOutput

DEAD = -1e8  # below it a score is one of upstream's -1e9, not a sum of log-probabilities
EOS, PAD = 2, 1


class TableConfig(transformers.PretrainedConfig):
    model_type = "blip2c-test-table"


class TableModel(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Logits are a function of the ids alone, so that the same function can be given to blip2c."""

    config_class = TableConfig
    main_input_name = "input_ids"

    def __init__(self, function: Any) -> None:
        super().__init__(TableConfig())
        self.function = function
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> CausalLMOutput:
        logits = torch.from_numpy(self.function(input_ids.numpy()))
        return CausalLMOutput(logits=logits[:, None, :])

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": input_ids}


class Table:
    """Float32 logits [V] for each pair of last tokens, with a little of the position so that the same steps in another
    order do not add up to the same score. A share of the tokens is impossible, never all of them."""

    def __init__(self, rng: np.random.Generator, vocabulary: int, peaks: float, holes: float = 0.0) -> None:
        self.logits = (rng.standard_normal((vocabulary,) * 3) * peaks).astype(np.float32)
        self.logits[..., EOS] += np.float32(rng.normal(0.0, peaks))
        self.position = rng.standard_normal((64, vocabulary)).astype(np.float32)
        hidden = rng.random(self.logits.shape) < holes
        hidden[..., 0] = False
        self.logits[hidden] = -np.inf
        self.calls = 0

    def row(self, ids: Any) -> np.ndarray:
        return self.logits[ids[-2], ids[-1]] + self.position[len(ids) % 64]

    def __call__(self, ids: np.ndarray | list[np.ndarray]) -> np.ndarray:
        self.calls += 1
        return np.stack([self.row(row) for row in ids])


def random_options(rng: np.random.Generator, vocabulary: int, prompt_length: int, beams: bool) -> dict[str, Any]:
    """Options of one call; most rules are off in most calls, so that each is seen alone and in company."""

    def sometimes(share: float) -> bool:
        return bool(rng.random() < share)

    def ids(low: int, high: int) -> list[int]:
        return rng.integers(0, vocabulary, int(rng.integers(low, high))).tolist()

    new = int(rng.integers(1, 13))
    options: dict[str, Any] = {"max_new_tokens": new} if sometimes(0.7) else {"max_length": prompt_length + new}
    options["eos_token_id"] = EOS if sometimes(0.6) else (sorted({EOS, *ids(1, 3)}) if sometimes(0.7) else None)
    options["pad_token_id"] = [None, 0, PAD, EOS][int(rng.integers(4))]
    if sometimes(0.3):
        options["repetition_penalty"] = float(rng.choice([0.5, 0.9, 1.2, 1.7, 5.0]))
    if sometimes(0.25):
        options["no_repeat_ngram_size"] = int(rng.integers(1, 5))
    if sometimes(0.25):
        words = [ids(1, 4) for _ in range(int(rng.integers(1, 5)))]
        options["bad_words_ids"] = [*words, [EOS], [(EOS + 1) % vocabulary, EOS]]
    if sometimes(0.2):
        options["suppress_tokens"] = ids(0, 4)
    if sometimes(0.2):
        options["min_length"] = prompt_length + int(rng.integers(-1, new + 2))
    elif sometimes(0.2):
        options["min_new_tokens"] = int(rng.integers(0, new + 2))
    if beams:
        options["num_beams"] = int(rng.integers(2, 6))
        options["num_return_sequences"] = int(rng.integers(1, options["num_beams"] + 1))
        options["early_stopping"] = [False, True, "never"][int(rng.integers(3))]
        if sometimes(0.5):
            options["length_penalty"] = float(rng.choice([-1.0, 0.0, 0.6, 2.0, 3.0]))
    return options


def random_prompts(rng: np.random.Generator, vocabulary: int, rows: int, length: int) -> np.ndarray:
    """int64 [rows, length] that end in something else than a pad; pads and repeated ids occur inside."""
    prompts = rng.integers(0, vocabulary, (rows, length))
    if length > 3 and rng.random() < 0.3:
        prompts[0, 1:3] = PAD
    return prompts


def transformers_search(model: Any, prompts: np.ndarray, options: dict[str, Any]) -> Any:
    """What model.generate() returns for int64 prompts [B, t], as an object: sequences, sequences_scores, scores."""
    ids = torch.from_numpy(prompts)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        return model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )


def _rules(scores: np.ndarray, ids: list[int], prompt_length: int, options: dict[str, Any]) -> np.ndarray:
    scores = scores.copy()
    eos = options.get("eos_token_id")
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    penalty, size = options.get("repetition_penalty", 1.0), options.get("no_repeat_ngram_size", 0)
    for i in set(ids):
        scores[i] = scores[i] * penalty if scores[i] < 0 else scores[i] / penalty
    forbidden = list(options.get("suppress_tokens") or [])
    if size:
        tail = ids[len(ids) - size + 1 :]
        forbidden += [ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == tail]
    for word in options.get("bad_words_ids") or []:
        if word not in [[i] for i in ends] and (len(word) == 1 or ids[-len(word) + 1 :] == word[:-1]):
            forbidden.append(word[-1])
    if len(ids) < options.get("min_length", 0) or len(ids) - prompt_length < options.get("min_new_tokens", 0):
        forbidden += ends
    scores[forbidden] = -np.inf
    return scores


def smallest_margin(step: Any, prompt: list[int], options: dict[str, Any]) -> float:
    """How near a search in float64 comes to deciding otherwise: the least distance between neighbours, over all
    decisions of all steps. A difference between two float32 searches is excused below 1e-5 only.

    step(list of id lists) -> float64 logits [n, V]. Written from transformers' definition, independently of the C code.
    """
    eos = options.get("eos_token_id")
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    limit = options["max_new_tokens"] if "max_new_tokens" in options else options["max_length"] - len(prompt)
    count, power = options.get("num_beams", 1), options.get("length_penalty", 1.0)
    early = options.get("early_stopping", False)
    wide = max(2, 1 + len(ends)) * count
    running, slots, margin = [(0.0, list(prompt))], [], np.inf

    def order(items: list[Any], keep: int) -> list[Any]:
        nonlocal margin
        ranked = sorted(items, key=lambda item: -item[0])
        near = [a[0] - b[0] for a, b in pairwise(ranked[: keep + 1])]
        margin = min([margin, *near])
        return ranked[:keep]

    for made in range(1, limit + 1):
        candidates = []
        for (total, ids), logits in zip(running, step([ids for _, ids in running]), strict=True):
            top = logits.max()
            scores = logits if count == 1 else logits - top - np.log(np.exp(logits - top).sum())
            scores = _rules(scores, ids, len(prompt), options)
            candidates += [(total * (count > 1) + s, [*ids, i]) for i, s in enumerate(scores) if s > -np.inf]
        best = order(candidates, wide)
        done = [made == limit or ids[-1] in ends for _, ids in best]
        running = [item for item, over in zip(best, done, strict=True) if not over][:count]
        if not (early is True and len(slots) == count):
            over = [(s / made**power, ids) for (s, ids), d in list(zip(best, done, strict=True))[:count] if d]
            slots = order(slots + over, count)
        if not running or (count == 1 and done[0]) or (early is True and len(slots) == count):
            break
        if count > 1 and len(slots) == count:
            length = limit if early == "never" and power > 0 else made
            gap = running[0][0] / length**power - slots[-1][0]
            margin = min(margin, abs(gap))
            if gap <= 0:
                break
    return float(margin)
