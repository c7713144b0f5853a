"""Evaluation on the usual files: captions (CIDEr-D, BLEU), answers (VQA accuracy), retrieval (recall at 1, 5, 10).

Datasets are read as they are published: Karpathy's splits (dataset_coco.json, dataset_flickr30k.json) or the lists made
from them (coco_karpathy_test.json), VQA's questions and annotations, or one list of both. A picture that can not be
read stops an evaluation: a figure over some of the pictures is no result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c.api import DEFAULT_BATCH, progress_bar
from blip2c.caption_metrics import CaptionScores, caption_scores, vqa_accuracy
from blip2c.captions import Caption

__all__ = [
    "DatasetError", "PictureTexts", "Question", "RetrievalScores", "VqaScores", "evaluate_captions",
    "evaluate_retrieval", "evaluate_vqa", "read_captions", "read_questions", "recalls",
]  # fmt: skip

SHORT_ANSWER = "Question: {} Short answer:"
K_TEST = 128
_OUT_OF_REACH = -100.0  # the score of what was not re-ranked, as in the paper's code


class DatasetError(ValueError):
    """A dataset's file is not of the form it should be: the message names the file and the entry."""


@dataclass(frozen=True)
class PictureTexts:
    """A picture of a caption dataset: its file, and what people wrote about it."""

    image: str
    texts: list[str]


@dataclass(frozen=True)
class Question:
    """A question of a VQA dataset: the picture's file, and what people answered (empty: not known)."""

    number: int | str
    image: str
    question: str
    answers: list[str]


def _read_json(path: str | os.PathLike[str]) -> Any:
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: is no JSON: {error}") from None


def _get(entry: Any, key: str, kind: type, where: str) -> Any:
    if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
        found = type(entry).__name__ if not isinstance(entry, dict) else repr(entry.get(key))[:40]
        raise DatasetError(f"{where}: expected {key!r} of type {kind.__name__}, found {found}")
    return entry[key]


def read_captions(
    path: str | os.PathLike[str], images: str | os.PathLike[str] = ".", split: str = "test"
) -> list[PictureTexts]:
    """The pictures of a split in Karpathy's form, or all of a list of {"image", "caption": [..]}.

    images: the folder that the pictures' names are relative to. Raises DatasetError.
    """
    data, root = _read_json(path), Path(images)
    found: list[PictureTexts] = []
    if isinstance(data, list):
        for place, entry in enumerate(data):
            where = f"{path}: entry {place}"
            texts = entry.get("caption") if isinstance(entry, dict) else None
            texts = [texts] if isinstance(texts, str) else texts
            found.append(PictureTexts(str(root / _get(entry, "image", str, where)), _texts(texts, where)))
    else:
        for place, entry in enumerate(_get(data, "images", list, str(path))):
            where = f"{path}: images[{place}]"
            if _get(entry, "split", str, where) != split:
                continue
            sentences = _get(entry, "sentences", list, where)
            raw = [_get(sentence, "raw", str, where) for sentence in sentences]
            below = _get(entry, "filepath", str, where) if entry.get("filepath") else ""
            name = Path(below) / _get(entry, "filename", str, where)
            found.append(PictureTexts(str(root / name), _texts(raw, where)))
    if not found:
        raise DatasetError(f"{path}: holds no pictures of the split {split!r}")
    return found


def _texts(texts: Any, where: str) -> list[str]:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{where}: expected a list of at least one text, found {str(texts)[:40]}")
    return list(texts)


