"""The friendly spelling of retrieval: `m = blip2c.load(folder); m.match("cat.jpg", ["a cat", "a dog"])`.

Texts are packed, never padded: each gives the same bits whatever stands beside it, and so does each picture.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip2c.api import DEFAULT_BATCH, check_batch_size, listed, progress_bar, read_pictures
from blip2c.captions import Captions, picture_name
from blip2c.images import is_picture
from blip2c.inputs import check_embeds, pack_texts
from blip2c.processing import Blip2Processor
from blip2c.prompts import ROW_ERRORS
from blip2c.retrieval import Blip2ForImageTextRetrieval

F32 = NDArray[np.float32]


class Match(NamedTuple):
    """How well a picture and a text fit.

    probability: that they belong together, from the model that reads both (ITM). cosine: of what each becomes alone, of
    the picture's queries the nearest one (ITC): between -1 and 1, a measure to rank by and no probability. logit: ITM's
    "yes" before the softmax; the paper ranks by logit + cosine.
    """

    probability: float
    cosine: float
    logit: float

    def __str__(self) -> str:
        return f"probability {self.probability:.4f}, cosine {self.cosine:+.4f}"


class Matcher:
    """A loaded retrieval model for people: match(), embed(), embed_text(), similarity().

    `model` and `processor` are the transformers-like parts.
    """

    def __init__(self, model: Blip2ForImageTextRetrieval, processor: Blip2Processor) -> None:
        self.model = model
        self.processor = processor

    def embed(
        self, images: Any, *, batch_size: int = DEFAULT_BATCH, progress: bool | None = None, errors: str = "raise"
    ) -> Any:
        """Pictures as float32 vectors of length 1, one a query: [Q, P] of one picture, else [B, Q, P].

        A picture is as near to a text as its nearest query: see similarity(). images: a path, bytes, Pillow image or
        array (H, W, 3), or an iterable of them. errors="return": a list of [Q, P] arrays, with the exception in place
        of a picture that can not be read. Raises PictureError or FileNotFoundError naming the picture.
        """
        single = is_picture(images)
        pictures = [images] if single else listed("images", images)
        found = collect(self.stream_embeddings(pictures, batch_size), len(pictures), batch_size, progress, errors)
        return found[0] if single else found if errors == "return" else np.stack(found)

    def stream_embeddings(self, pictures: Sequence[Any], batch_size: int = DEFAULT_BATCH) -> Iterator[Any]:
        """For each picture in order its vectors [Q, P], or the exception that it met; worked on batch by batch."""
        for start in range(0, len(pictures), check_batch_size(batch_size)):
            batch = pictures[start : start + batch_size]
            pixels, failed = read_pictures(self.model, self.processor, batch, range(len(batch)))
            stages = self.model._core.encode_stages(np.concatenate(list(pixels.values()))) if pixels else {"embeds": []}
            embeds = dict(zip(pixels, stages["embeds"], strict=True))
            for place in range(len(batch)):
                yield failed[place] if place in failed else embeds[place].copy()

    def embed_text(self, texts: str | Sequence[str]) -> F32:
        """Texts as float32 vectors of length 1: [P] of one text, else [J, P]. Raises ValueError naming the text."""
        rows = [self.token_ids(text) for text in ([texts] if isinstance(texts, str) else listed("texts", texts))]
        if not rows:
            raise ValueError("texts is empty")
        packed = pack_texts(rows)
        embeds: F32 = np.ascontiguousarray(self.model._core.read_texts(packed)["embeds"][packed[1][:-1]])
        return embeds[0] if isinstance(texts, str) else embeds

    def similarity(self, images: Any, texts: Any) -> F32:
        """Cosines [B, J] of pictures with texts, each as embed() and embed_text() give them: of the nearest query.

        images [B, Q, P] or [Q, P], texts [J, P] or [P]; other vectors give their dot products.
        """
        width = int(self.model._core_config["heads"]["projection_size"])
        pictures, words = np.asarray(images), np.asarray(texts)
        pictures = check_embeds(pictures[None] if pictures.ndim == 2 else pictures, (None, width), "images")
        words = words[None] if words.ndim == 1 else words
        words = check_embeds(words[None] if words.ndim == 2 else words, (None, width), "texts")
        if len(words) != 1:
            raise ValueError(f"texts must be [texts, {width}], found shape {np.shape(texts)}")
        return self.model._core.similarity(pictures, words[0])

    def match(
        self,
        images: Any,
        texts: str | Sequence[str],
        *,
        batch_size: int = DEFAULT_BATCH,
        progress: bool | None = None,
        errors: str = "raise",
    ) -> Any:
        """A Match of one picture and one text; else a list of them, which prints a line each.

        One picture and several texts: the picture is encoded once. Several pictures: one text for all, or one each.
        Other arguments as in embed().
        """
        one_picture, one_text = is_picture(images), isinstance(texts, str)
        pictures = [images] if one_picture else listed("images", images)
        asked = [texts] if isinstance(texts, str) else listed("texts", texts)
        if one_picture:
            pairs = [(0, text) for text in asked]
        elif one_text or len(asked) == len(pictures):
            pairs = list(enumerate(asked * len(pictures) if one_text else asked))
        else:
            raise ValueError(f"{len(asked)} texts for {len(pictures)} pictures; pass one, or one each")
        found = collect(self.stream_matches(pictures, pairs, batch_size), len(pairs), batch_size, progress, errors)
        if one_picture and one_text:
            return found[0]
        names = [picture_name(pictures[i], i) if one_text else text for i, text in pairs]
        return Captions(found, names)

    def stream_matches(
        self, pictures: Sequence[Any], pairs: Sequence[tuple[int, str]], batch_size: int = DEFAULT_BATCH
    ) -> Iterator[Any]:
        """For each pair (number of a picture, text) in order its Match, or the exception that it met."""
        vision: dict[int, tuple[F32, F32]] = {}
        failed: dict[int, Exception] = {}
        for start in range(0, len(pairs), check_batch_size(batch_size)):
            batch = pairs[start : start + batch_size]
            wanted = list(dict.fromkeys(index for index, _ in batch))
            vision = {index: found for index, found in vision.items() if index in wanted}
            pixels, errors = read_pictures(
                self.model, self.processor, pictures, [i for i in wanted if i not in vision and i not in failed]
            )
            failed.update(errors)
            if pixels:
                stages = self.model._core.encode_stages(np.concatenate(list(pixels.values())))
                vision.update(zip(pixels, zip(stages["vision"], stages["embeds"], strict=True), strict=True))
            yield from self._matches(batch, vision, failed)

    def _matches(
        self,
        batch: Sequence[tuple[int, str]],
        vision: dict[int, tuple[F32, F32]],
        failed: dict[int, Exception],
    ) -> Iterator[Any]:
        results: dict[int, Any] = {}
        ready: dict[int, list[int]] = {}
        for place, (index, text) in enumerate(batch):
            try:
                if index in failed:
                    raise failed[index]
                ready[place] = self.token_ids(text)
            except ROW_ERRORS as error:
                results[place] = error
        if ready:
            packed, seen = pack_texts(list(ready.values())), [vision[batch[place][0]] for place in ready]
            core = self.model._core
            logits = core.encode_stages(image_embeds=np.stack([states for states, _ in seen]), text=packed)["match"]
            words = core.read_texts(packed)["embeds"][packed[1][:-1]]
            for row, (place, (_, embeds)) in enumerate(zip(ready, seen, strict=True)):
                cosine = core.similarity(np.ascontiguousarray(embeds[None]), np.ascontiguousarray(words[row : row + 1]))
                no, yes = np.asarray(logits[row], np.float64)
                probability = float(1.0 / (1.0 + np.exp(np.clip(no - yes, -700, 700))))
                results[place] = Match(probability, float(cosine[0, 0]), float(yes))
        for place in range(len(batch)):
            yield results[place]

    def token_ids(self, text: Any) -> list[int]:
        """Ids of a text as the Q-Former reads it. Raises TypeError or ValueError saying which text and why."""
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, found {type(text).__name__}")
        if not text.strip():
            raise ValueError("a text is empty: there is nothing to compare with a picture")
        ids = list(self.processor.tokenizer(text, verbose=False)["input_ids"])
        qformer, shown = self.model._core_config["qformer"], text if len(text) <= 40 else f"{text[:37]}..."
        if len(ids) > int(qformer["max_position_embeddings"]):
            raise ValueError(
                f"text {shown!r} is {len(ids)} tokens long, the Q-Former has positions for"
                f" {qformer['max_position_embeddings']}"
            )
        if not ids or max(ids) >= int(qformer["vocab_size"]):
            raise ValueError(
                f"text {shown!r}: token {max(ids, default=None)} is outside the Q-Former's vocabulary of"
                f" {qformer['vocab_size']}"
            )
        return ids

    def __repr__(self) -> str:
        return f"Matcher({self.model!r})"


def collect(results: Iterator[Any], total: int, batch_size: int, progress: bool | None, errors: str) -> list[Any]:
    """All results; the first exception among them is raised unless errors is "return"."""
    if errors not in ("raise", "return"):
        raise ValueError(f'errors must be "raise" or "return", found {errors!r}')
    if not total:
        raise ValueError("there is nothing to do: no pictures, or no texts")
    found: list[Any] = []
    with progress_bar(total, batch_size, progress) as bar:
        for result in results:
            if isinstance(result, Exception) and errors == "raise":
                raise result
            found.append(result)
            bar.update(1)
    return found
