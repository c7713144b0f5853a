"""caption(), ask(), pipelines and streams take generate()'s options: what each picture gets is what generate() says."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import blip2c
from blip2c import Caption, Captions, UnsupportedError
from helpers import random_checkpoint

FAMILIES = {"opt": ("opt", False), "t5": ("t5", False), "instruct-llama": ("llama", True)}
PROMPT = "a small"


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8)).resize((40, 40), Image.Resampling.NEAREST)


PICTURES = [picture(seed) for seed in range(4)]


@pytest.fixture(scope="module", params=list(FAMILIES))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    family, instruct = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(family)
    # No end token that is ever said: what stops a text is the option.
    text = {"eos_token_id": 5}
    return blip2c.load(
        random_checkpoint(folder, 31, family=family, instruct=instruct, tokenizer=True, gain=1.6, text=text)
    )


def generated(model: Any, image: Any, **options: Any) -> list[str]:
    """generate()'s own words on one picture."""
    inputs = model.processor(images=image, text=PROMPT, return_tensors="np")
    sequences = model.model.generate(**inputs, **options)
    begin = 1 if model.model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    texts = model.processor.batch_decode(sequences[:, begin:], skip_special_tokens=True)
    return [text.strip() for text in texts]


def wave(ids: Any, scores: Any) -> Any:
    """A processor whose work depends on how long the row is and on its last token."""
    turn = 5 * np.sin(np.arange(scores.shape[-1]) * (ids.shape[1] + ids[:, -1:] % 7 + 1))
    return (scores + turn).astype(np.float32)


