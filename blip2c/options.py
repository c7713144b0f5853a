"""Values of generation options, checked one by one: every function takes what a caller wrote and gives what C reads.

All raise ValueError naming the option, what was found and what was expected. Sources: transformers 5.23's
`GenerationConfig.validate` and the constructors in `generation/logits_process.py`.
"""

from __future__ import annotations

import math
import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "bad_words", "biased_sequences", "decay", "early_stopping", "eos_ids", "flag", "forced_ids", "id_list", "integer",
    "number", "pad_id", "share",
]  # fmt: skip


def integer(name: str, value: Any, low: int) -> int:
    """An int of at least `low`, from anything that is an integer (NumPy's, a tensor of one)."""
    if isinstance(value, bool):
        raise ValueError(f"{name}: expected an integer, found {value!r}")
    try:
        result = operator.index(value)
    except TypeError:
        raise ValueError(f"{name}: expected an integer, found {value!r}") from None
    if result < low:
        raise ValueError(f"{name}: expected at least {low}, found {result}")
    return result


def number(name: str, value: Any) -> float:
    """A finite float."""
    if isinstance(value, str | bytes | bool):
        raise ValueError(f"{name}: expected a number, found {value!r}")
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{name}: expected a number, found {value!r}") from None
    if not math.isfinite(result):
        raise ValueError(f"{name}: expected a finite number, found {value!r}")
    return result


def above_zero(name: str, value: Any, hint: str = "") -> float:
    """A finite float above 0."""
    result = number(name, value)
    if not result > 0:
        raise ValueError(f"{name}: expected a number above 0, found {value!r}{hint}")
    return result


def share(name: str, value: Any, low: float, high: float, *, ends: str) -> float:
    """A float between low and high; `ends` says which of the two belong to it: "[]", "(]" or "[)"."""
    result = number(name, value)
    inside = (result >= low if ends[0] == "[" else result > low) and (
        result <= high if ends[1] == "]" else result < high
    )
    if not inside:
        raise ValueError(f"{name}: expected a number in {ends[0]}{low:g}, {high:g}{ends[1]}, found {value!r}")
    return result


def flag(name: str, value: Any) -> bool:
    """True or False; None is False."""
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ValueError(f"{name}: expected True or False, found {value!r}")


def early_stopping(value: Any) -> Any:
    """True, False, "never" or None."""
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value == "never"):
        return value
    raise ValueError(f"`early_stopping` must be a boolean or 'never', but is {value}.")


def return_sequences(value: Any, beams: int, do_sample: bool) -> int:
    """How many rows a prompt gives: at most one a beam, except when sampling without beams."""
    count = integer("num_return_sequences", value, 1)
    if count > 1 and beams == 1 and not do_sample:
        raise ValueError(
            "Greedy methods (do_sample != True) without beam search do not support `num_return_sequences` different "
            f"than 1 (got {count})."
        )
    if count > beams > 1:
        raise ValueError(f"`num_return_sequences` ({count}) has to be smaller or equal to `num_beams` ({beams}).")
    return count


def id_list(name: str, value: Any) -> list[int]:
    """Ids of any iterable of integers, tensors and arrays included; [] for None."""
    if value is None:
        return []
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"{name}: expected a list of integers, found {value!r}")
    return [integer(name, item, -(2**31)) for item in value]


def one_or_more_ids(name: str, value: Any) -> list[int]:
    """An id or ids; [] for None."""
    if value is None:
        return []
    is_one = not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0
    return [integer(name, value, -(2**31))] if is_one else id_list(name, value)


def forced_ids(name: str, value: Any, suppressed: list[int]) -> list[int]:
    """forced_bos_token_id or forced_eos_token_id. Raises where suppress_tokens forbids all of them."""
    ids = one_or_more_ids(name, value)
    if any(i < 0 for i in ids):
        raise ValueError(f"{name}: expected ids from 0, found {value!r}")
    if ids and set(ids) <= set(suppressed):
        raise ValueError(
            f"Every token in `{name}` ({sorted(set(ids))}) is also in `suppress_tokens`: nothing would be left to say. "
            "Remove the overlapping token(s) from one of them."
        )
    return ids


