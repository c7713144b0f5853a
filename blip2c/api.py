"""The friendly spelling: `m = blip2c.load(); m.caption("cat.jpg"); m.ask("cat.jpg", "how many cats are there?")`.

Rows of a batch are packed, never padded: a picture gets the same words, to the bit of every score, whatever stands
beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c._core import NumericError, UnsupportedError
from blip2c.classes import model_class
from blip2c.forward import Blip2WithQFormer, decoder_arguments
from blip2c.images import is_picture, is_torch, load_image
from blip2c.inputs import DecoderRows, check_pixels, check_positions, pack_ragged, pack_texts, repeat_decoder
from blip2c.instructblip import InstructBlipForConditionalGeneration
from blip2c.modeling import Blip2ForConditionalGeneration, new_tokens
from blip2c.processing import Blip2Processor, InstructBlipProcessor
from blip2c.retrieval import Blip2ForImageTextRetrieval
from blip2c.tokenizer import Blip2Tokenizer

QUESTION = "Question: {} Answer:"
DEFAULT_BATCH = 8
CAPTION_TOKENS, ANSWER_TOKENS = 30, 20
NO_TEXT_SIDE = (
    "this checkpoint writes texts, and can not read them without a picture: load a retrieval checkpoint"
    " (Salesforce/blip2-itm-vit-g or its like)"
)
# What one row may raise without being the fault of the others.
ROW_ERRORS = (ValueError, TypeError, OSError, NumericError)


class Caption(str):
    """A caption or an answer: a string that also knows its token ids and, where it is empty or cut off, why.

    ids: the new tokens. finished: whether the model ended it itself (eos) rather than max_new_tokens.
    reason: None, or why it is empty.
    """

    ids: list[int]
    finished: bool
    reason: str | None

    def __new__(cls, text: str, ids: Sequence[int] = (), finished: bool = True) -> Caption:
        self = super().__new__(cls, text)
        self.ids = list(ids)
        self.finished = finished
        self.reason = None if text else _why_empty(self.ids, finished)
        return self

    def __reduce__(self) -> Any:
        return Caption, (str(self), self.ids, self.finished)


def _why_empty(ids: Sequence[int], finished: bool) -> str:
    if not ids:
        return "no token was asked for"
    if finished and len(ids) == 1:
        return "the model ended its text with its first token"
    return f"the model wrote only special tokens or spaces ({len(ids)} tokens: {', '.join(map(str, ids[:8]))})"


class Captions(list[Any]):
    """Captions of several pictures, in order; errors="return" puts the exception where a picture failed.

    Prints as one line a picture. names: what the pictures were called.
    """

    def __init__(self, items: Iterable[Any], names: Sequence[str]) -> None:
        super().__init__(items)
        self.names = list(names)

    def __str__(self) -> str:
        lines = [
            f"{name}: {f'[{type(item).__name__}: {item}]' if isinstance(item, Exception) else item}"
            for name, item in zip(self.names, self, strict=True)
        ]
        return "\n".join(lines)


def sample_path() -> Path:
    """The folder of the small checkpoint inside the package, in the Hub's format (FileNotFoundError without it)."""
    folder = Path(__file__).resolve().parent / "sample"
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: this installation carries no sample checkpoint; name one: load(path_or_id)")
    return folder


