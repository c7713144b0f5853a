"""`pipeline("image-to-text")` and `pipeline("visual-question-answering")`, which transformers 5 removed.

Arguments and return values are those of transformers 4 (ImageToTextPipeline, VisualQuestionAnsweringPipeline), with two
differences: the picture always stands in front of the prompt (since 4.46 BLIP-2 lost it here, silently), and texts hold
what is new, not the prompt. Pictures are not fetched from addresses.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from types import GeneratorType
from typing import Any

from blip2c._core import UnsupportedError
from blip2c.api import Captioner, check_batch_size, load
from blip2c.captions import Captions
from blip2c.devices import read_device
from blip2c.images import is_picture
from blip2c.modeling import Blip2ForConditionalGeneration
from blip2c.processing import Blip2Processor
from blip2c.states import State

__all__ = ["ImageToTextPipeline", "VisualQuestionAnsweringPipeline", "pipeline"]

# transformers' default where nobody says how long a text may be.
NEW_TOKENS = 256
# What is known of a generator at a time, in batches: within it the batch stays full.
CHUNK = 16

Row = tuple[Any, str | None]


class _Pipeline:
    """A Captioner behind the calls of an old pipeline. task: its name. model, tokenizer, image_processor: its parts."""

    task = ""

    def __init__(self, captioner: Captioner, batch_size: int | None = None, **defaults: Any) -> None:
        self._captioner = captioner
        self._batch_size = check_batch_size(1 if batch_size is None else batch_size)
        self._defaults = defaults
        self.model = captioner.model
        self.tokenizer = captioner.processor.tokenizer
        self.image_processor = captioner.processor.image_processor

    def _options(self, max_new_tokens: int | None, generate_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
        options = dict(generate_kwargs or {})
        if max_new_tokens is not None:
            if "max_new_tokens" in options:
                raise ValueError(
                    "`max_new_tokens` is defined both as an argument and inside `generate_kwargs` argument, please use"
                    " only 1 version"
                )
            options["max_new_tokens"] = max_new_tokens
        return options

    def _rows(self, rows: list[Row], options: dict[str, Any], batch_size: int) -> Iterator[list[dict[str, str]]]:
        """A result for each; the first exception that one meets is raised."""
        if not rows:
            return
        unique: dict[int, int] = {}
        for picture, _ in rows:
            unique.setdefault(id(picture), len(unique))
        pictures: list[Any] = [None] * len(unique)
        for picture, _ in rows:
            pictures[unique[id(picture)]] = picture
        if not self._says_how_long(options):
            options = {**options, "max_new_tokens": self._room([prompt for _, prompt in rows])}
        numbered = [(unique[id(picture)], prompt) for picture, prompt in rows]
        for found in self._captioner.stream(pictures, numbered, batch_size, **options):
            if isinstance(found, Exception):
                raise found
            yield [self._record(text) for text in (found if isinstance(found, Captions) else [found])]

    def _record(self, caption: Any) -> dict[str, str]:
        raise NotImplementedError

    @staticmethod
    def _says_how_long(options: Mapping[str, Any]) -> bool:
        config = options.get("generation_config")
        return any(
            options.get(name, getattr(config, name, None)) is not None for name in ("max_new_tokens", "max_length")
        )

    def _room(self, prompts: list[str | None]) -> int:
        """256, or as many tokens as the longest prompt leaves positions for."""
        if self.model.config.is_encoder_decoder:
            return NEW_TOKENS
        longest = max(len(self.tokenizer(prompt or "")["input_ids"]) for prompt in set(prompts))
        return max(1, min(NEW_TOKENS, self.model._positions - self._captioner.prompts.queries - longest))

    def _chunks(self, rows: Iterable[Row], options: dict[str, Any], batch_size: int) -> Iterator[list[dict[str, str]]]:
        rows = iter(rows)
        while chunk := list(islice(rows, CHUNK * batch_size)):
            yield from self._rows(chunk, options, batch_size)

    def __repr__(self) -> str:
        return f"pipeline({self.task!r}, {self._captioner!r})"


class ImageToTextPipeline(_Pipeline):
    """Captions as [{"generated_text": ...}] (upstream: transformers 4's ImageToTextPipeline)."""

    task = "image-to-text"

    def __call__(
        self,
        inputs: Any = None,
        *,
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        timeout: float | None = None,
        **named: Any,
    ) -> Any:
        """[{"generated_text": str}] of one picture; a list of these for a list, an iterator for any other iterable.

        inputs (or images=): a path, Pillow image, or whatever blip2c.load_image() takes. generate_kwargs: options of
        generate(). timeout is for addresses, which raise PictureError here: it is taken and has no effect.
        """
        inputs = named.pop("images", inputs)
        _refuse(self.task, named)
        if inputs is None:
            raise ValueError("Cannot call the image-to-text pipeline without an inputs argument!")
        prompt = self._defaults.get("prompt") if prompt is None else prompt
        if prompt is not None and not isinstance(prompt, str):
            raise ValueError(
                f"Received an invalid text input, got - {type(prompt)} - but expected a single string. "
                "Note also that one single text can be provided for conditional image to text generation."
            )
        options = self._options(
            self._defaults.get("max_new_tokens") if max_new_tokens is None else max_new_tokens,
            self._defaults.get("generate_kwargs") if generate_kwargs is None else generate_kwargs,
        )
        size = self._batch_size if batch_size is None else check_batch_size(batch_size)
        if _is_one(inputs):
            return next(self._rows([(inputs, prompt)], options, size))
        if isinstance(inputs, list):
            return list(self._rows([(picture, prompt) for picture in inputs], options, size))
        return self._chunks(((picture, prompt) for picture in _iterable(inputs)), options, size)

    def _record(self, caption: Any) -> dict[str, str]:
        return {"generated_text": self.tokenizer.decode(caption.ids, skip_special_tokens=True)}


class VisualQuestionAnsweringPipeline(_Pipeline):
    """Answers as [{"answer": ...}] (upstream: transformers 4's VisualQuestionAnsweringPipeline)."""

    task = "visual-question-answering"

    def __call__(
        self,
        image: Any,
        question: str | list[str] | None = None,
        *,
        top_k: int | None = None,
        padding: Any = None,
        truncation: Any = None,
        max_new_tokens: int | None = None,
        generate_kwargs: Mapping[str, Any] | None = None,
        batch_size: int | None = None,
        timeout: float | None = None,
        **named: Any,
    ) -> Any:
        """[{"answer": str}] of one question; a list of these for several, an iterator for any other iterable.

        image and question, one or a list of each (every question on every picture, question by question); or {"image":
        ..., "question": ...}, a list or another iterable of these. The question is the whole prompt: BLIP-2 wants it as
        "Question: ... Answer:". top_k is for classifiers, and padding changes nothing: as upstream they have no effect
        on a model that writes its one answer. truncation is refused. timeout: as in image-to-text.
        """
        _refuse(self.task, named)
        if truncation not in (None, False):
            raise UnsupportedError(f"{self.task}: truncation={truncation!r}: a prompt that is too long raises")
        options = self._options(
            self._defaults.get("max_new_tokens") if max_new_tokens is None else max_new_tokens,
            self._defaults.get("generate_kwargs") if generate_kwargs is None else generate_kwargs,
        )
        size = self._batch_size if batch_size is None else check_batch_size(batch_size)
        if question is not None:
            pictures = [image] if _is_one(image) else list(_iterable(image))
            questions = [question] if isinstance(question, str) else list(_iterable(question))
            found = list(self._rows([(picture, asked) for asked in questions for picture in pictures], options, size))
            return found[0] if _is_one(image) and isinstance(question, str) else found
        if _is_one(image):
            raise ValueError(f"{self.task}: question must be given")
        if isinstance(image, Mapping):
            return next(self._rows([_pair(image)], options, size))
        if isinstance(image, list):
            return list(self._rows([_pair(item) for item in image], options, size))
        return self._chunks((_pair(item) for item in _iterable(image)), options, size)

    def _record(self, caption: Any) -> dict[str, str]:
        return {"answer": str(caption)}


_TASKS: dict[str, type[ImageToTextPipeline] | type[VisualQuestionAnsweringPipeline]] = {
    "image-to-text": ImageToTextPipeline,
    "visual-question-answering": VisualQuestionAnsweringPipeline,
    "vqa": VisualQuestionAnsweringPipeline,
}


def pipeline(
    task: str = "image-to-text",
    model: Any = None,
    *,
    processor: Any = None,
    device: Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    batch_size: int | None = None,
    framework: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    revision: str | None = None,
    token: Any = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    generate_kwargs: Mapping[str, Any] | None = None,
    **named: Any,
) -> Any:
    """What transformers 4's `pipeline()` of these names was: "image-to-text", "visual-question-answering" ("vqa").

    model: a folder or Hub id (None: the sample inside the package), what blip2c.load() gave, or a
    Blip2ForConditionalGeneration with its processor. batch_size, prompt, max_new_tokens, generate_kwargs: for calls
    that do not say. model_kwargs: for from_pretrained. device, device_map: where the model goes (-1, transformers'
    number of the CPU, None, "cuda" ...). Raises KeyError for another task, UnsupportedError for a device that is not
    there or another framework than "pt".
    """
    if task not in _TASKS:
        raise KeyError(f"Unknown task {task}, available tasks are {sorted(_TASKS)}")
    _refuse("pipeline", named)
    if prompt is not None and task != "image-to-text":
        raise TypeError(f"{task} has no argument prompt")
    if framework not in (None, "pt"):
        raise UnsupportedError(f"framework={framework!r}: results are plain lists and strings; pass None or 'pt'")
    place = device_map if device is None else "cpu" if device == -1 else device  # -1: transformers' number of the CPU
    options = dict(model_kwargs or {})
    path = model is None or isinstance(model, str | os.PathLike)
    if place is not None and path:
        options["device"] = read_device(place)
    captioner = _captioner(model, processor, options, dtype or torch_dtype, revision, token)
    if place is not None and not path:
        captioner.model.to(read_device(place))
    defaults = {"prompt": prompt, "max_new_tokens": max_new_tokens, "generate_kwargs": generate_kwargs}
    return _TASKS[task](captioner, batch_size, **defaults)


def _captioner(model: Any, processor: Any, options: dict[str, Any], dtype: Any, revision: Any, token: Any) -> Captioner:
    given = {"dtype": dtype, "revision": revision, "token": token}
    options = {**options, **{name: value for name, value in given.items() if value is not None}}
    if model is None or isinstance(model, str | os.PathLike):
        if processor is not None:
            raise TypeError("processor: the folder's own is used; pass a model object to choose another")
        model = load(model, **options)
    elif options:
        raise TypeError(f"{', '.join(sorted(options))}: for loading a model; this one is loaded")
    elif isinstance(model, Blip2ForConditionalGeneration):
        if not isinstance(processor, Blip2Processor):
            raise TypeError(f"processor: expected the model's Blip2Processor, found {type(processor).__name__}")
        model = Captioner(model, processor)
    if not isinstance(model, Captioner):
        raise TypeError(f"model: expected a path, a Hub id or a model that writes text, found {type(model).__name__}")
    return model


def _refuse(where: str, named: Mapping[str, Any]) -> None:
    if named:
        raise TypeError(f"{where} has no argument {', '.join(sorted(named))}")


def _is_one(value: Any) -> bool:
    return isinstance(value, State) or is_picture(value)


def _iterable(value: Any) -> Iterable[Any]:
    if isinstance(value, GeneratorType) or hasattr(value, "__iter__"):
        return value  # type: ignore[no-any-return]
    if hasattr(value, "__getitem__") and hasattr(value, "__len__"):  # a map-style dataset
        return (value[place] for place in range(len(value)))
    raise TypeError(f"expected a picture or an iterable, found {type(value).__name__}")


def _pair(item: Any) -> Row:
    if not isinstance(item, Mapping) or not {"image", "question"} <= set(item):
        raise ValueError(f'expected {{"image": ..., "question": ...}}, found {type(item).__name__}')
    if not isinstance(item["question"], str):
        raise TypeError(f"a question must be a string, found {type(item['question']).__name__}")
    return item["image"], item["question"]
