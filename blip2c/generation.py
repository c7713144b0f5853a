"""Generation options with transformers' names, defaults, warnings and errors.

`GenerationConfig` holds them; `resolve` decides, as transformers 5.23's `GenerationMixin.generate` does, what a call
really asks for, and gives the C part a dict in which nothing is left to guess.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blip2c import options as check
from blip2c._core import UnsupportedError
from blip2c.checkpoint import read_object

__all__ = ["Call", "GenerationConfig", "core_options", "for_search_alone", "resolve"]

FILE_NAME = "generation_config.json"

# What transformers fills in for an option that neither the caller nor the model's configuration sets.
DEFAULTS: dict[str, Any] = {
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "use_cache": True,
    "early_stopping": False,
    "num_beams": 1,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "output_scores": False,
    "return_dict_in_generate": False,
    "remove_invalid_values": False,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
}

# Options that are done here.
DONE = [
    "max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings", "early_stopping",
    "do_sample", "num_beams", "num_return_sequences", "length_penalty", "repetition_penalty", "no_repeat_ngram_size",
    "bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty", "renormalize_logits",
    "guidance_scale", "watermarking_config", "return_dict_in_generate", "pad_token_id", "bos_token_id", "eos_token_id",
    "decoder_start_token_id",
]  # fmt: skip

# They choose among sampled tokens: without do_sample transformers ignores them, with a warning.
SAMPLING = [
    "temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff",
]  # fmt: skip

# They read the encoder's input ids, which BLIP-2 does not have (its pictures enter as embeddings): ignored upstream.
ENCODER_ONLY = {"encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0}

# They choose what generate() returns, and are ignored there unless return_dict_in_generate is set.
EXTRA_OUTPUTS = [
    "output_attentions", "output_hidden_states", "output_scores", "output_logits",
]  # fmt: skip

# They change how transformers computes, not what comes out.
INERT = [
    "use_cache", "max_cache_len", "cache_config", "compile_config", "disable_compile", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "assistant_confidence_threshold", "max_matching_ngram_size",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "continuous_batching_config", "is_assistant", "prefill_chunk_size", "transformers_version",
]  # fmt: skip

# Known to transformers, not done here: the values, beside None, that mean "off".
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "use_mtp": (False,),
    "cache_implementation": ("dynamic",),
    "token_healing": (False,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "low_memory": (False,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "diversity_penalty": (0,),
    "num_beam_groups": (1,),
    "constraints": (),
    "force_words_ids": (),
}
# transformers 5.23 runs these by code from the Hub, or not at all.
DROPPED_UPSTREAM = {
    "penalty_alpha", "dola_layers", "diversity_penalty", "num_beam_groups", "constraints", "force_words_ids",
    "low_memory",
}  # fmt: skip

# Arguments of generate() itself, not of its configuration. `seed` is blip2c's own.
ARGUMENTS = (
    "logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer", "tokenizer", "seed",
    "negative_prompt_ids", "negative_prompt_attention_mask",
)  # fmt: skip
NOT_DONE_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "synced_gpus": (False,),
    "assistant_model": (),
    "assistant_tokenizer": (),
    "custom_generate": (),
}
INERT_ARGUMENTS = ("trust_remote_code",)

NAMES: tuple[str, ...] = (*DONE, *SAMPLING, *ENCODER_ONLY, *EXTRA_OUTPUTS, *INERT, *NOT_DONE)
# Options that transformers 5.23 drops when it reads them in a model's config.json: they were written into every one of
# them before generation had a configuration of its own. Others that stand there count.
DROPPED_FROM_MODELS = frozenset(DEFAULTS) - {"use_cache"} | {
    "bad_words_ids", "suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens",
    "exponential_decay_length_penalty", "return_dict_in_generate", "remove_invalid_values",
}  # fmt: skip
METADATA = ("_from_model_config", "_commit_hash", "_original_object_hash", "transformers_version")


class GenerationConfig:
    """Options of `generate()` under transformers' names; None where unset.

    Every option of transformers' class of this name can be held, saved and loaded, whether or not blip2c does it;
    what it does not do is refused when it is used. Unknown names are kept as well, as transformers keeps them.
    Raises ValueError for values that are wrong whatever the call. (transformers: `generation.GenerationConfig`.)
    """

    def __init__(self, /, **values: Any) -> None:
        for name in NAMES:
            setattr(self, name, values.pop(name, None))
        from_model = values.pop("_from_model_config", None)
        for name in METADATA:
            values.pop(name, None)
        if not from_model:
            for name, value in values.items():
                if name.startswith("__") or callable(getattr(type(self), name, None)):
                    raise ValueError(f"{name} is no name for an option of generate()")
                setattr(self, name, value)
        self.validate()

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"GenerationConfig has no option {name!r}")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GenerationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"GenerationConfig {self.to_json_string()}"

    def validate(self) -> None:
        """Raises ValueError naming the option that is wrong whatever else a call asks for."""
        check.early_stopping(self.early_stopping)
        if self.max_new_tokens is not None:
            check.integer("max_new_tokens", self.max_new_tokens, 1)
        for name in ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "streamer"):
            if name in self.__dict__:
                raise ValueError(
                    f"Argument `{name}` is not a valid argument of `GenerationConfig`. It should be passed to "
                    "`generate()` directly."
                )

    def update(self, **values: Any) -> dict[str, Any]:
        """Sets the options that exist; returns the others."""
        unused = {}
        for name, value in values.items():
            if name in self.__dict__:
                setattr(self, name, value)
            else:
                unused[name] = value
        self.validate()
        return unused

    def to_dict(self) -> dict[str, Any]:
        """Every option, None where unset."""
        return copy.deepcopy({name: value for name, value in self.__dict__.items() if name not in METADATA})

    def to_diff_dict(self) -> dict[str, Any]:
        """The options that are set."""
        return {name: value for name, value in self.to_dict().items() if value is not None or name not in NAMES}

    def to_json_string(self, use_diff: bool = True) -> str:
        """JSON of the options that are set, or of all of them."""
        values = self.to_diff_dict() if use_diff else self.to_dict()
        if isinstance(values.get("sequence_bias"), Mapping):  # JSON's keys are strings
            values["sequence_bias"] = [[list(ids), bias] for ids, bias in values["sequence_bias"].items()]
        return json.dumps(values, indent=2, sort_keys=True) + "\n"

    def to_json_file(self, path: str | os.PathLike[str], use_diff: bool = True) -> None:
        """Writes `to_json_string()`."""
        Path(path).write_text(self.to_json_string(use_diff), encoding="utf-8")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes generation_config.json into `directory`, which is made if need be."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        self.to_json_file(folder / FILE_NAME)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **changes: Any) -> GenerationConfig:
        """`values`, with `changes` on top."""
        return cls(**{**values, **changes})

    @classmethod
    def from_json_file(cls, path: str | os.PathLike[str], **changes: Any) -> GenerationConfig:
        """Reads a file; CheckpointError, a ValueError, if it does not hold a JSON object."""
        return cls.from_dict(read_object(path), **changes)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str], **changes: Any) -> GenerationConfig:
        """Reads generation_config.json from a folder."""
        return cls.from_json_file(Path(directory) / FILE_NAME, **changes)

    @classmethod
    def from_model_config(cls, text_config: Any) -> GenerationConfig:
        """What transformers makes of a language model's configuration: special tokens, and what it does not drop.

        text_config: a mapping, or an object with to_dict(), in which the defaults of its model_type are filled in.
        BLIP-2 generates with the configuration that is made so from `config.text_config`: neither a checkpoint's
        generation_config.json nor what is assigned to the outer model's `generation_config` has an effect upstream.
        """
        values = text_config if isinstance(text_config, Mapping) else text_config.to_dict()
        names = [name for name in NAMES if name not in DROPPED_FROM_MODELS and name not in METADATA]
        options = {name: values[name] for name in names if values.get(name) is not None}
        if any(options.get(name) for name in EXTRA_OUTPUTS):
            options["return_dict_in_generate"] = True
        return cls(**options)


@dataclass(frozen=True)
class Call:
    """What one call of generate() asks for.

    core: the C part's options (csrc/python/py_search.h lists the keys). options: every option of GenerationConfig, None
    where it keeps its default. arguments: the callables and whatever else belongs to the call and not to its options.
    """

    core: dict[str, Any]
    options: dict[str, Any]
    arguments: dict[str, Any]

    @property
    def between_steps(self) -> str | None:
        """The first option that needs Python between the steps of the search; None where C goes on by itself."""
        return next((name for name in BETWEEN_STEPS if self._is_on(name)), None)

    @property
    def outputs(self) -> str | None:
        """The first option that asks for more than ids; None where none does."""
        return next((name for name in ("return_dict_in_generate", *EXTRA_OUTPUTS) if self._is_on(name)), None)

    def _is_on(self, name: str) -> bool:
        value = self[name]
        return value is not None and value is not False and not (isinstance(value, list) and not value)

    def __getitem__(self, name: str) -> Any:
        """An option's or argument's value, its default where it is unset."""
        return self.arguments[name] if name in self.arguments else _or_default(self.options, name)


# They need Python between the steps: blip2c.callables.
BETWEEN_STEPS = (
    "max_time", "stop_strings", "guidance_scale", "watermarking_config", "logits_processor", "stopping_criteria",
    "prefix_allowed_tokens_fn", "streamer",
)  # fmt: skip


def core_options(
    config: GenerationConfig,
    kwargs: Mapping[str, Any],
    prompt_lengths: Sequence[int],
    *,
    max_positions: int | None = None,
) -> dict[str, Any]:
    """`for_search_alone(resolve(...))`: what the C part is to do for a call without Python between the steps."""
    return for_search_alone(resolve(config, kwargs, prompt_lengths, max_positions=max_positions))


def for_search_alone(call: Call) -> dict[str, Any]:
    """`call.core`; UnsupportedError naming what needs a model."""
    name = call.between_steps or ("return_dict_in_generate" if call["return_dict_in_generate"] is True else None)
    if name is not None:
        raise UnsupportedError(f"{name}={call[name]!r}: done by a model's generate() only")
    return call.core


def resolve(
    config: GenerationConfig,
    kwargs: Mapping[str, Any],
    prompt_lengths: Sequence[int],
    *,
    max_positions: int | None = None,
) -> Call:
    """Decides what a call of generate() asks for.

    config: the language model's own configuration. kwargs: what the caller gave to generate() beside the model's
    inputs, `generation_config=` included: its values win over `config`, all other arguments win over both.
    prompt_lengths: decoder tokens of each prompt, image tokens included. max_positions: the language model's
    `max_position_embeddings`, which bounds the default length only, as in transformers.

    Sampling draws from `seed=` (0 to 2**64 - 1, blip2c's own option). Without one the seed comes from torch's default
    generator where torch is loaded, else from NumPy's: a script is reproducible after `torch.manual_seed` (or
    `transformers.set_seed`, or `numpy.random.seed`). The draws themselves are not torch's.

    Raises ValueError naming an option that is unknown, out of range or contradicts another, UnsupportedError
    (a NotImplementedError) naming one that transformers knows and blip2c does not do. Warns where transformers does.
    """
    given_arguments = {name: value for name, value in kwargs.items() if name != "generation_config"}
    _refuse_unknown(given_arguments)
    options = _merge(config, kwargs.get("generation_config"), given_arguments)
    _refuse_not_done(options, given_arguments)
    _warn_of_ignored(options, given_arguments)
    do_sample = check.flag("do_sample", options["do_sample"])
    core = _search_options(options, do_sample)
    core.update(_rule_options(options, core["eos_ids"]))
    core.update(_lengths(options, prompt_lengths, max_positions))
    if do_sample:
        core.update(_sampling_options(options))
        core["seed"] = _seed(given_arguments.get("seed"))
    for name in ("return_dict_in_generate", *EXTRA_OUTPUTS):
        check.flag(name, options[name])
    arguments = {name: given_arguments.get(name) for name in ARGUMENTS}
    return Call(core, options, arguments)


def _search_options(options: Mapping[str, Any], do_sample: bool) -> dict[str, Any]:
    beams = check.integer("num_beams", _or_default(options, "num_beams"), 1)
    eos = check.eos_ids(options["eos_token_id"])
    return {
        "do_sample": do_sample,
        "num_beams": beams,
        "num_return_sequences": check.return_sequences(_or_default(options, "num_return_sequences"), beams, do_sample),
        "length_penalty": check.number("length_penalty", _or_default(options, "length_penalty")),
        "early_stopping": check.early_stopping(_or_default(options, "early_stopping")),
        "eos_ids": eos,
        "pad_id": check.pad_id(options["pad_token_id"], eos, beams),
    }


def _rule_options(options: Mapping[str, Any], eos: list[int]) -> dict[str, Any]:
    suppressed = check.id_list("suppress_tokens", options["suppress_tokens"])
    penalty = _or_default(options, "repetition_penalty")
    ngram = _or_default(options, "no_repeat_ngram_size")
    rules: dict[str, Any] = {
        "repetition_penalty": check.above_zero("repetition_penalty", penalty),
        "no_repeat_ngram_size": check.integer("no_repeat_ngram_size", ngram, 0),
        "bad_words": check.bad_words(options["bad_words_ids"], eos),
        "suppress_ids": suppressed,
        "begin_suppress_ids": check.id_list("begin_suppress_tokens", options["begin_suppress_tokens"]),
        "forced_bos_ids": check.forced_ids("forced_bos_token_id", options["forced_bos_token_id"], suppressed),
        "forced_eos_ids": check.forced_ids("forced_eos_token_id", options["forced_eos_token_id"], suppressed),
        "remove_invalid_values": check.flag("remove_invalid_values", options["remove_invalid_values"]),
        "renormalize_logits": check.flag("renormalize_logits", options["renormalize_logits"]),
    }
    rules.update(check.biased_sequences(options["sequence_bias"]))
    rules.update(check.decay(options["exponential_decay_length_penalty"], eos))
    return rules


def _sampling_options(options: Mapping[str, Any]) -> dict[str, Any]:
    hint = "; for greedy decoding set do_sample=False"
    top_h, min_p = options["top_h"], options["min_p"]
    return {
        "temperature": check.above_zero("temperature", _or_default(options, "temperature"), hint),
        "top_h": 0.0 if top_h is None else check.share("top_h", top_h, 0, 1, ends="(]"),
        "top_k": check.integer("top_k", _or_default(options, "top_k"), 0),
        "top_p": check.share("top_p", _or_default(options, "top_p"), 0, 1, ends="(]"),
        "min_p": 0.0 if min_p is None else check.share("min_p", min_p, 0, 1, ends="[]"),
        "typical_p": check.share("typical_p", _or_default(options, "typical_p"), 0, 1, ends="(]"),
        "epsilon_cutoff": check.share("epsilon_cutoff", _or_default(options, "epsilon_cutoff"), 0, 1, ends="[)"),
        "eta_cutoff": check.share("eta_cutoff", _or_default(options, "eta_cutoff"), 0, 1, ends="[)"),
    }


def _seed(value: Any) -> int:
    if value is not None:
        seed = check.integer("seed", value, 0)
        if seed >= 2**64:
            raise ValueError(f"seed: expected at most 2**64 - 1, found {seed}")
        return seed
    torch = sys.modules.get("torch")
    if torch is not None and hasattr(torch, "randint"):
        return int(torch.randint(0, 2**63 - 1, (1,)).item())
    return int(np.random.randint(0, 2**63 - 1, dtype=np.int64))


def _refuse_unknown(arguments: Mapping[str, Any]) -> None:
    known = {*NAMES, *ARGUMENTS, *NOT_DONE_ARGUMENTS, *INERT_ARGUMENTS}
    unused = [name for name, value in arguments.items() if name not in known and value is not None]
    if unused:
        raise ValueError(
            f"The following `model_kwargs` are not used by the model: {unused} (note: typos in the generate arguments "
            "will also show up in this list)"
        )


def _merge(config: GenerationConfig, given: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """arguments > generation_config > config; what is still None gets its default where it is read."""
    options = {name: getattr(config, name) for name in NAMES}
    if given is not None:
        if not hasattr(given, "to_dict"):
            raise TypeError(f"generation_config: expected a GenerationConfig, found {type(given).__name__}")
        values = {name: getattr(given, name, None) for name in NAMES}
        options.update({name: value for name, value in values.items() if value is not None})
        both = sorted(name for name in arguments if name in NAMES)
        if both:
            warnings.warn(
                f"Passing `generation_config` together with generation-related arguments=({both}) is deprecated in "
                "transformers. Please pass either a `generation_config` object OR all parameters explicitly.",
                stacklevel=6,
            )
    options.update({name: value for name, value in arguments.items() if name in NAMES})
    return options


def _or_default(options: Mapping[str, Any], name: str) -> Any:
    value = options[name]
    return DEFAULTS.get(name) if value is None else value


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    if value is None:
        return True
    try:
        return any(bool(value == item) for item in off)
    except (TypeError, ValueError):  # an array is not "off"
        return False


def _refuse_not_done(options: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    checks = [(name, options[name], off) for name, off in NOT_DONE.items()]
    checks += [(name, arguments.get(name), off) for name, off in NOT_DONE_ARGUMENTS.items()]
    for name, value, off in checks:
        if not _is_off(value, off):
            reason = "blip2c does not do it"
            if name in DROPPED_UPSTREAM:
                reason = "transformers 5.23 has dropped it from its library, and blip2c does not do it"
            raise UnsupportedError(f"{name}={value!r}: transformers knows this option, {reason}")


def _warn_of_ignored(options: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """transformers' "minor issues": options that have no effect in the mode that the others choose."""
    issues = []
    for name in SAMPLING if options["do_sample"] is not True else ():
        if _matters(name, options[name], "do_sample", arguments):
            issues.append((name, f"`do_sample` is not set to `True`. However, `{name}` is set to `{options[name]}`"))
    if _or_default(options, "num_beams") == 1:
        for name in ("early_stopping", "length_penalty"):
            if _matters(name, options[name], "num_beams", arguments):
                issues.append((name, f"`num_beams` is set to 1. However, `{name}` is set to `{options[name]}`"))
    issues += [
        (name, f"`return_dict_in_generate` is NOT set to `True`, but `{name}` is")
        for name in EXTRA_OUTPUTS
        if options[name] is True and options["return_dict_in_generate"] is not True
    ]
    if issues:
        names = [name for name, _ in issues]
        reasons = "; ".join(reason for _, reason in issues)
        warnings.warn(
            f"The following generation flags are not valid and may be ignored: {names}. {reasons}.", stacklevel=6
        )
    for name, off in ENCODER_ONLY.items():
        if options[name] is not None and options[name] != off:
            warnings.warn(
                f"Passing `{name}` requires some form of `input_ids` to be passed to `generate`, "
                "ignoring the argument.",
                stacklevel=6,
            )