class Tensors(transformers.LogitsProcessor):
    """A processor of one's own over transformers' class, written for tensors."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert isinstance(input_ids, torch.Tensor)
        return scores.masked_fill(torch.arange(scores.shape[-1]) % 3 == input_ids.shape[1] % 3, -float("inf"))


def short(ids: Any, scores: Any) -> Any:
    return np.full(len(ids), ids.shape[1] % 11 == 0)


CHOICES: list[dict[str, Any]] = [
    {"logits_processor": [wave]},
    {"logits_processor": [wave], "num_beams": 3},
    {"logits_processor": transformers.LogitsProcessorList([Tensors()])},
    {"stopping_criteria": [short]},
    {"stopping_criteria": transformers.StoppingCriteriaList([transformers.MaxLengthCriteria(9)])},
    {"prefix_allowed_tokens_fn": lambda row, ids: [int(ids[-1]) // 2 + 9, 40 + len(ids)]},
    {"max_time": 0.0},
    {"num_beams": 3, "num_return_sequences": 2},
    {"num_beams": 2, "num_return_sequences": 2, "logits_processor": [wave]},
    {"do_sample": True, "num_return_sequences": 3, "seed": 4},
    {"do_sample": True, "num_return_sequences": 2, "seed": 4, "logits_processor": [wave]},
    {"generation_config": blip2c.GenerationConfig(max_new_tokens=7, num_beams=2, num_return_sequences=2)},
    {"generation_config": transformers.GenerationConfig(max_new_tokens=4, do_sample=False)},
]


def named(options: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" if isinstance(value, int | float) else name for name, value in options.items())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", CHOICES, ids=named)
def test_captions_are_what_generate_says(model: Any, options: dict[str, Any]) -> None:
    length = {} if "generation_config" in options else {"max_new_tokens": 12}
    want = [generated(model, image, **length, **options) for image in PICTURES[:1]]
    found = model.caption(PICTURES, PROMPT, batch_size=2, **length, **options)
    plain = model.caption(PICTURES, PROMPT, max_new_tokens=12)
    if len(want[0]) == 1:
        assert all(isinstance(caption, Caption) for caption in found)
        # Draws go by the number of the row, so only the first is the same alone.
        want += [generated(model, image, **length, **options) for image in PICTURES[1:]]
        assert found == [row[0] for row in want]
        assert found != plain
    else:
        assert all(isinstance(captions, Captions) for captions in found)
        assert found[0] == want[0]
        assert str(found).count("picture 3: ") == len(want[0])
    asked = model.ask(PICTURES[0], [PROMPT, "two green", PROMPT], "{}", **length, **options)
    assert asked[0] == (want[0] if len(want[0]) > 1 else want[0][0])
    if not options.get("do_sample"):
        assert asked[2] == asked[0]
    one = model.caption(model.encode(PICTURES[0]), PROMPT, **length, **options)
    assert one == asked[0]
    assert isinstance(one, Captions if len(want[0]) > 1 else Caption)


@pytest.mark.filterwarnings("ignore")
def test_stop_strings_need_no_tokenizer(model: Any) -> None:
    tokenizer, plain = model.processor.tokenizer, model.caption(PICTURES, PROMPT, max_new_tokens=12)
    stop = next(letter for letter in "".join(plain) if letter.isascii() and letter.isalnum())
    found = model.caption(PICTURES, PROMPT, max_new_tokens=12, stop_strings=stop)
    for image, caption, before in zip(PICTURES, found, plain, strict=True):
        pieces = [tokenizer.decode(before.ids[:n], skip_special_tokens=True) for n in range(1, 13)]
        length = next((n for n, said in enumerate(pieces, 1) if stop in said), 12)
        assert caption.ids == before.ids[:length]
        assert model.chat(image, "{}", max_new_tokens=12, stop_strings=stop).ask(PROMPT) == caption
    assert any(caption.ids != before.ids for caption, before in zip(found, plain, strict=True))


class Heard:
    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = 0

    def put(self, ids: Any) -> None:
        self.tokens.extend(np.asarray(ids).reshape(-1).tolist())

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_hears_one_text(model: Any) -> None:
    heard = Heard()
    caption = model.caption(PICTURES[1], PROMPT, max_new_tokens=6, streamer=heard)
    assert heard.tokens[-6:] == caption.ids == model.caption(PICTURES[1], PROMPT, max_new_tokens=6).ids
    assert heard.ended == 1
    with pytest.raises(ValueError, match="streamer: it takes one text, 4 were asked for"):
        model.caption(PICTURES, streamer=Heard(), max_new_tokens=3)
    with pytest.raises(ValueError, match="`streamer` cannot be used with beam search"):
        model.caption(PICTURES[0], PROMPT, streamer=Heard(), num_beams=2, max_new_tokens=3)


@pytest.mark.filterwarnings("ignore:The following generation flags")
def test_what_gives_no_words_is_refused_by_name(model: Any) -> None:
    for name in ("return_dict_in_generate", "output_scores", "output_hidden_states"):
        with pytest.raises(UnsupportedError, match=rf"{name}=True: this gives words; use the generate\(\)"):
            model.caption(PICTURES[0], PROMPT, **{name: True})
        with pytest.raises(UnsupportedError, match=name):
            model.chat(PICTURES[0]).ask("why?", **{name: True})
    with pytest.raises(ValueError, match="num_return_sequences=2: a chat has one answer"):
        model.chat(PICTURES[0]).ask("why?", num_beams=2, num_return_sequences=2)


def test_callables_that_raise_leave_the_model_usable(model: Any) -> None:
    class OddError(Exception):
        pass

    def odd(ids: Any, scores: Any) -> Any:
        raise OddError("from within")

    plain = model.caption(PICTURES, PROMPT, max_new_tokens=5)
    threads = threading.active_count()
    for errors in ("raise", "return"):
        with pytest.raises(OddError, match="from within"):
            model.caption(PICTURES, PROMPT, max_new_tokens=5, errors=errors, logits_processor=[odd])
    with pytest.raises(ValueError, match=r"returned float32 \[1, 7\], expected floats \[1, 320\]"):
        model.caption(PICTURES, PROMPT, logits_processor=[lambda ids, scores: scores[:, :7]])
    assert threading.active_count() == threads
    assert model.caption(PICTURES, PROMPT, max_new_tokens=5) == plain


def test_a_bad_picture_beside_others(model: Any, tmp_path: Path) -> None:
    found = model.caption(
        [PICTURES[0], tmp_path / "none.png", PICTURES[1]], PROMPT, errors="return", max_new_tokens=5,
        logits_processor=[wave], num_beams=2, num_return_sequences=2,
    )  # fmt: skip
    assert [type(item).__name__ for item in found] == ["Captions", "FileNotFoundError", "Captions"]
    assert "FileNotFoundError" in str(found).splitlines()[2]


def test_who_lets_go_of_a_stream_is_not_kept_waiting(model: Any) -> None:
    calls: list[int] = []

    def slow(ids: Any, scores: Any) -> Any:
        calls.append(1)
        time.sleep(0.005)
        return scores

    rows = [(i % 4, PROMPT) for i in range(400)]
    stream = model.stream(PICTURES, rows, 2, max_new_tokens=20, logits_processor=[slow])
    next(stream)
    start = time.perf_counter()
    stream.close()
    assert time.perf_counter() - start < 1.0
    assert len(calls) < 400 * 20


def test_pipelines_return_every_sequence(model: Any) -> None:
    options = {"num_beams": 3, "num_return_sequences": 2}
    captions = blip2c.pipeline("image-to-text", model=model)
    found = captions(PICTURES[:2], prompt=PROMPT, max_new_tokens=6, generate_kwargs=options)
    want = model.caption(PICTURES[:2], PROMPT, max_new_tokens=6, **options)
    assert [[row["generated_text"].strip() for row in rows] for rows in found] == want
    answers = blip2c.pipeline("vqa", model=model)
    rows = answers(PICTURES[0], PROMPT, max_new_tokens=6, generate_kwargs={**options, "logits_processor": [wave]})
    assert [row["answer"] for row in rows] == model.caption(
        PICTURES[0], PROMPT, max_new_tokens=6, logits_processor=[wave], **options
    )


def test_wrong_calls_are_named(model: Any) -> None:
    for row in [(9, None), (-1, None), ("0", None), 0, (0, PROMPT, 1), (True, None)]:
        with pytest.raises(ValueError, match=r"rows: expected .number of one of 4 pictures, prompt., found"):
            model.stream(PICTURES, [row], max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokns"):
        model.chat(PICTURES[0], max_new_tokns=3)
    chat = model.chat(PICTURES[0], max_new_tokens=3)
    for entry in ("x", ("x", 5), ("a", "b", "c")):
        chat.history = [("what?", "that"), entry]
        with pytest.raises(ValueError, match=r"history\[1\]: expected \(question, answer\), found"):
            chat.ask("why?")
    with pytest.raises(TypeError, match="tokenizer: expected a tokenizer, found int"):
        model.caption(PICTURES[0], PROMPT, stop_strings="a", tokenizer=5, max_new_tokens=3)
    found = model.caption(PICTURES[:3], PROMPT, max_new_tokens=3, batch_size=np.int64(2))
    assert found == model.caption(PICTURES[:3], PROMPT, max_new_tokens=3)
    scores = (np.zeros((2, 320), np.float32),)
    for ids, beams, words in (
        ([[3], [320]], None, "sequences: expected 0 to 319, found 3 to 320"),
        ([[3], [-1]], None, "sequences: expected 0 to 319, found -1 to 3"),
        ([[3], [4]], [[0], [2]], "beam_indices: expected 0 to 1, found 0 to 2"),
    ):
        given = None if beams is None else np.array(beams)
        with pytest.raises(ValueError, match=words):
            model.model.compute_transition_scores(np.array(ids), scores, given)
