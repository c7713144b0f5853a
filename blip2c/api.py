"""The friendly spelling: `m = blip2c.load(); m.caption("cat.jpg"); m.ask("cat.jpg", "how many cats are there?")`.

A picture may be a `State` (`m.encode(picture)`), for many questions, and `m.chat(picture)` is a conversation.

Rows of a batch are packed, never padded: a picture gets the same words, to the bit of every score, whatever stands
beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blip2c._core import UnsupportedError
from blip2c.captions import Caption, Captions, picture_name
from blip2c.classes import model_class
from blip2c.flow import GROUP, Flow
from blip2c.forward import Blip2WithQFormer
from blip2c.images import is_picture
from blip2c.instructblip import InstructBlipForConditionalGeneration
from blip2c.modeling import Blip2ForConditionalGeneration
from blip2c.processing import Blip2Processor, InstructBlipProcessor
from blip2c.prompts import ROW_ERRORS, Plan, Prompts, read_pixels
from blip2c.retrieval import Blip2ForImageTextRetrieval
from blip2c.states import Chat, State

if TYPE_CHECKING:
    from blip2c.attention_maps import AttentionMaps

__all__ = ["Caption", "Captioner", "Captions", "load"]

QUESTION = "Question: {} Answer:"
DEFAULT_BATCH = 8
CAPTION_TOKENS, ANSWER_TOKENS = 30, 20
NO_TEXT_SIDE = (
    "this checkpoint writes texts, and can not read them without a picture: load a retrieval checkpoint"
    " (Salesforce/blip2-itm-vit-g or its like, or the small sample-retrieval)"
)


def load(path_or_id: str | os.PathLike[str] | None = None, **options: Any) -> Any:
    """A model with its processor, ready to use. Without path_or_id: the small checkpoint inside the package.

    A Captioner; or a blip2c.Matcher where the checkpoint compares pictures and texts (blip2-itm-vit-g and its like;
    "sample-retrieval" is a small one inside the package).

    options: as in `Blip2ForConditionalGeneration.from_pretrained` (dtype, revision, cache_dir, local_files_only ...).
    """
    from blip2c.hub import pop_hub_options, resolve, sample_path

    hub = pop_hub_options(options)
    folder = sample_path() if path_or_id is None else resolve(path_or_id, **hub)
    model: Any = model_class(folder).from_pretrained(folder, **options)
    model.name_or_path = str(folder if path_or_id is None else path_or_id)
    if isinstance(model, Blip2ForImageTextRetrieval):
        from blip2c.matcher import Matcher

        return Matcher(model, Blip2Processor.from_pretrained(folder))
    processor = InstructBlipProcessor if isinstance(model, InstructBlipForConditionalGeneration) else Blip2Processor
    return Captioner(model, processor.from_pretrained(folder))


class Captioner:
    """A loaded BLIP-2 for people: caption() and ask(). `model` and `processor` are the transformers-like parts.

    InstructBLIP: the Q-Former reads the prompt, too.
    """

    def __init__(self, model: Blip2ForConditionalGeneration, processor: Blip2Processor) -> None:
        self.model = model
        self.processor = processor
        self.prompts = Prompts(model, processor)

    def caption(
        self,
        images: Any,
        prompt: str | Sequence[str] | None = None,
        *,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        batch_size: int = DEFAULT_BATCH,
        progress: bool | None = None,
        errors: str = "raise",
        **generate_options: Any,
    ) -> Any:
        """A Caption (a str) of one picture, or Captions (a list) of several.

        images: a path, bytes, Pillow image, array (H, W, 3) or State, or an iterable of them. prompt: a beginning to
        go on from, for all or one each. progress: True, False, or None for a bar where stderr is a terminal and there
        is more than one batch. errors: "raise", or "return" to get the exception in place of a picture's caption. Other
        options go to `generate`; where neither they nor a generation_config among them say how long, a caption ends
        after 30 new tokens. With num_return_sequences above 1 a picture has Captions, a list. With callables,
        stop_strings, max_time and what else needs Python between the steps, the texts are written one by one:
        callables see one prompt, max_time is for each, and a streamer takes one text. Raises PictureError or
        FileNotFoundError naming the picture.
        """
        single = _is_one(images)
        pictures = [images] if single else listed("images", images)
        one = prompt is None or isinstance(prompt, str)
        prompts = [prompt] * len(pictures) if one else listed("prompt", prompt)
        if len(prompts) != len(pictures):
            raise ValueError(f"{len(prompts)} prompts for {len(pictures)} pictures; pass one, or one each")
        rows = list(zip(range(len(pictures)), prompts, strict=True))
        options = _options(max_new_tokens, num_beams, CAPTION_TOKENS, generate_options)
        found = self._collect(pictures, rows, options, batch_size, progress, errors)
        return found[0] if single else Captions(found, [picture_name(p, i) for i, p in enumerate(pictures)])

    def ask(
        self,
        images: Any,
        questions: str | Sequence[str],
        template: str = QUESTION,
        *,
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        batch_size: int = DEFAULT_BATCH,
        progress: bool | None = None,
        errors: str = "raise",
        **generate_options: Any,
    ) -> Any:
        """An answer (a str) to one question on one picture; else a list of answers.

        One picture (or State) and several questions: the picture is encoded once, and what the prompts begin with is
        read once. Several pictures: one question for all, or one
        each. template: how a question is put, with {} for it. Other arguments as in caption(), but 20 tokens.
        """
        _check_template(template)
        one_picture, one_question = _is_one(images), isinstance(questions, str)
        pictures = [images] if one_picture else listed("images", images)
        asked = [questions] if isinstance(questions, str) else listed("questions", questions)
        for question in asked:
            if not isinstance(question, str):
                raise TypeError(f"a question must be a string, found {type(question).__name__}")
        if one_picture:
            pairs = [(0, question) for question in asked]
        elif one_question:
            pairs = [(index, asked[0]) for index in range(len(pictures))]
        elif len(asked) == len(pictures):
            pairs = list(enumerate(asked))
        else:
            raise ValueError(f"{len(asked)} questions for {len(pictures)} pictures; pass one, or one each")
        rows = [(index, template.replace("{}", question)) for index, question in pairs]
        options = _options(max_new_tokens, num_beams, ANSWER_TOKENS, generate_options)
        found = self._collect(pictures, rows, options, batch_size, progress, errors)
        if one_picture and one_question:
            return found[0]
        names = [picture_name(pictures[i], i) if one_question else q for i, q in pairs]
        return Captions(found, names)

    def encode(self, images: Any) -> Any:
        """The State of a picture, or a list of them: the vision encoder's work, done once.

        `model.ask(state, [...])`, `model.caption(state)` and `model.chat(state)` take it as a picture; what
        their prompts have in common is read once and kept in it. Raises as caption() does.
        """
        if _is_one(images):
            if not isinstance(images, State):
                return self._encode([images])[0]
            images.attach(self.prompts)
            return images
        pictures = listed("images", images)
        found: list[State] = []
        for start in range(0, len(pictures), GROUP):
            found.extend(self._encode(pictures[start : start + GROUP], start))
        return found

    def embed(
        self, images: Any, *, batch_size: int = DEFAULT_BATCH, progress: bool | None = None, errors: str = "raise"
    ) -> Any:
        """What the Q-Former says of pictures: float32 [Q, D_q] of one, else [B, Q, D_q], before the projection.

        These are features, and no space that texts share: for that load a retrieval checkpoint. Arguments as in
        blip2c.Matcher.embed(). UnsupportedError for InstructBLIP, whose Q-Former reads a prompt with the picture.
        """
        from blip2c.matcher import collect

        single = is_picture(images)
        pictures = [images] if single else listed("images", images)
        found = collect(self._embeddings(pictures, batch_size), len(pictures), batch_size, progress, errors)
        return found[0] if single else found if errors == "return" else np.stack(found)

    def attention_maps(self, image: Any, prompt: str | None = None) -> AttentionMaps:
        """Where the Q-Former looks in a picture: see blip2c.AttentionMaps. prompt: InstructBLIP's, whose Q-Former reads
        it with the picture; UnsupportedError for others."""
        from blip2c.attention_maps import attention_maps

        return attention_maps(self.model, self.processor, image, self.prompts.words(prompt))

    def embed_text(self, texts: Any) -> Any:
        """Raises UnsupportedError: a model that captions has no text side."""
        raise UnsupportedError(f"embed_text: {NO_TEXT_SIDE}")

    def match(self, images: Any, texts: Any, **_: Any) -> Any:
        """Raises UnsupportedError: a model that captions has no text side."""
        raise UnsupportedError(f"match: {NO_TEXT_SIDE}")

    def search(self, query: Any, pictures: Any, *_: Any, **__: Any) -> Any:
        """Raises UnsupportedError: a model that captions has no space in which pictures and texts are compared."""
        raise UnsupportedError(f"search: {NO_TEXT_SIDE}")

    def chat(self, image: Any, template: str = QUESTION, **generate_options: Any) -> Chat:
        """A conversation about one picture (or State); or about what another chat was about, with its history.

        template: how a question is put, with {} for it. generate_options: for each answer, 20 new tokens where nothing
        says how long.
        """
        history: Sequence[tuple[str, str]] = ()
        if isinstance(image, Chat):
            history, template = list(image.history), image.template
            generate_options, image = {**image.options, **generate_options}, image.state
        _check_template(template)
        if not _is_one(image):
            raise TypeError(f"a chat is about one picture, found {type(image).__name__}")
        options = _options(None, None, ANSWER_TOKENS, generate_options)
        # A wrong option shows now, not with the first question; no seed is drawn for that.
        self.prompts.plan({**options, "seed": 0})
        return Chat(self, self.encode(image), template, options, history)

    def stream(
        self,
        pictures: Sequence[Any],
        rows: Sequence[tuple[int, str | None]],
        batch_size: int = DEFAULT_BATCH,
        *,
        as_finished: bool = False,
        **generate_options: Any,
    ) -> Iterator[Any]:
        """For each row (number of a picture, prompt) in order its Caption, or the exception that it met; Captions,
        where num_return_sequences asks for several.

        batch_size rows run together: one that has finished leaves and the next enters, pictures are decoded and encoded
        ahead in threads, a little ahead of the results that are taken. as_finished: (number of the row, result) as they
        finish. Close the iterator, or let go of it, and all of it stops. Errors of options (not of a row) are raised.

        What is drawn (do_sample) depends on the seed and the number of the row, not on what runs beside it.
        """
        batch_size = check_batch_size(batch_size)
        for row in rows:
            index = row[0] if isinstance(row, tuple | list) and len(row) == 2 else None
            if isinstance(index, bool) or not isinstance(index, int | np.integer) or not 0 <= index < len(pictures):
                raise ValueError(f"rows: expected (number of one of {len(pictures)} pictures, prompt), found {row!r}")
        plan = self.prompts.plan(generate_options)
        if plan.call["streamer"] is not None and len(rows) > 1:
            raise ValueError(f"streamer: it takes one text, {len(rows)} were asked for")
        for picture in pictures:
            if isinstance(picture, State):
                picture.attach(self.prompts)
        return self._run(plan, pictures, rows, batch_size, as_finished)

    # -- inside --------------------------------------------------------------------------------------------------

    def _run(
        self,
        plan: Plan,
        pictures: Sequence[Any],
        rows: Sequence[tuple[int, str | None]],
        places: int,
        as_finished: bool,
    ) -> Iterator[Any]:
        if not rows:
            return
        flow = Flow(self.prompts, plan, pictures, rows, places)
        try:
            yield from flow.as_finished() if as_finished else flow.in_order()
        finally:
            flow.close()

    def _encode(self, pictures: Sequence[Any], first: int = 0) -> list[State]:
        pixels = np.concatenate([self.prompts.pixels(picture) for picture in pictures])
        names = [picture_name(picture, first + place) for place, picture in enumerate(pictures)]
        encoded = self.prompts.encode(pixels)
        # Copies: a picture that is kept keeps nothing of those that it was encoded with.
        return [State(self.prompts, encoded[place].copy(), name) for place, name in enumerate(names)]

    def _collect(
        self,
        pictures: Sequence[Any],
        rows: Sequence[tuple[int, str | None]],
        options: dict[str, Any],
        batch_size: int,
        progress: bool | None,
        errors: str,
    ) -> list[Any]:
        if errors not in ("raise", "return"):
            raise ValueError(f'errors must be "raise" or "return", found {errors!r}')
        if not pictures:
            raise ValueError("images is empty")
        if not rows:
            raise ValueError("questions is empty")
        results: list[Any] = []
        with progress_bar(len(rows), batch_size, progress) as bar:
            for result in self.stream(pictures, rows, batch_size, **options):
                if isinstance(result, Exception) and errors == "raise":
                    raise result
                results.append(result)
                bar.update(1)
        return results

    def _embeddings(self, pictures: Sequence[Any], batch_size: int) -> Iterator[Any]:
        if self.prompts.words_tokenizer is not None:
            raise UnsupportedError("embed: this model's Q-Former reads a prompt with each picture: it has no features")
        for start in range(0, len(pictures), check_batch_size(batch_size)):
            batch = pictures[start : start + batch_size]
            pixels, failed = read_pictures(self.model, self.processor, batch, range(len(batch)))
            states = self.model._core.encode_stages(np.concatenate(list(pixels.values())))["qformer"] if pixels else []
            found = dict(zip(pixels, states, strict=True))
            for place in range(len(batch)):
                yield failed[place] if place in failed else found[place].copy()

    def __repr__(self) -> str:
        return f"Captioner({self.model!r})"


def _is_one(images: Any) -> bool:
    return isinstance(images, State) or is_picture(images)


def _check_template(template: Any) -> None:
    if not isinstance(template, str) or "{}" not in template:
        raise ValueError(f"template must hold {{}} where the question goes, found {template!r}")


def check_batch_size(value: Any) -> int:
    """The number, or ValueError."""
    return check_count("batch_size", value, 1)


def check_count(name: str, value: Any, least: int) -> int:
    """The number, or ValueError naming it."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, found {value!r}")
    return int(value)