def _matters(name: str, value: Any, mode: str, arguments: Mapping[str, Any]) -> bool:
    """Is `name` worth a warning: set away from its default, and not just inherited while the caller chose the mode?"""
    return value is not None and value != DEFAULTS.get(name) and (name in arguments or mode not in arguments)


def _lengths(options: Mapping[str, Any], prompt_lengths: Sequence[int], max_positions: int | None) -> dict[str, Any]:
    """max_new_tokens wins over max_length, min_new_tokens over min_length; without either, 20 new tokens."""
    max_length, max_new = options["max_length"], options["max_new_tokens"]
    min_length, min_new = options["min_length"], options["min_new_tokens"]
    max_length = None if max_length is None else check.integer("max_length", max_length, 0)
    max_new = None if max_new is None else check.integer("max_new_tokens", max_new, 1)
    min_new = None if min_new is None else check.integer("min_new_tokens", min_new, 0)
    if max_new is not None:
        if max_length is not None:
            _warn_both("max_new_tokens", max_new, "max_length", max_length)
            max_length = None
    elif max_length is None:
        max_new, max_length = DEFAULTS["max_length"], max_positions
        warnings.warn(
            f"Using the model-agnostic default `max_length` (={max_new} new tokens) to control the generation length. "
            "We recommend setting `max_new_tokens` to control the maximum length of the generation.",
            stacklevel=6,
        )
    if min_new is not None and min_length is not None:
        _warn_both("min_new_tokens", min_new, "min_length", min_length)
    min_length = check.integer("min_length", min_length, 0) if min_length is not None and min_new is None else 0
    _check_feasible(prompt_lengths, max_length, max_new, min_length, min_new)
    return {"max_length": max_length, "max_new_tokens": max_new, "min_length": min_length, "min_new_tokens": min_new}


def _warn_both(winner: str, winning: int, loser: str, losing: int) -> None:
    warnings.warn(
        f"Both `{winner}` (={winning}) and `{loser}`(={losing}) seem to have been set. "
        f"`{winner}` will take precedence.",
        stacklevel=7,
    )


def _check_feasible(
    prompt_lengths: Sequence[int], max_length: int | None, max_new: int | None, min_length: int, min_new: int | None
) -> None:
    for length in prompt_lengths:
        bounds = [length + max_new if max_new is not None else None, max_length]
        limit = min(bound for bound in bounds if bound is not None)
        if length >= limit:
            raise ValueError(
                f"Input length of input_ids is {length}, but `max_length` is set to {limit}. This can lead to "
                "unexpected behavior. You should consider increasing `max_length` or, better yet, setting "
                "`max_new_tokens`."
            )
        if max(min_length, length + (min_new or 0)) > limit:
            name, value = ("min_new_tokens", min_new) if min_new else ("min_length", min_length)
            warnings.warn(
                f"Unfeasible length constraints: `{name}` ({value}) is larger than the maximum possible length "
                f"({limit}). Generation will stop at the defined maximum length. You should decrease the minimum "
                "length and/or increase the maximum length.",
                stacklevel=7,
            )
            return
