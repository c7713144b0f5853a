"""One picture, many questions; conversations: what the whole prompt given at once would say, nothing computed twice."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import blip2c
from blip2c import Chat, State, UnsupportedError
from helpers import random_checkpoint
from test_api import picture

QUESTIONS = ["how many cats are there?", "what colour is it?", "why?", "what is on the left of it?"]
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"text": {"eos_token_id": 300}},
    "no image token": {"text": {"eos_token_id": 300}, "image_token": False},
    "mistral": {"family": "mistral", "text": {"eos_token_id": 300}},
    "t5": {"family": "t5"},
    "instructblip": {
        "instruct": True,
        "family": "llama",
        "tied": False,
        "text": {"eos_token_id": 300},
        "qformer": {"max_position_embeddings": 160},
    },
}


class Counting:
    """A core whose calls are counted: pictures through the ViT, tokens read before the first new one."""

    def __init__(self, core: Any) -> None:
        self.core, self.pictures, self.tokens, self.steps = core, 0, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.core, name)

    def encode(self, pixels: Any, **options: Any) -> Any:
        self.pictures += len(pixels)
        return self.core.encode(pixels, **options)

    def vision(self, pixels: Any, **options: Any) -> Any:
        self.pictures += len(pixels)
        return self.core.vision(pixels, **options)

    def prefill(self, features: Any, ids: Any, *more: Any) -> Any:
        self.tokens += len(ids)
        return self.core.prefill(features, ids, *more)

    def generate(self, features: Any, ids: Any, *more: Any, **options: Any) -> Any:
        self.tokens += len(ids)
        out = self.core.generate(features, ids, *more, **options)
        self.steps += int(out["lengths"].sum()) - len(out["lengths"])
        return out

    def generate_stream(self, following: Any, *more: Any) -> Any:
        def counted(wait: bool) -> Any:
            item = following(wait)
            self.tokens += 0 if item is None else len(item[1])
            return item

        return self.core.generate_stream(counted, *more)


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    seed = 70 + list(FAMILIES).index(request.param)
    return random_checkpoint(tmp_path_factory.mktemp("states"), seed, tokenizer=True, **FAMILIES[request.param])


@pytest.fixture
def model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    model = blip2c.load(folder)
    monkeypatch.setattr(model.model, "_core", Counting(model.model._core))
    return model


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = blip2c.load()
    monkeypatch.setattr(model.model, "_core", Counting(model.model._core))
    return model


CRAB = blip2c.sample_path() / "pictures" / "left-right.png"


def test_a_state_is_as_good_as_its_picture(model: Any) -> None:
    image = picture(1)
    alone = [model.ask(image, question, max_new_tokens=6) for question in QUESTIONS]
    assert len({str(answer.ids) for answer in alone}) > 1
    caption = model.caption(image, max_new_tokens=6)
    core = model.model._core
    core.pictures = core.tokens = 0
    state = model.encode(image)
    for batch in (8, 2):
        found = model.ask(state, QUESTIONS, max_new_tokens=6, batch_size=batch)
        assert [answer.ids for answer in found] == [answer.ids for answer in alone]
    assert [model.ask(state, q, max_new_tokens=6).ids for q in QUESTIONS] == [a.ids for a in alone]
    assert model.caption(state, max_new_tokens=6).ids == caption.ids
    assert model.caption([state, image, state], max_new_tokens=6)[2].ids == caption.ids
    assert core.pictures == 2
    assert model.caption(model.encode(picture(2)), max_new_tokens=6).ids != caption.ids


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "seed": 3}], ids=str)
def test_states_with_beams_and_draws(model: Any, options: dict[str, Any]) -> None:
    state = model.encode(picture(3))
    rows = [(0, f"Question: {question} Answer:") for question in QUESTIONS]
    apart = list(
        model.stream([picture(3)] * 4, [(i, row[1]) for i, row in enumerate(rows)], max_new_tokens=6, **options)
    )
    together = model.ask(state, QUESTIONS, max_new_tokens=6, **options)
    assert [a.ids for a in together] == [a.ids for a in apart]
    assert len({str(a.ids) for a in apart}) > 1


def test_what_prompts_have_in_common_is_read_once(model: Any) -> None:
    core, queries = model.model._core, model.model.config.num_query_tokens
    state = model.encode(picture(4))
    ids = [list(model.processor.tokenizer(f"Question: {q} Answer:")["input_ids"]) for q in QUESTIONS]
    common = next(k for k in range(99) if len({row[k] for row in ids}) > 1)
    core.tokens = 0
    model.ask(state, QUESTIONS, max_new_tokens=2)
    if model.prompts.keeps_prefixes:
        assert core.tokens == queries + common + sum(len(row) - common for row in ids)
        assert state.tokens_read == queries + common
        model.ask(state, QUESTIONS[0], max_new_tokens=2)
        assert state.tokens_read == queries + common
        core.tokens = 0
        model.ask(picture(4), QUESTIONS, max_new_tokens=2)
        assert core.tokens == queries + common + sum(len(row) - common for row in ids)
    else:
        assert core.tokens == sum(queries + len(row) for row in ids)
        assert state.tokens_read == 0


def test_a_chat_says_what_the_whole_prompt_says(model: Any) -> None:
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "seed": 5}):
        chat = model.chat(picture(5), max_new_tokens=5, **options)
        prompt, answers = "", []
        for question in QUESTIONS[:3]:
            prompt = f"{prompt} Question: {question} Answer:".strip()
            assert chat.prompt(question) == prompt
            answer = chat.ask(question)
            assert answer.ids == model.caption(picture(5), prompt, max_new_tokens=5, **options).ids
            prompt += f" {answer}."
            answers.append(answer)
        assert chat.history == list(zip(QUESTIONS[:3], answers, strict=True))
        assert len(chat) == 3


def test_a_chat_computes_nothing_twice(sample: Any) -> None:
    core = sample.model._core
    questions = ["what is on the left?", "what is on the right?", "what color is the background?", "is there a dog?"]
    expected = sample.processor.tokenizer
    chat = sample.chat(CRAB)
    assert core.pictures == 1
    core.tokens = core.steps = 0
    for question in questions:
        prompt = chat.prompt(question)
        answer = chat.ask(question)
        # All there is has been read or said once; the last token said has not been read, nor has an end token.
        length = 32 + len(expected(prompt)["input_ids"])
        assert core.tokens + core.steps <= length + len(answer.ids) - 1
        assert core.tokens + core.steps >= length + len(answer.ids) - 1 - len(chat)
        assert chat.tokens_read + chat.state.tokens_read == core.tokens
    assert core.pictures == 1
    core.tokens = 0
    assert sample.caption(CRAB, prompt).ids == answer.ids
    assert core.tokens == length
    # What was said may be edited: what is still there is not read again.
    read = chat.tokens_read
    chat.history[2:] = []
    prompt = chat.prompt("how many keys are there?")
    assert chat.ask("how many keys are there?").ids == sample.caption(CRAB, prompt).ids
    assert chat.tokens_read - read < 12
    chat.history.clear()
    assert chat.ask(questions[0]) == sample.ask(CRAB, questions[0]) == "crab"


def test_chats_go_on_from_chats(sample: Any) -> None:
    first = sample.chat(CRAB)
    first.ask("what is on the left?")
    second = sample.chat(first)
    assert second.ask("what is on the right?") == sample.caption(CRAB, first.prompt("what is on the right?"))
    assert (len(first), len(second)) == (1, 2)
    assert str(first) == "what is on the left?\n    crab"
    assert "1 questions" in repr(first)


class Heard:
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, ids: Any) -> None:
        self.ids.extend(np.asarray(ids).reshape(-1).tolist())

    def end(self) -> None:
        self.ids.append(-1)


def test_a_chat_takes_streamers_and_stop_strings(sample: Any) -> None:
    chat, heard = sample.chat(CRAB), Heard()
    answer = chat.ask("what is on the left?", streamer=heard)
    assert heard.ids[-1] == -1
    assert heard.ids[-1 - len(answer.ids) : -1] == answer.ids
    caption = sample.chat(CRAB, "{}").ask("", stop_strings=["to the"], tokenizer=sample.processor.tokenizer)
    assert caption.endswith("to the")
    for option in ({"return_dict_in_generate": True}, {"output_scores": True}):
        with pytest.raises(UnsupportedError, match=next(iter(option))):
            chat.ask("why?", **option)
    with pytest.raises(ValueError, match="num_return_sequences=2"):
        chat.ask("why?", num_beams=2, num_return_sequences=2)
    with pytest.raises(ValueError, match="positions"):
        chat.ask("why? " * 500)
    with pytest.raises(TypeError, match="a question must be a string, found int"):
        chat.ask(3)
    assert len(chat) == 1
    prompt = chat.prompt("what is on the right?")
    assert chat.ask("what is on the right?").ids == sample.caption(CRAB, prompt).ids


def test_states_belong_to_their_model(sample: Any, folder: Path) -> None:
    other, state = blip2c.load(folder), sample.encode(CRAB)
    for call in (other.caption, other.chat, other.encode, lambda s: other.ask(s, ["a", "b"])):
        with pytest.raises(ValueError, match=r"State\(.*left-right.*was made by .*, this model is"):
            call(state)
    assert "left-right.png" in repr(state)
    with pytest.raises(ValueError, match="read-only"):
        state.embeds[0, 0] = 0
    with pytest.raises(TypeError, match="a chat is about one picture"):
        sample.chat([CRAB])


def test_states_and_chats_travel_without_the_model(sample: Any) -> None:
    chat = sample.chat(CRAB)
    chat.ask("what is on the left?")
    state, again = pickle.loads(pickle.dumps((chat.state, chat)))
    assert isinstance(state, State)
    assert isinstance(again, Chat)
    with pytest.raises(ValueError, match="has no model"):
        again.ask("what is on the right?")
    elsewhere = blip2c.load()
    assert elsewhere.ask(state, "what is on the left?") == "crab"
    assert elsewhere.chat(again).ask("what is on the right?") == chat.ask("what is on the right?")
    float16 = blip2c.load(dtype="float16")
    with pytest.raises(ValueError, match="was made by"):
        float16.caption(pickle.loads(pickle.dumps(state)))


def test_states_and_chats_in_threads(model: Any) -> None:
    state = model.encode(picture(6))
    expected = [model.ask(picture(6), question, max_new_tokens=4).ids for question in QUESTIONS]
    chat = model.chat(state, max_new_tokens=3)
    found: dict[int, Any] = {}

    def work(number: int) -> None:
        found[number] = model.ask(state, QUESTIONS[number], max_new_tokens=4).ids
        chat.ask(QUESTIONS[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(4)] == expected
    alone = model.chat(state, max_new_tokens=3)
    for question, answer in chat.history:
        assert alone.ask(question) == answer
    assert sorted(question for question, _ in chat.history) == sorted(QUESTIONS)


def test_lists_of_pictures_are_encoded(model: Any, tmp_path: Path) -> None:
    states = model.encode([picture(seed) for seed in range(6)])
    assert [state.name for state in states] == [f"picture {i}" for i in range(6)]
    expected = model.caption([picture(seed) for seed in range(6)], max_new_tokens=4)
    assert [c.ids for c in model.caption(states, max_new_tokens=4)] == [c.ids for c in expected]
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        model.encode(tmp_path / "none.png")
