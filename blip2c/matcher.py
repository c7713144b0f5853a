"""The friendly spelling of retrieval: `m = blip2c.load(folder); m.match("cat.jpg", ["a cat", "a dog"])`.

Texts are packed, never padded: each gives the same bits whatever stands beside it, and so does each picture.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from blip2c.api import DEFAULT_BATCH, check_batch_size, check_count, listed, progress_bar, read_pictures
from blip2c.attention_maps import AttentionMaps, attention_maps
from blip2c.captions import Captions, picture_name
from blip2c.images import is_picture
from blip2c.inputs import check_embeds, pack_texts
from blip2c.processing import Blip2Processor
from blip2c.prompts import ROW_ERRORS
from blip2c.retrieval import Blip2ForImageTextRetrieval

F32 = NDArray[np.float32]
# Texts that go through together; those of one picture share its keys and values (csrc/model/retrieval.c).
TEXTS_AT_ONCE = 64


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


class _Encoded(NamedTuple):
    """A picture: what the vision encoder gives [T, Dv], and its vectors [Q, P]."""

    states: F32
    embeds: F32


class Matcher:
    """A loaded retrieval model for people: match(), search(), embed(), embed_text(), similarity(),
    attention_maps().

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

        One picture and several texts: the picture is encoded once, and its keys and values once for 64 texts. Several
        pictures: one text for all, or one each. Other arguments as in embed().
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

    def search(
        self,
        query: Any,
        pictures: Any,
        k: int = 10,
        *,
        rerank: int = 0,
        batch_size: int = DEFAULT_BATCH,
        progress: bool | None = None,
    ) -> Any:
        """The k pictures nearest to words, or to a picture, best first: Hits; of a list of texts a list of Hits.

        query: a string or a list of them is words; a picture is anything else that embed() takes (a path as a
        pathlib.Path). pictures: a blip2c.Index or the folder of one, a folder of pictures, or an iterable of pictures,
        which are then encoded now. rerank: how many of the nearest are read again together with the words; see
        Index.search(), and Index.search_picture() for what a cosine of two pictures is. Raises as embed() does.
        """
        from blip2c.index import Index, is_index, pictures_in

        asked = None if is_picture(query) and not isinstance(query, str) else query
        counts = check_count("k", k, 1), check_count("rerank", rerank, 0)
        if asked is None and rerank:
            raise ValueError("rerank: a picture is read together with words only")
        if is_index(pictures):
            index = pictures if isinstance(pictures, Index) else Index.open(pictures, self)
            if asked is None:
                return index.search_picture(query, k)
            return index.search(asked, k, rerank=rerank, batch_size=batch_size)
        if isinstance(pictures, str | os.PathLike) and os.path.isdir(pictures):
            pictures = pictures_in(pictures)
        shown = [pictures] if is_picture(pictures) else listed("pictures", pictures)
        vectors = self.embed(shown, batch_size=batch_size, progress=progress)
        return self._search(query, asked, shown, vectors, counts, batch_size)

    def _search(
        self, query: Any, asked: Any, shown: list[Any], vectors: F32, counts: tuple[int, int], batch_size: int
    ) -> Any:
        """search() among pictures whose vectors [B, Q, P] are at hand."""
        from blip2c.index import Hit, Hits, rerank_hits

        k, rerank = counts

        def nearest(cosines: F32) -> list[Hit]:
            order = np.argsort(-cosines, kind="stable")[: max(k, rerank)]
            names = [picture_name(shown[i], int(i)) for i in order]
            return [
                Hit(name, float(cosines[i]), float(cosines[i]), entry=int(i))
                for name, i in zip(names, order, strict=True)
            ]

        if asked is None:
            return Hits(nearest(self.similarity(vectors, self.embed(query)).mean(axis=1))[:k], picture_name(query, 0))
        words = [asked] if isinstance(asked, str) else listed("query", asked)
        cosines, results = self.similarity(vectors, np.atleast_2d(self.embed_text(words))), []
        for column, text in enumerate(words):
            hits = nearest(cosines[:, column])
            again = [shown[hit.entry] for hit in hits[:rerank]]
            ranked = rerank_hits(self, text, hits[:rerank], again, batch_size) + hits[rerank:]
            results.append(Hits(ranked[:k], text))
        return results[0] if isinstance(asked, str) else results

    def attention_maps(self, image: Any, text: str | None = None) -> AttentionMaps:
        """Where the Q-Former looks in a picture, read alone or together with a text: see blip2c.AttentionMaps."""
        return attention_maps(self.model, self.processor, image, None if text is None else self.token_ids(text))

    def stream_matches(
        self, pictures: Sequence[Any], pairs: Sequence[tuple[int, str]], batch_size: int = DEFAULT_BATCH
    ) -> Iterator[Any]:
        """For each pair (number of a picture, text) in order its Match, or the exception that it met."""
        for batch, encoded, failed in self._encoded(pictures, pairs, batch_size):
            ids, found = self._read(batch, failed)
            if ids:
                logits, cosines = self._logits(batch, ids, encoded), self._cosines(batch, ids, encoded)
                found.update((place, _match(logits[place], cosines[place])) for place in ids)
            yield from (found[place] for place in range(len(batch)))

    def stream_logits(
        self, pictures: Sequence[Any], pairs: Sequence[tuple[int, str]], batch_size: int = DEFAULT_BATCH
    ) -> Iterator[Any]:
        """For each pair in order ITM's logits float32 [2] (no, yes) alone, or the exception that it met."""
        for batch, encoded, failed in self._encoded(pictures, pairs, batch_size):
            ids, found = self._read(batch, failed)
            found.update(self._logits(batch, ids, encoded) if ids else {})
            yield from (found[place] for place in range(len(batch)))

    def _encoded(
        self, pictures: Sequence[Any], pairs: Sequence[tuple[int, str]], batch_size: int
    ) -> Iterator[tuple[Sequence[tuple[int, str]], dict[int, _Encoded], dict[int, Exception]]]:
        """The pairs in batches of batch_size pictures, each picture encoded once while its pairs stand together."""
        known: dict[int, _Encoded] = {}
        failed: dict[int, Exception] = {}
        check_batch_size(batch_size)
        end = 0
        while end < len(pairs):
            start, wanted = end, dict[int, None]()
            while end < len(pairs) and end - start < TEXTS_AT_ONCE:
                if pairs[end][0] not in wanted and len(wanted) == batch_size:
                    break
                wanted[pairs[end][0]] = None
                end += 1
            known = {index: found for index, found in known.items() if index in wanted}
            missing = [index for index in wanted if index not in known and index not in failed]
            pixels, errors = read_pictures(self.model, self.processor, pictures, missing)
            failed.update(errors)
            if pixels:
                stages = self.model._core.encode_stages(np.concatenate(list(pixels.values())))
                known.update(zip(pixels, map(_Encoded, stages["vision"], stages["embeds"]), strict=True))
            yield pairs[start:end], known, failed

    def _read(
        self, batch: Sequence[tuple[int, str]], failed: dict[int, Exception]
    ) -> tuple[dict[int, list[int]], dict[int, Any]]:
        """Of the pairs by their place: the texts' ids; and the exceptions of the others."""
        ids: dict[int, list[int]] = {}
        errors: dict[int, Any] = {}
        for place, (index, text) in enumerate(batch):
            try:
                if index in failed:
                    raise failed[index]
                ids[place] = self.token_ids(text)
            except ROW_ERRORS as error:
                errors[place] = error
        return ids, errors

    def _logits(
        self, batch: Sequence[tuple[int, str]], ids: dict[int, list[int]], encoded: dict[int, _Encoded]
    ) -> dict[int, F32]:
        """[2] by place: pairs of one picture stand together, so that it is read once."""
        numbers = {index: number for number, index in enumerate(dict.fromkeys(batch[place][0] for place in ids))}
        order = sorted(ids, key=lambda place: numbers[batch[place][0]])
        states = np.stack([encoded[index].states for index in numbers])
        picture_of = np.array([numbers[batch[place][0]] for place in order], np.int32)
        logits = self.model._core.match(states, pack_texts([ids[place] for place in order]), picture_of)
        return dict(zip(order, logits, strict=True))

    def _cosines(
        self, batch: Sequence[tuple[int, str]], ids: dict[int, list[int]], encoded: dict[int, _Encoded]
    ) -> dict[int, float]:
        """By place; a text that several pictures are compared with is read once."""
        texts = {text: number for number, text in enumerate(dict.fromkeys(tuple(row) for row in ids.values()))}
        numbers = {index: number for number, index in enumerate(dict.fromkeys(batch[place][0] for place in ids))}
        packed = pack_texts([list(text) for text in texts])
        words = np.ascontiguousarray(self.model._core.read_texts(packed)["embeds"][packed[1][:-1]])
        cosines = self.model._core.similarity(np.stack([encoded[index].embeds for index in numbers]), words)
        return {place: float(cosines[numbers[batch[place][0]], texts[tuple(row)]]) for place, row in ids.items()}

    def token_ids(self, text: Any) -> list[int]:
        """Ids of a text as the Q-Former reads it. Raises TypeError or ValueError saying which text and why."""
        return self.checked_ids(text, self.all_ids(text))

    def all_ids(self, text: Any) -> list[int]:
        """Ids of a text, however many. Raises TypeError or ValueError for what is no text."""
        if not isinstance(text, str):
            raise TypeError(f"a text must be a string, found {type(text).__name__}")
        if not text.strip():
            raise ValueError("a text is empty: there is nothing to compare with a picture")
        return list(self.processor.tokenizer(text, verbose=False)["input_ids"])

    def checked_ids(self, text: str, ids: list[int]) -> list[int]:
        """Ids of a text, if the Q-Former can read them. Raises ValueError saying which text and why."""
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


def _match(logits: F32, cosine: float) -> Match:
    return Match(match_probability(logits), cosine, float(logits[1]))


def match_probability(logits: F32) -> float:
    """Of logits (no, yes): their softmax's "yes"."""
    no, yes = np.asarray(logits, np.float64)
    return float(1.0 / (1.0 + np.exp(np.clip(no - yes, -700, 700))))