def load(path_or_id: str | os.PathLike[str] | None = None, **options: Any) -> Any:
    """A model with its processor, ready to use. Without path_or_id: the small checkpoint inside the package.

    A Captioner; or a blip2c.Matcher where the checkpoint compares pictures and texts (blip2-itm-vit-g and its like).

    options: as in `Blip2ForConditionalGeneration.from_pretrained` (dtype, revision, cache_dir, local_files_only ...).
    """
    from blip2c.hub import pop_hub_options, resolve

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

        images: a path, bytes, Pillow image or array (H, W, 3), or an iterable of them. prompt: a beginning to go on
        from, for all or one each. progress: True, False, or None for a bar where stderr is a terminal and there is
        more than one batch. errors: "raise", or "return" to get the exception in place of a picture's caption. Other
        options go to `generate`; where neither they nor a generation_config among them say how long, a caption ends
        after 30 new tokens. Raises PictureError or FileNotFoundError naming the picture.
        """
        single = is_picture(images)
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

        One picture and several questions: the picture is encoded once. Several pictures: one question for all, or one
        each. template: how a question is put, with {} for it. Other arguments as in caption(), but 20 tokens.
        """
        if "{}" not in template:
            raise ValueError(f"template must hold {{}} where the question goes, found {template!r}")
        one_picture, one_question = is_picture(images), isinstance(questions, str)
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

    def embed_text(self, texts: Any) -> Any:
        """Raises UnsupportedError: a model that captions has no text side."""
        raise UnsupportedError(f"embed_text: {NO_TEXT_SIDE}")

    def match(self, images: Any, texts: Any, **_: Any) -> Any:
        """Raises UnsupportedError: a model that captions has no text side."""
        raise UnsupportedError(f"match: {NO_TEXT_SIDE}")

    def stream(
        self,
        pictures: Sequence[Any],
        rows: Sequence[tuple[int, str | None]],
        batch_size: int = DEFAULT_BATCH,
        **generate_options: Any,
    ) -> Iterator[Any]:
        """For each row (number of a picture, prompt) in order its Caption, or the exception that it met.

        Work is done batch by batch, as results are taken. What is drawn (do_sample) depends on the seed, the picture's
        number and how many of its rows came before, not on batches or on rows that failed. Errors of options (not of
        a row) are raised.
        """
        check_batch_size(batch_size)
        several = generate_options.get("num_return_sequences")
        if several not in (None, 1):
            raise ValueError(f"num_return_sequences={several}: one caption a picture; use model.generate for more")
        # Of an encoder-decoder: what every text begins with. Its prompts go to the encoder.
        decoder = self.model._begin_decoder(generate_options, 1) if self.model.config.is_encoder_decoder else None
        options = self.model._options(generate_options, [])
        features: dict[int, NDArray[np.float32] | Exception] = {}
        keys = _draw_keys(rows)
        for start in range(0, len(rows), batch_size):
            batch = rows[start : start + batch_size]
            wanted = list(dict.fromkeys(index for index, _ in batch))
            features = {index: value for index, value in features.items() if index in wanted}
            self._encode(pictures, [index for index in wanted if index not in features], features)
            yield from self._batch(batch, keys[start : start + batch_size], features, options, decoder)

    # -- inside --------------------------------------------------------------------------------------------------

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
        if self._words is not None:
            raise UnsupportedError("embed: this model's Q-Former reads a prompt with each picture: it has no features")
        for start in range(0, len(pictures), check_batch_size(batch_size)):
            batch = pictures[start : start + batch_size]
            pixels, failed = read_pictures(self.model, self.processor, batch, range(len(batch)))
            states = self.model._core.encode_stages(np.concatenate(list(pixels.values())))["qformer"] if pixels else []
            found = dict(zip(pixels, states, strict=True))
            for place in range(len(batch)):
                yield failed[place] if place in failed else found[place].copy()

    def _encode(
        self, pictures: Sequence[Any], wanted: Sequence[int], features: dict[int, NDArray[np.float32] | Exception]
    ) -> None:
        """Puts the image features [Q, D] of each wanted picture, or what it failed with, into `features`.

        Where the Q-Former reads the prompt, too, these are the image embeddings [T, Dv].
        """
        pixels, failed = read_pictures(self.model, self.processor, pictures, wanted)
        features.update(failed)
        if pixels:
            core, every = self.model._core, np.concatenate(list(pixels.values()))
            encoded = core.vision(every) if self._words is not None else core.encode(every)
            features.update(zip(pixels, encoded, strict=True))

    def _batch(
        self,
        batch: Sequence[tuple[int, str | None]],
        keys: NDArray[np.uint64],
        features: dict[int, NDArray[np.float32] | Exception],
        options: dict[str, Any],
        decoder: DecoderRows | None,
    ) -> Iterator[Any]:
        results: dict[int, Any] = {}
        ready: list[tuple[int, NDArray[np.float32], list[int]]] = []
        words: list[list[int]] = []
        for place, (index, prompt) in enumerate(batch):
            picture = features[index]
            try:
                if isinstance(picture, Exception):
                    raise picture
                ids = self._prompt_ids(prompt, options, decoder)
                if self._words is not None:
                    words.append(self._word_ids(self._words, prompt))
                ready.append((place, picture, ids))
            except ROW_ERRORS as error:
                results[place] = error
        if ready:
            stacked = np.stack([f for _, f, _ in ready])
            if words:
                stacked = self.model._core.read(stacked, pack_texts(words))
            drawn = keys[[place for place, _, _ in ready]]
            captions = self._generate(stacked, [ids for _, _, ids in ready], drawn, options, decoder)
            results.update(zip((place for place, _, _ in ready), captions, strict=True))
        for place in range(len(batch)):
            yield results[place]

    @property
    def _words(self) -> Blip2Tokenizer | None:
        """The tokenizer of the Q-Former, where it reads prompts."""
        return self.processor.qformer_tokenizer if isinstance(self.processor, InstructBlipProcessor) else None

    def _word_ids(self, tokenizer: Blip2Tokenizer, prompt: str | None) -> list[int]:
        """The prompt as the Q-Former reads it. Raises ValueError where it has no room for it."""
        ids = list(tokenizer(prompt or "")["input_ids"])
        qformer = self.model._core_config["qformer"]
        if len(ids) > int(qformer["max_position_embeddings"]):
            raise ValueError(
                f"the prompt is {len(ids)} tokens long for the Q-Former, which has positions for"
                f" {qformer['max_position_embeddings']}"
            )
        if max(ids, default=0) >= int(qformer["vocab_size"]):
            raise ValueError(
                f"prompt: token {max(ids)} is outside the Q-Former's vocabulary of {qformer['vocab_size']}"
            )
        return ids

    def _prompt_ids(self, prompt: str | None, options: dict[str, Any], decoder: DecoderRows | None) -> list[int]:
        """Ids of a row behind its image. Raises ValueError for a prompt that the model has no room for."""
        if prompt is None and self.model.config.text_config.get("bos_token_id") is not None:
            ids = [int(self.model._start_ids(1)[0, -1])]
        elif prompt is None or isinstance(prompt, str):
            ids = list(self.processor.tokenizer(prompt or "")["input_ids"])
        else:
            raise TypeError(f"a prompt must be a string, found {type(prompt).__name__}")
        vocabulary = int(self.model._core_config["text"]["vocab_size"])
        if not ids:
            raise ValueError("the prompt is empty, and the tokenizer puts nothing in front of it")
        if max(ids) >= vocabulary:
            raise ValueError(f"prompt: token {max(ids)} is outside the model's vocabulary of {vocabulary}")
        if self.model._image_token is not None and self.model._image_token in ids:
            raise ValueError("the prompt holds <image>: the picture is put in front by itself")
        queries = int(self.model._core_config["num_query_tokens"])
        length = queries + len(ids) if decoder is None else len(decoder.ids)
        room = new_tokens(options, length)
        if room == 0:
            what = (
                "the prompt is {} tokens long, image included"
                if decoder is None
                else "the decoder begins with {} tokens"
            )
            raise ValueError(f"{what.format(length)}; max_length is {options['max_length']}")
        check_positions(pack_ragged([ids], self.model._image_token, queries), self.model._positions, room)
        return ids

    def _generate(
        self,
        features: NDArray[np.float32],
        prompts: list[list[int]],
        keys: NDArray[np.uint64],
        options: dict[str, Any],
        decoder: DecoderRows | None,
    ) -> list[Caption]:
        """features [B, Q, D], a prompt and a key of its draws each; decoder: one row, for all."""
        rows = pack_ragged(prompts, self.model._image_token, int(self.model._core_config["num_query_tokens"]))
        rule_ids, beginning = rows.rule_ids, {}
        if decoder is not None:
            begun = repeat_decoder(decoder, len(prompts))
            rule_ids, beginning = begun.ids, decoder_arguments(begun)
        out = self.model._core.generate(
            features, rows.ids, rows.offsets, None, rule_ids, options, keys=keys, **beginning
        )
        ends = set(int(i) for i in np.atleast_1d(np.asarray(options.get("eos_ids", []), np.int64)))
        captions = []
        for ids, length in zip(np.asarray(out["ids"]), np.asarray(out["lengths"]), strict=True):
            new = [int(i) for i in ids[: int(length)]]
            text = self.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
            captions.append(Caption(text, new, finished=bool(new) and new[-1] in ends))
        return captions

    def __repr__(self) -> str:
        return f"Captioner({self.model!r})"


