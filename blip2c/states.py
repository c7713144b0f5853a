"""One picture, many questions: `State` is an encoded picture, `Chat` a conversation about it.

Neither computes anything twice: the vision encoder runs once a picture, and what the language model has read (the
picture, what prompts have in common, earlier questions and its own answers) is kept as a prefix and gone on from.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blip2c._core import Prefix
from blip2c.captions import Caption
from blip2c.inputs import Floats
from blip2c.prompts import Prompts, shared_beginning

if TYPE_CHECKING:
    from blip2c.api import Captioner

__all__ = ["Chat", "State"]


class State:
    """A picture that a model has looked at, from `model.encode(picture)`: stands wherever a picture can.

    embeds: float32 [Q, D_lm], what the language model reads; of an InstructBLIP, whose Q-Former reads the prompt, too,
    the vision encoder's output [T, Dv]. It is kept where the model was. name: what the picture was called. tokens_read:
    how many tokens of picture and prompts have been read into what is kept.

    May be shared by threads. Pickled without the model; the same checkpoint, loaded elsewhere, takes it. Models that
    keep no prefix (encoder-decoders, InstructBLIP) still run the vision encoder only once.
    """

    def __init__(self, prompts: Prompts | None, encoded: Floats, name: str, identity: Any = None) -> None:
        self._prompts = prompts
        self._identity = _identity(prompts) if prompts is not None else identity
        self._lock = threading.Lock()
        self._prefix: Prefix | None = None
        self._reader: Any = None  # the core that has read it: another one, after .to() or .half(), reads anew
        self.tokens_read = 0
        self.name = name
        self.encoded = encoded
        if isinstance(encoded, np.ndarray):
            encoded.flags.writeable = False

    @property
    def embeds(self) -> NDArray[np.float32]:
        """See above; a copy where the encoded picture lies on a device."""
        return np.asarray(self.encoded)

    def attach(self, prompts: Prompts) -> None:
        """Makes it the model's if it was made by the same checkpoint. Raises ValueError for another's."""
        with self._lock:
            if self._prompts is not None and self._prompts.model._core is prompts.model._core:
                return
            if self._prompts is not None or self._identity != _identity(prompts):
                raise ValueError(
                    f"{self!r} was made by {self._identity[0]} ({self._identity[1]}), this model is"
                    f" {_identity(prompts)[0]} ({_identity(prompts)[1]})"
                )
            self._prompts = prompts

    def prefix_of(self, rows: Sequence[list[int]]) -> Prefix | None:
        """What all prompts begin with, read and kept: the picture and, of several, their common ids but for the last.

        rows: their ids behind the picture. None where the model keeps no prefixes.
        """
        prompts = self._prompts
        if prompts is None or not prompts.keeps_prefixes:
            return None
        shortest = min(len(row) for row in rows) - 1
        wanted = min(shared_beginning(rows), shortest) if len(rows) > 1 else 0
        with self._lock:
            known = 0
            if self._reader is not prompts.model._core:
                self._prefix, self._reader = None, prompts.model._core
            if self._prefix is not None:
                read = self._prefix.ids[prompts.queries :].tolist()
                known = min(shared_beginning([read, *rows]), shortest)
            if self._prefix is None or known < wanted:
                self._read_on(prompts, rows[0][:wanted], known)
                known = wanted
            kept = self._prefix
        return kept if kept is None else kept.head(prompts.queries + known)

    def _read_on(self, prompts: Prompts, ids: Sequence[int], known: int) -> None:
        before = None if self._prefix is None else self._prefix.head(prompts.queries + known)
        new, rules = prompts.behind(ids, 0 if before is None else len(before))
        features = prompts.features(self.encoded, None) if before is None else None
        self._prefix = prompts.model._core.prefill(features, new, rules, before)
        self.tokens_read += len(new)

    def __reduce__(self) -> Any:
        return State, (None, np.array(self.embeds), self.name, self._identity)

    def __repr__(self) -> str:
        return f"State({self.name!r}, {' x '.join(map(str, self.encoded.shape))}, {self._identity[0]!r})"


def _identity(prompts: Prompts) -> tuple[str, str]:
    """What tells models apart whose states would not fit."""
    core = prompts.model._core
    return prompts.model.name_or_path, f"{core.parameters} parameters, {core.policies}"


class Chat:
    """A conversation about one picture, from `model.chat(picture)`.

        chat = model.chat("picture.jpg")
        chat.ask("what is on the left?")
        chat.ask("what colour is it?")        # the first question and its answer stay in the prompt

    The prompt is LAVIS's: "Question: ... Answer: a crab. Question: ... Answer:". Answers are those of the whole prompt
    given at once, but only what is new is read: tokens_read counts it. Encoder-decoders and InstructBLIP read the whole
    prompt each time.

    history: [(question, answer), ...], yours to edit. One timeline: questions from several threads are answered one
    after another. Pickled without the model: `model.chat(chat)` goes on from a chat's history, as a new chat.
    """

    def __init__(
        self,
        captioner: Captioner | None,
        state: State,
        template: str,
        options: dict[str, Any],
        history: Sequence[tuple[str, str]] = (),
    ) -> None:
        self._captioner = captioner
        self._lock = threading.Lock()
        self._prefix: Prefix | None = None
        self._reader: Any = None  # as a State's
        self.state = state
        self.template = template
        self.options = dict(options)
        self.history: list[tuple[str, str]] = list(history)
        self.tokens_read = 0

    def prompt(self, question: str) -> str:
        """The whole prompt with which the next question would be asked."""
        for place, entry in enumerate(self.history):
            if (
                not isinstance(entry, tuple | list)
                or len(entry) != 2
                or not all(isinstance(part, str) for part in entry)
            ):
                raise ValueError(f"history[{place}]: expected (question, answer), found {entry!r}")
        said = [f"{self.template.replace('{}', asked)} {answer}." for asked, answer in self.history]
        return " ".join([*said, self.template.replace("{}", question)])

    def ask(self, question: str, **generate_options: Any) -> Caption:
        """The answer. generate_options: over those of model.chat(), also streamer, stop_strings, callables.

        Raises ValueError where the conversation has become longer than the model has positions; the chat is then as
        before, and so it is after any other error.
        """
        if not isinstance(question, str):
            raise TypeError(f"a question must be a string, found {type(question).__name__}")
        if self._captioner is None:
            raise ValueError("this chat was unpickled and has no model: go on with model.chat(chat)")
        with self._lock:
            answer = self._answer(self._captioner, question, {**self.options, **generate_options})
            self.history.append((question, str(answer)))
        return answer

    def _answer(self, captioner: Captioner, question: str, options: dict[str, Any]) -> Caption:
        prompts, prompt = captioner.prompts, self.prompt(question)
        plan = prompts.plan(options)
        several = plan.options["num_return_sequences"]
        if several != 1:
            raise ValueError(f"num_return_sequences={several}: a chat has one answer a question")
        ids = prompts.ids(prompt, plan)
        prefix = self._known(prompts, ids)
        known = 0 if prefix is None else len(prefix)
        new, rules = prompts.behind(ids, known)
        features = prompts.features(self.state.encoded, prompt) if prefix is None else None
        rules = rules if plan.decoder is None else plan.decoder.ids
        out = prompts.generate(plan, features, new, rules, prefix, keep=prompts.keeps_prefixes)
        self._prefix = out["prefixes"][0] if prompts.keeps_prefixes else None
        self.tokens_read += len(new)
        answer: Caption = prompts.texts(plan, out, self.state.name)
        return answer

    def _known(self, prompts: Prompts, ids: list[int]) -> Prefix | None:
        """As much of the prompt as has been read: of the conversation, or at least the picture."""
        if self._reader is not prompts.model._core:
            self._prefix, self._reader = None, prompts.model._core
        if self._prefix is not None:
            read = self._prefix.ids[prompts.queries :].tolist()
            known = min(shared_beginning([read, ids]), len(ids) - 1)
            return self._prefix.head(prompts.queries + known)
        return self.state.prefix_of([ids])

    def __len__(self) -> int:
        return len(self.history)

    def __reduce__(self) -> Any:
        return Chat, (None, self.state, self.template, self.options, list(self.history))

    def __str__(self) -> str:
        return "\n".join(f"{asked}\n    {answer}" for asked, answer in self.history)

    def __repr__(self) -> str:
        return f"Chat({self.state!r}, {len(self.history)} questions)"
