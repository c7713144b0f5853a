"""transformers' own search over models small enough to be driven thousands of times, and random options for it."""

from __future__ import annotations

import warnings
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
    """A second-order Markov chain: float32 logits [V] for each pair of last tokens; some tokens impossible."""

    def __init__(self, rng: np.random.Generator, vocabulary: int, peaks: float, holes: float = 0.0) -> None:
        self.logits = (rng.standard_normal((vocabulary,) * 3) * peaks).astype(np.float32)
        self.logits[rng.random(self.logits.shape) < holes] = -np.inf
        self.logits[..., EOS] += np.float32(rng.normal(0.0, peaks))
        self.calls = 0

    def __call__(self, ids: np.ndarray | list[np.ndarray]) -> np.ndarray:
        self.calls += 1
        if isinstance(ids, np.ndarray):
            return self.logits[ids[:, -2], ids[:, -1]]
        return np.stack([self.logits[row[-2], row[-1]] for row in ids])


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


def transformers_search(model: Any, prompts: np.ndarray, options: dict[str, Any]) -> tuple[np.ndarray, Any]:
    """New tokens int64 [rows, T] and sequences_scores (None in greedy search) of model.generate()."""
    ids = torch.from_numpy(prompts)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
    scores = getattr(out, "sequences_scores", None)
    return out.sequences[:, prompts.shape[1] :].numpy(), None if scores is None else scores.numpy()