def read_questions(
    questions: str | os.PathLike[str],
    annotations: str | os.PathLike[str] | None = None,
    images: str | os.PathLike[str] = ".",
) -> list[Question]:
    """VQA's questions with their answers: two files as visualqa.org has them, or one list of {"image", "question",
    "question_id", "answer": [..]}.

    images: the folder of the pictures; those that are known by number are looked for there and in its folder of the
    data's subtype, as COCO_val2014_000000000042.jpg or 000000000042.jpg. Raises DatasetError.
    """
    data, root = _read_json(questions), Path(images)
    if isinstance(data, list):
        found = []
        for place, entry in enumerate(data):
            where = f"{questions}: entry {place}"
            image, text = _get(entry, "image", str, where), _get(entry, "question", str, where)
            found.append(
                Question(entry.get("question_id", place), str(root / image), text, _texts(entry.get("answer"), where))
            )
        return found
    answers: dict[Any, list[str]] = {}
    if annotations is not None:
        for place, entry in enumerate(_get(_read_json(annotations), "annotations", list, str(annotations))):
            where = f"{annotations}: annotations[{place}]"
            given = [_get(answer, "answer", str, where) for answer in _get(entry, "answers", list, where)]
            answers[_get(entry, "question_id", int, where)] = _texts(given, where)
    found = []
    for place, entry in enumerate(_get(data, "questions", list, str(questions))):
        where = f"{questions}: questions[{place}]"
        number, text = _get(entry, "question_id", int, where), _get(entry, "question", str, where)
        if annotations is not None and number not in answers:
            raise DatasetError(f"{annotations}: has no answers to question {number}")
        image = _coco_picture(root, _get(entry, "image_id", int, where), str(data.get("data_subtype", "")))
        found.append(Question(number, image, text, answers.get(number, [])))
    return found


def _coco_picture(root: Path, number: int, subtype: str) -> str:
    names = [f"COCO_{subtype}_{number:012d}.jpg", f"{number:012d}.jpg"]
    places = [folder / name for folder in (root, root / subtype) for name in names]
    return str(next((place for place in places if place.exists()), places[0]))


# -- captions and answers -----------------------------------------------------------------------------------------


def _spoken(
    model: Any, images: Sequence[str], rows: Sequence[tuple[int, str | None]], batch_size: int,
    progress: bool | None, options: dict[str, Any],
) -> Iterator[str]:  # fmt: skip
    with progress_bar(len(rows), batch_size, progress) as bar:
        for result in model.stream(images, rows, batch_size, **options):
            if isinstance(result, Exception):
                raise result
            if not isinstance(result, Caption):
                raise ValueError("num_return_sequences: one text a row is scored")
            bar.update(1)
            yield str(result)


def evaluate_captions(
    model: Any,
    data: Sequence[PictureTexts],
    *,
    prompt: str | None = None,
    batch_size: int = DEFAULT_BATCH,
    progress: bool | None = None,
    **options: Any,
) -> tuple[CaptionScores, list[str]]:
    """Captions of all pictures and their scores. options: of generate(); here 5 beams and 30 tokens, if not given."""
    if not data:
        raise ValueError("data is empty")
    options = {"num_beams": 5, "max_new_tokens": 30, **options}
    rows = [(place, prompt) for place in range(len(data))]
    captions = list(_spoken(model, [d.image for d in data], rows, batch_size, progress, options))
    return caption_scores(captions, [d.texts for d in data]), captions


@dataclass(frozen=True)
class VqaScores:
    """accuracy: between 0 and 1, the mean over all questions. accuracies: of each."""

    accuracy: float
    accuracies: list[float]

    def __str__(self) -> str:
        return f"VQA accuracy {100 * self.accuracy:.2f} ({len(self.accuracies)} questions)"


def evaluate_vqa(
    model: Any,
    data: Sequence[Question],
    *,
    template: str = SHORT_ANSWER,
    batch_size: int = DEFAULT_BATCH,
    progress: bool | None = None,
    **options: Any,
) -> tuple[VqaScores, list[str]]:
    """Answers to all questions and their accuracy. options: of generate(); as in the paper 5 beams, 10 tokens and a
    length penalty of -1, if not given. template: how a question is put, with {} for it."""
    if not data:
        raise ValueError("data is empty")
    if "{}" not in template:
        raise ValueError(f"template must hold {{}} where the question goes, found {template!r}")
    silent = next((q for q in data if not q.answers), None)
    if silent is not None:
        raise ValueError(f"question {silent.number} has no answers to compare with")
    options = {"num_beams": 5, "max_new_tokens": 10, "length_penalty": -1.0, **options}
    # Questions on one picture stand together, so that it is encoded once.
    images = list(dict.fromkeys(q.image for q in data))
    places = {image: place for place, image in enumerate(images)}
    order = sorted(range(len(data)), key=lambda i: places[data[i].image])
    rows = [(places[data[i].image], template.replace("{}", data[i].question)) for i in order]
    answers = [""] * len(data)
    for i, answer in zip(order, _spoken(model, images, rows, batch_size, progress, options), strict=True):
        answers[i] = answer
    scores = [vqa_accuracy(answer, q.answers) for answer, q in zip(answers, data, strict=True)]
    return VqaScores(float(np.mean(scores)), scores), answers


