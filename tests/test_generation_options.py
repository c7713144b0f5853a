"""GenerationConfig and core_options against transformers: defaults, who wins, warnings, and what is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from blip2c import _core, generation
from blip2c.generation import DEFAULTS, NAMES, NOT_DONE, NOT_DONE_ARGUMENTS, GenerationConfig, core_options


def resolve(prompt_length: int = 5, config: GenerationConfig | None = None, **kwargs: Any) -> dict[str, Any]:
    return core_options(config or GenerationConfig(), {"max_new_tokens": 4, **kwargs}, [prompt_length])


def test_every_option_of_transformers_is_known() -> None:
    theirs = {name for name in vars(transformers.GenerationConfig()) if not name.startswith("_")}
    assert theirs == set(NAMES)


def test_defaults_are_those_of_transformers() -> None:
    theirs = transformers.GenerationConfig._get_default_generation_params()
    assert {name: theirs[name] for name in DEFAULTS} == DEFAULTS
    off = {name: value for name, value in theirs.items() if value is not None and name not in DEFAULTS}
    assert set(off) <= set(NAMES)


@pytest.mark.parametrize(
    "text_config",
    [
        transformers.OPTConfig(),
        transformers.OPTConfig(eos_token_id=[50118, 2], pad_token_id=None, bos_token_id=7),
        transformers.OPTConfig(num_beams=4, max_length=33, eos_token_id=5),
        transformers.OPTConfig(max_new_tokens=3, min_new_tokens=2, max_time=1.5, renormalize_logits=True),
        transformers.OPTConfig(output_hidden_states=True),
        transformers.T5Config(decoder_start_token_id=0),
        transformers.LlamaConfig(),
    ],
)
def test_from_model_config_takes_what_transformers_takes(text_config: Any) -> None:
    theirs = transformers.GenerationConfig.from_model_config(text_config)
    for given in (text_config, text_config.to_dict()):
        ours = GenerationConfig.from_model_config(given)
        for name in NAMES:
            if not name.startswith("output_") and name != "transformers_version":
                assert getattr(ours, name) == getattr(theirs, name), name


def test_options_in_a_config_json_count_or_are_dropped_as_there() -> None:
    values: dict[str, Any] = {"num_beams": 4, "do_sample": True, "max_length": 33, "min_length": 3}
    values |= {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5, "bad_words_ids": [[5]], "suppress_tokens": [6]}
    values |= {"length_penalty": 2.0, "num_return_sequences": 2, "temperature": 0.5, "forced_eos_token_id": 2}
    values |= {"max_new_tokens": 7, "min_new_tokens": 2, "guidance_scale": 1.5, "eos_token_id": [2, 9]}
    for name, value in values.items():
        theirs = transformers.GenerationConfig.from_model_config(transformers.OPTConfig.from_dict({name: value}))
        ours = GenerationConfig.from_model_config({"model_type": "opt", name: value})
        assert getattr(ours, name) == getattr(theirs, name), name


@pytest.mark.parametrize("name", ["repetition_penalty", "length_penalty"])
def test_a_string_is_no_number(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a number, found '1.5'"):
        resolve(num_beams=2, **{name: "1.5"})


@pytest.mark.parametrize("name", ["to_dict", "validate", "__class__"])
def test_what_has_a_meaning_of_its_own_is_no_option(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is no name for an option"):
        GenerationConfig.from_dict({name: 1})


def test_a_number_beyond_all_floats_is_refused() -> None:
    with pytest.raises(ValueError, match="temperature: expected a number"):
        resolve(do_sample=True, temperature=10**400)


def test_files_go_both_ways(tmp_path: Path) -> None:
    values = {"num_beams": 4, "eos_token_id": [2, 3], "early_stopping": "never", "do_sample": True, "own_entry": [1]}
    ours = GenerationConfig(**values)
    ours.save_pretrained(tmp_path / "a")
    assert GenerationConfig.from_pretrained(tmp_path / "a") == ours
    theirs = transformers.GenerationConfig.from_pretrained(tmp_path / "a")
    theirs.save_pretrained(tmp_path / "b")
    assert GenerationConfig.from_pretrained(tmp_path / "b") == ours
    assert GenerationConfig.from_pretrained(tmp_path / "b", num_beams=2).num_beams == 2
    assert repr(ours) == repr(theirs)
    assert GenerationConfig.from_dict(ours.to_dict()) == ours
    assert json.loads(ours.to_json_string()) == values


def test_damaged_files_are_named(tmp_path: Path) -> None:
    for text in ("{", "[1]", "\udcff", "[" * 100_000, '{"top_k": 3, "top_k": 4}'):
        (tmp_path / "generation_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ValueError, match=r"generation_config\.json: "):
            GenerationConfig.from_pretrained(tmp_path)


def test_update_returns_what_it_does_not_know() -> None:
    config = GenerationConfig(num_beams=2)
    assert config.update(num_beams=3, wrong=1) == {"wrong": 1}
    assert config.num_beams == 3
    with pytest.raises(AttributeError, match="no option 'wrong'"):
        _ = config.wrong


def test_arguments_win_over_the_given_config_over_the_models() -> None:
    model = GenerationConfig(num_beams=2, length_penalty=2.0, eos_token_id=7)
    given = GenerationConfig(num_beams=3, repetition_penalty=1.5)
    with pytest.warns(UserWarning, match="together with generation-related arguments"):
        options = core_options(model, {"generation_config": given, "max_new_tokens": 3, "repetition_penalty": 2.0}, [4])
    assert (options["num_beams"], options["length_penalty"], options["eos_ids"]) == (3, 2.0, [7])
    assert options["repetition_penalty"] == 2.0
    theirs = transformers.GenerationConfig(num_beams=5, max_new_tokens=6)
    assert core_options(model, {"generation_config": theirs}, [4])["num_beams"] == 5


class Recorder(transformers.OPTForCausalLM):
    """Stops generate() where the search would begin and keeps what it was told."""

    def _sample(self, input_ids: torch.Tensor, generation_config: Any, **_: Any) -> Any:
        self.told = generation_config
        return input_ids

    _beam_search = _sample


@pytest.fixture(scope="module")
def recorder() -> Recorder:
    return Recorder(
        transformers.OPTConfig(
            vocab_size=20, hidden_size=8, word_embed_proj_dim=8, ffn_dim=8, num_hidden_layers=1,
            num_attention_heads=1, max_position_embeddings=30,
        )
    )  # fmt: skip


def random_lengths(rng: np.random.Generator) -> dict[str, int]:
    options = {}
    for name, low, high in (
        ("max_length", 3, 40),
        ("max_new_tokens", 1, 30),
        ("min_length", 0, 20),
        ("min_new_tokens", 0, 9),
    ):
        if rng.random() < 0.4:
            options[name] = int(rng.integers(low, high))
    return options


def test_who_wins_among_lengths_and_pads_is_as_in_transformers(recorder: Recorder) -> None:
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(400):
        length = int(rng.integers(1, 33))
        options: dict[str, Any] = random_lengths(rng)
        if rng.random() < 0.5:
            options["eos_token_id"] = [None, 3, [4, 5]][int(rng.integers(3))]
        if rng.random() < 0.5:
            options["pad_token_id"] = [None, 0, 6][int(rng.integers(3))]
        options["num_beams"] = int(rng.integers(1, 3))
        config = GenerationConfig.from_model_config(recorder.config)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                recorder.generate(torch.ones(1, length, dtype=torch.long), **options)
                told = recorder.told
            except ValueError:
                with pytest.raises(ValueError, match="max_length"):
                    core_options(config, options, [length], max_positions=30)
                outcomes.add("refused")
                continue
            ours = core_options(config, options, [length], max_positions=30)
        limits = [ours["max_length"], None if ours["max_new_tokens"] is None else length + ours["max_new_tokens"]]
        assert min(limit for limit in limits if limit is not None) == told.max_length, options
        least = max(ours["min_length"], length + (ours["min_new_tokens"] or 0))
        assert max(least, length) == max(told.min_length, length), options
        eos = told._eos_token_tensor
        assert ours["eos_ids"] == ([] if eos is None else eos.tolist())
        pad = told._pad_token_tensor
        if options["num_beams"] > 1:
            expected = (pad or eos[0]) if eos is not None else -1  # the expression of _beam_search
            assert ours["pad_id"] == int(expected)
        elif pad is not None:
            assert ours["pad_id"] == int(pad)
        outcomes.add("equal")
    assert outcomes == {"equal", "refused"}


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_beams": 0}, "num_beams: expected at least 1"),
        ({"num_beams": 2.5}, "num_beams: expected an integer"),
        ({"num_beams": True}, "num_beams: expected an integer"),
        ({"num_beams": 2, "num_return_sequences": 3}, "`num_return_sequences` \\(3\\) has to be smaller or equal"),
        ({"num_return_sequences": 2}, "Greedy methods .* do not support `num_return_sequences`"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"max_new_tokens": -3}, "max_new_tokens: expected at least 1"),
        ({"max_new_tokens": None, "max_length": 5}, "Input length of input_ids is 5, but `max_length` is set to 5"),
        ({"min_length": -1}, "min_length: expected at least 0"),
        ({"min_new_tokens": -1}, "min_new_tokens: expected at least 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: expected a number above 0"),
        ({"repetition_penalty": -1.2}, "repetition_penalty: expected a number above 0"),
        ({"repetition_penalty": "big"}, "repetition_penalty: expected a number"),
        ({"length_penalty": float("nan")}, "length_penalty: expected a finite number"),
        ({"no_repeat_ngram_size": -2}, "no_repeat_ngram_size: expected at least 0"),
        ({"early_stopping": "always"}, "`early_stopping` must be a boolean or 'never'"),
        ({"early_stopping": 2}, "`early_stopping` must be a boolean or 'never'"),
        ({"bad_words_ids": []}, "`bad_words_ids` has to be a non-empty list"),
        ({"bad_words_ids": [3]}, "`bad_words_ids` has to be a list of non-empty lists"),
        ({"bad_words_ids": [[3], []]}, "`bad_words_ids` has to be a list of non-empty lists"),
        ({"bad_words_ids": [[-3]]}, "bad_words_ids: expected at least 0"),
        ({"bad_words_ids": [["a"]]}, "bad_words_ids: expected an integer"),
        ({"suppress_tokens": 3}, "suppress_tokens: expected a list of integers"),
        ({"suppress_tokens": ["a"]}, "suppress_tokens: expected an integer"),
        ({"eos_token_id": "a"}, "eos_token_id: expected a list of integers"),
        ({"eos_token_id": 1.5}, "eos_token_id: expected an integer"),
        ({"pad_token_id": 2.5}, "pad_token_id: expected an integer"),
        ({"num_baems": 3}, "model_kwargs` are not used by the model: \\['num_baems'\\]"),
    ],
)
def test_wrong_values_are_named(kwargs: dict[str, Any], words: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=words):
            resolve(**kwargs)


@pytest.mark.parametrize("name", [*NOT_DONE, *NOT_DONE_ARGUMENTS])
def test_what_is_not_done_is_refused_by_name_unless_off(name: str) -> None:
    with pytest.raises(_core.UnsupportedError, match=f"^{name}="):
        resolve(**{name: 7})
    if name in NOT_DONE:
        with pytest.raises(_core.UnsupportedError, match=f"^{name}="):
            resolve(config=GenerationConfig(**{name: 7}))
    for value in (None, *{**NOT_DONE, **NOT_DONE_ARGUMENTS}[name]):
        assert resolve(**{name: value}) == resolve()


def issues(call: Any) -> set[str]:
    """Names in "The following generation flags are not valid and may be ignored" that the call warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    texts = [str(w.message) for w in caught if "generation flags are not valid" in str(w.message)]
    return {name for text in texts for name in NAMES if f"'{name}'" in text.split("]")[0]}


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 0.7},
        {"temperature": 1.0, "top_k": 50, "top_p": 1.0},
        {"top_p": 0.9, "do_sample": False},
        {"top_k": 5, "min_p": 0.1, "typical_p": 0.5, "epsilon_cutoff": 0.1, "eta_cutoff": 0.1},
        {"length_penalty": 2.0},
        {"length_penalty": 2.0, "num_beams": 1, "early_stopping": True},
        {"length_penalty": 2.0, "num_beams": 2, "early_stopping": True},
        {"output_scores": True},
    ],
)
def test_ignored_options_warn_as_in_transformers(kwargs: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    logger = transformers.generation.configuration_utils.logger
    monkeypatch.setattr(logger, "warning_once", lambda text, *_: said.append(text))
    transformers.GenerationConfig().update(**kwargs)
    theirs = {name for name in NAMES for text in said if f"'{name}'" in text}
    assert issues(lambda: resolve(**kwargs)) == theirs


def test_an_inherited_option_is_silent_where_the_caller_chose_the_mode() -> None:
    config = GenerationConfig(temperature=0.5)
    assert issues(lambda: resolve(config=config)) == {"temperature"}
    assert issues(lambda: resolve(config=config, do_sample=False)) == set()


def test_encoder_options_and_negative_end_tokens_warn() -> None:
    with pytest.warns(UserWarning, match="`encoder_repetition_penalty` requires some form of `input_ids`"):
        resolve(encoder_repetition_penalty=2.0)
    with pytest.warns(UserWarning, match="should consist of positive integers"):
        assert resolve(eos_token_id=-1)["eos_ids"] == [-1]
    with pytest.warns(UserWarning, match="Unfeasible length constraints: `min_new_tokens`"):
        resolve(min_new_tokens=9)
    with pytest.warns(UserWarning, match="Both `max_new_tokens`"):
        resolve(max_length=30)
    with pytest.warns(UserWarning, match="model-agnostic default"):
        assert core_options(GenerationConfig(), {}, [5])["max_new_tokens"] == 20


def test_tensors_and_arrays_are_taken_for_ids() -> None:
    options = resolve(
        eos_token_id=torch.tensor([2, 3]),
        pad_token_id=np.int64(1),
        suppress_tokens=np.array([4]),
        num_beams=np.int32(2),
    )
    assert (options["eos_ids"], options["pad_id"], options["suppress_ids"]) == ([2, 3], 1, [4])
    assert resolve(eos_token_id=torch.tensor(2))["eos_ids"] == [2]
    assert resolve(eos_token_id=2, bad_words_ids=[[2], [3, 4]])["bad_words"] == [[3, 4]]


def test_end_tokens_are_not_forbidden_as_upstream() -> None:
    """transformers drops end tokens from bad_words_ids; where nothing else is there, it is worth a word."""
    config = GenerationConfig(eos_token_id=[2, 7], max_new_tokens=3)
    with pytest.warns(UserWarning, match=r"bad_words_ids: \[\[7\], \[2\]\] are end tokens"):
        assert core_options(config, {"bad_words_ids": [[7], [2]]}, [4])["bad_words"] == []
    assert core_options(config, {"bad_words_ids": [[7], [5]]}, [4])["bad_words"] == [[5]]


def test_every_option_stands_in_the_documentation() -> None:
    text = (Path(__file__).parent.parent / "docs" / "GENERATION.md").read_text()
    names = (*generation.NAMES, *generation.ARGUMENTS, *generation.NOT_DONE_ARGUMENTS, *generation.INERT_ARGUMENTS)
    assert [name for name in names if f"`{name}`" not in text] == []