def eos_ids(value: Any) -> list[int]:
    """eos_token_id; one below 0 never ends a row, which is worth a warning."""
    ids = one_or_more_ids("eos_token_id", value)
    if any(i < 0 for i in ids):
        warnings.warn(
            f"`eos_token_id` should consist of positive integers, but is {value}. Your generation will not stop until "
            "the maximum length is reached.",
            stacklevel=7,
        )
    return ids


def pad_id(value: Any, eos: list[int], beams: int) -> int:
    """What ended rows are filled with. Beam search upstream takes a pad id of 0 for "unset"."""
    pad = None if value is None else integer("pad_token_id", value, -(2**31))
    if beams > 1:
        return (pad or eos[0]) if eos else -1
    if pad is not None:
        return pad
    return eos[0] if eos else -1


def bad_words(value: Any, eos: list[int]) -> list[list[int]]:
    """bad_words_ids without those that are an end token alone: upstream does not forbid them."""
    if value is None:
        return []
    if not isinstance(value, list) or not value:
        raise ValueError(f"`bad_words_ids` has to be a non-empty list, but is {value!r}.")
    if any(not isinstance(word, list) or not word for word in value):
        raise ValueError(f"`bad_words_ids` has to be a list of non-empty lists, but is {value!r}.")
    words = [[integer("bad_words_ids", item, 0) for item in word] for word in value]
    words = [word for word in words if not (len(word) == 1 and word[0] in eos)]
    if not words:
        warnings.warn(f"bad_words_ids: {value!r} are end tokens, which are not forbidden, as upstream", stacklevel=7)
    return words


def biased_sequences(value: Any) -> dict[str, Any]:
    """sequence_bias, a dict {(ids): bias} or a list [[ids], bias], as `biased` and `biases`; {} for None.

    In the order in which upstream adds: single ids, then groups of equal length as they first appear.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping | list) or not value:
        raise ValueError(
            f"`sequence_bias` has to be a non-empty dictionary, or non-empty list of lists but is {value!r}."
        )
    if isinstance(value, Mapping):
        pairs = list(value.items())
        if any(not isinstance(ids, tuple) for ids, _ in pairs):
            raise ValueError(f"`sequence_bias` has to be a dict with tuples as keys, but is {value!r}.")
    else:
        if any(not isinstance(p, list | tuple) or len(p) != 2 or not isinstance(p[0], list | tuple) for p in value):
            raise ValueError(f"Each element in `sequence_bias` has to be [list of integers, float], but is {value!r}.")
        pairs = list({tuple(ids): bias for ids, bias in value}.items())
    sequences = [(_biased_ids(ids), _bias(bias)) for ids, bias in pairs]
    lengths = list(dict.fromkeys([1, *(len(ids) for ids, _ in sequences)]))
    ordered = [pair for length in lengths for pair in sequences if len(pair[0]) == length]
    return {"biased": [ids for ids, _ in ordered], "biases": [bias for _, bias in ordered]}


def _biased_ids(ids: Any) -> list[int]:
    if not ids:
        raise ValueError("sequence_bias: expected sequences of at least one id, found an empty one")
    return [integer("sequence_bias", item, 0) for item in ids]


def _bias(value: Any) -> float:
    if isinstance(value, float) and value == -math.inf:
        return value
    return number("sequence_bias", value)


def decay(value: Any, eos: list[int]) -> dict[str, Any]:
    """exponential_decay_length_penalty (start, factor) as `decay_start` and `decay_factor`; {} for None."""
    name = "exponential_decay_length_penalty"
    if value is None:
        return {}
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name}: expected (start, factor), found {value!r}")
    if not eos or any(i < 0 for i in eos):
        raise ValueError(f"{name}: needs an eos_token_id, of ids from 0 on, found {eos}")
    return {"decay_start": integer(name, value[0], -(2**31)), "decay_factor": number(name, value[1])}
