"""Rotary position embeddings: from a config's words to frequencies, as transformers 5.23 computes them.

An element pair j of a head turns by position * frequency[j]; everything below is about the frequencies
(upstream: modeling_rope_utils). All arithmetic is float32 in upstream's order, except that powers are taken in float64
and then rounded, where torch may be one unit in the last place off.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from blip2c._core import CheckpointError, UnsupportedError

DEFAULT_THETA = 10000.0
# Types that carry the length that the model was first trained on.
WITH_ORIGINAL_LENGTH = frozenset({"llama3", "yarn", "longrope"})


class Rope(NamedTuple):
    """frequencies [R / 2] float32, what cosines and sines are multiplied by, and for how many tokens they hold."""

    frequencies: NDArray[np.float32]
    scaling: float
    positions: int | None = None


def standard_parameters(values: dict[str, Any], max_position_embeddings: Any) -> dict[str, Any]:
    """rope_parameters in the form of transformers 5, of a text config's values (the old names are taken out of them).

    The old names are rope_theta and rope_scaling (with "type" for "rope_type"); rope_scaling wins over rope_parameters.
    """
    scaling, parameters = values.pop("rope_scaling", None), values.pop("rope_parameters", None)
    theta, partial = values.pop("rope_theta", DEFAULT_THETA), values.pop("partial_rotary_factor", None)
    chosen = scaling or parameters or {}
    if not isinstance(chosen, Mapping):
        raise CheckpointError(f"config.json: text_config.rope_parameters must be an object, found {chosen!r}")
    result = dict(chosen)
    result.setdefault("rope_theta", theta)
    if partial is not None:
        result.setdefault("partial_rotary_factor", partial)
    result.setdefault("rope_type", result.get("type", "default"))
    if isinstance(result["rope_type"], str) and result["rope_type"] in WITH_ORIGINAL_LENGTH:
        if "original_max_position_embeddings" in values:
            result["original_max_position_embeddings"] = values["original_max_position_embeddings"]
        else:
            result.setdefault("original_max_position_embeddings", max_position_embeddings)
    return result


def rope(parameters: Mapping[str, Any], head_dim: int, max_position_embeddings: int) -> Rope:
    """The frequencies of standard_parameters().

    Raises CheckpointError for a value that is wrong and UnsupportedError for a type that is not computed here.
    """
    kind = parameters.get("rope_type")
    if not isinstance(kind, str) or kind not in TYPES:
        raise UnsupportedError(
            f"config.json: text_config.rope_parameters: rope_type {kind!r} is not computed by this version; known:"
            f" {', '.join(sorted(TYPES))}"
        )
    if parameters.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedError(
            f"config.json: text_config.rope_parameters: partial_rotary_factor {parameters['partial_rotary_factor']!r};"
            " these models turn the whole head"
        )
    if head_dim % 2:
        raise UnsupportedError(f"config.json: text_config.head_dim {head_dim} is odd, rotary positions turn pairs")
    try:
        with np.errstate(all="ignore"):
            found = TYPES[kind](parameters, head_dim, max_position_embeddings)
    except (ArithmeticError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"config.json: text_config.rope_parameters {dict(parameters)}: {error}") from None
    if not np.isfinite(found.frequencies).all() or not math.isfinite(found.scaling):
        raise CheckpointError(f"config.json: text_config.rope_parameters {dict(parameters)} give no finite frequencies")
    return found


def _number(parameters: Mapping[str, Any], name: str, default: float | None = None) -> float:
    """A positive number; where it is absent or null, the default (None: it must be there)."""
    value = parameters.get(name)
    value = default if value is None else value
    if not _is_positive(value):
        raise CheckpointError(
            f"config.json: text_config.rope_parameters.{name} must be a number above 0, found {value!r}"
        )
    return value


def _is_positive(value: Any) -> TypeGuard[float]:
    return not isinstance(value, bool) and isinstance(value, int | float) and 0 < value < 1e300


def _powers(parameters: Mapping[str, Any], dim: int) -> NDArray[np.float32]:
    """theta ^ (2j / dim)"""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    theta = np.float64(_number(parameters, "rope_theta"))
    powers: NDArray[np.float32] = np.power(theta, exponents.astype(np.float64)).astype(np.float32)
    return powers


def _plain(parameters: Mapping[str, Any], dim: int) -> NDArray[np.float32]:
    plain: NDArray[np.float32] = np.float32(1.0) / _powers(parameters, dim)
    return plain


def _default(parameters: Mapping[str, Any], dim: int, length: int) -> Rope:
    return Rope(_plain(parameters, dim), 1.0)


def _linear(parameters: Mapping[str, Any], dim: int, length: int) -> Rope:
    return Rope(_plain(parameters, dim) / np.float32(_number(parameters, "factor")), 1.0)


def _llama3(parameters: Mapping[str, Any], dim: int, length: int) -> Rope:
    """Long waves are stretched by `factor`, short ones stay, those between are blended."""
    plain = _plain(parameters, dim)
    factor, original = _number(parameters, "factor"), _number(parameters, "original_max_position_embeddings")
    low, high = _number(parameters, "low_freq_factor"), _number(parameters, "high_freq_factor")
    if low == high:
        raise CheckpointError(
            f"config.json: text_config.rope_parameters: low_freq_factor and high_freq_factor are {low}"
        )
    waves = np.float32(2 * math.pi) / plain
    stretched = np.where(waves > np.float32(original / low), plain / np.float32(factor), plain)
    smooth = (np.float32(original) / waves - np.float32(low)) / np.float32(high - low)
    blended = (np.float32(1.0) - smooth) * stretched / np.float32(factor) + smooth * stretched
    between = ~(waves < np.float32(original / high)) & ~(waves > np.float32(original / low))
    return Rope(np.where(between, blended, stretched).astype(np.float32), 1.0)


def _yarn_scaling(parameters: Mapping[str, Any], factor: float) -> float:
    def grown(weight: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = parameters.get("attention_factor")
    if given is not None:
        return float(_number(parameters, "attention_factor"))
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return grown(_number(parameters, "mscale")) / grown(_number(parameters, "mscale_all_dim"))
    return grown()


def _yarn(parameters: Mapping[str, Any], dim: int, length: int) -> Rope:
    """YaRN (Peng et al. 2023): a ramp over the dimensions between stretched and plain frequencies."""
    original = _number(parameters, "original_max_position_embeddings")
    factor = _number(parameters, "factor", length / original)
    theta = _number(parameters, "rope_theta")
    if theta == 1.0:
        raise CheckpointError("config.json: text_config.rope_parameters: rope_theta is 1, which yarn can not ramp over")

    def turning(rotations: float) -> float:
        return (dim * math.log(original / (rotations * 2 * math.pi))) / (2 * math.log(theta))

    low = turning(_number(parameters, "beta_fast", 32))
    high = turning(_number(parameters, "beta_slow", 1))
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    powers = _powers(parameters, dim)
    places = np.arange(dim // 2, dtype=np.float32)
    ramp = np.clip((places - np.float32(low)) / np.float32(high - low), 0, 1).astype(np.float32)
    kept = np.float32(1.0) - ramp
    stretched, plain = np.float32(1.0) / (np.float32(factor) * powers), np.float32(1.0) / powers
    frequencies = stretched * (np.float32(1.0) - kept) + plain * kept
    return Rope(frequencies.astype(np.float32), _yarn_scaling(parameters, factor))


def _dynamic(parameters: Mapping[str, Any], dim: int, length: int) -> Rope:
    """Plain up to max_position_embeddings. Beyond, upstream turns all tokens by other frequencies at each length."""
    _number(parameters, "factor")
    return Rope(_plain(parameters, dim), 1.0, length)


def _longrope(parameters: Mapping[str, Any], dim: int, length: int) -> Rope:
    """LongRoPE's short factors, which hold up to the original length (Ding et al. 2024)."""
    original = _number(parameters, "original_max_position_embeddings")
    factor = _number(parameters, "factor", length / original)
    given = parameters.get("attention_factor")
    if given is not None:
        scaling = float(_number(parameters, "attention_factor"))
    else:
        scaling = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if not isinstance(factors, list) or len(factors) != dim // 2 or not all(_is_positive(f) for f in factors):
            raise CheckpointError(
                f"config.json: text_config.rope_parameters.{name} must be a list of {dim // 2} numbers above 0"
            )
    short = np.array(parameters["short_factor"], np.float32)
    return Rope(np.float32(1.0) / (short * _powers(parameters, dim)), scaling, int(original))


TYPES = {
    "default": _default,
    "dynamic": _dynamic,
    "longrope": _longrope,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