def read_pictures(
    model: Blip2WithQFormer, processor: Blip2Processor, pictures: Sequence[Any], wanted: Iterable[int]
) -> tuple[dict[int, NDArray[np.float32]], dict[int, Exception]]:
    """Pixels [1, 3, S, S] of each wanted picture, by its number; and what the others failed with."""
    pixels: dict[int, NDArray[np.float32]] = {}
    failed: dict[int, Exception] = {}
    for index in wanted:
        try:
            pixels[index] = read_pixels(model, processor, pictures[index])
        except ROW_ERRORS as error:
            failed[index] = error
    return pixels, failed


def listed(name: str, value: Any) -> list[Any]:
    """An iterable as a list. Raises TypeError naming it."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise TypeError(f"{name}: expected a list, found {type(value).__name__}")
    try:
        return list(value)
    except TypeError:
        raise TypeError(f"{name}: {type(value).__name__} is neither one nor a list of them") from None


def _options(
    max_new_tokens: int | None, num_beams: int | None, default: int, options: dict[str, Any]
) -> dict[str, Any]:
    """generate()'s options: a default length only where nothing that was given says how long."""
    given = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    result = {**{name: value for name, value in given.items() if value is not None}, **options}
    config = options.get("generation_config")
    bounds = [result.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length")]
    return result if any(bound is not None for bound in bounds) else {**result, "max_new_tokens": default}


class _NoBar:
    def __enter__(self) -> _NoBar:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def update(self, count: int = 1) -> None: ...


def progress_bar(total: int, batch_size: int, progress: bool | None) -> Any:
    """A tqdm bar on stderr, or something that does nothing where none is wanted."""
    if progress is False or (progress is None and total <= batch_size):
        return _NoBar()
    from tqdm import tqdm

    # disable=None: only where stderr is a terminal.
    return tqdm(total=total, unit="picture", disable=None if progress is None else False)