# -- retrieval ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RetrievalScores:
    """Recall at 1, 5 and 10, between 0 and 1: text_recall of texts for a picture (TR), image_recall of pictures for a
    text (IR)."""

    text_recall: dict[int, float]
    image_recall: dict[int, float]

    def __str__(self) -> str:
        def line(name: str, values: dict[int, float]) -> str:
            return ", ".join(f"{name}@{k} {100 * value:.2f}" for k, value in values.items())

        return f"{line('TR', self.text_recall)}; {line('IR', self.image_recall)}"


def recalls(scores: NDArray[np.floating[Any]], right: Sequence[Sequence[int]]) -> dict[int, float]:
    """Of scores [A, B]: in which share of the rows one of right[a] is among the 1, 5, 10 best (of equals the first)."""
    order = np.argsort(-np.asarray(scores), axis=1, kind="stable")
    rank = [
        int(np.flatnonzero(np.isin(row, list(wanted)))[0]) if len(wanted) else len(row)
        for row, wanted in zip(order, right, strict=True)
    ]
    return {k: float(np.mean([r < k for r in rank])) for k in (1, 5, 10)}


def evaluate_retrieval(
    model: Any,
    data: Sequence[PictureTexts],
    *,
    k_test: int = K_TEST,
    batch_size: int = DEFAULT_BATCH,
    progress: bool | None = None,
) -> RetrievalScores:
    """Recall in both directions with the paper's protocol: of the k_test nearest by cosine (ITC) each pair is read
    together (ITM) and ranked by logit + cosine; the others come behind (BLIP-2 paper, section 4.4).

    k_test=0: by the cosine alone. Texts are read whole (the paper's code cuts them at 35 tokens).
    """
    if not data:
        raise ValueError("data is empty")
    if isinstance(k_test, bool) or not isinstance(k_test, int) or k_test < 0:
        raise ValueError(f"k_test must be an integer of at least 0, found {k_test!r}")
    images = [d.image for d in data]
    texts = [text for d in data for text in d.texts]
    owner = np.repeat(np.arange(len(data)), [len(d.texts) for d in data])
    cosines = _cosines(model, images, texts, batch_size, progress)
    by_image, by_text = cosines, cosines.T
    if k_test:
        near_texts = _nearest(cosines, k_test)
        near_images = _nearest(cosines.T, k_test)
        logits = _logits(model, images, texts, near_texts | near_images.T, batch_size, progress)
        by_image = np.where(near_texts, logits + cosines, _OUT_OF_REACH)
        by_text = np.where(near_images, (logits + cosines).T, _OUT_OF_REACH)
    return RetrievalScores(
        recalls(by_image, [np.flatnonzero(owner == place).tolist() for place in range(len(data))]),
        recalls(by_text, [[int(place)] for place in owner]),
    )


def _cosines(
    model: Any, images: Sequence[str], texts: Sequence[str], batch_size: int, progress: bool | None
) -> NDArray[np.float32]:
    """[pictures, texts]"""
    vectors = model.embed(images, batch_size=batch_size, progress=progress)
    words = np.concatenate([model.embed_text(texts[i : i + 256]) for i in range(0, len(texts), 256)])
    found: NDArray[np.float32] = model.similarity(vectors, words)
    return found


def _nearest(scores: NDArray[np.float32], k: int) -> NDArray[np.bool_]:
    """Where the k largest of each row stand."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order, True, axis=1)
    return found


def _logits(
    model: Any, images: Sequence[str], texts: Sequence[str], wanted: NDArray[np.bool_], batch_size: int,
    progress: bool | None,
) -> NDArray[np.float64]:  # fmt: skip
    """ITM logits of the pairs that are wanted [pictures, texts], 0 elsewhere; every picture is encoded once."""
    where = np.argwhere(wanted)
    logits = np.zeros(wanted.shape)
    pairs = [(int(i), texts[j]) for i, j in where]
    with progress_bar(len(pairs), batch_size, progress) as bar:
        for (i, j), found in zip(where, model.stream_logits(images, pairs, batch_size), strict=True):
            if isinstance(found, Exception):
                raise found
            logits[i, j] = found[1]
            bar.update(1)
    return logits