def _draw_keys(rows: Sequence[tuple[int, str | None]]) -> NDArray[np.uint64]:
    """What a row's draws depend on beside the seed, [n]: the picture's number, and how many rows of it came before."""
    before: dict[int, int] = {}
    keys = np.empty(len(rows), np.uint64)
    for i, (index, _) in enumerate(rows):
        keys[i] = index | before.get(index, 0) << 32
        before[index] = before.get(index, 0) + 1
    return keys


def check_batch_size(value: Any) -> int:
    """The number, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"batch_size must be a positive integer, found {value!r}")
    return value


def read_pictures(
    model: Blip2WithQFormer, processor: Blip2Processor, pictures: Sequence[Any], wanted: Iterable[int]
) -> tuple[dict[int, NDArray[np.float32]], dict[int, Exception]]:
    """Pixels [1, 3, S, S] of each wanted picture, by its number; and what the others failed with."""
    size = int(model._core_config["vision"]["image_size"])
    pixels: dict[int, NDArray[np.float32]] = {}
    failed: dict[int, Exception] = {}
    for index in wanted:
        try:
            image = load_image(pictures[index])
            pixels[index] = check_pixels(processor.image_processor(image, return_tensors="np")["pixel_values"], size)
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


def picture_name(picture: Any, index: int) -> str:
    """What to call a picture in a list: its path, or its number and kind."""
    if isinstance(picture, str | os.PathLike):
        return str(os.fspath(picture))
    filename = getattr(picture, "filename", None)
    if isinstance(filename, str) and filename:
        return filename
    kind = "tensor" if is_torch(picture) else "array" if isinstance(picture, np.ndarray) else "picture"
    return f"{kind} {index}"


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
