"""A picture index: find pictures by words, or by another picture.

    model = blip2c.load("Salesforce/blip2-itm-vit-g")
    index = blip2c.Index.create("holiday.index", model)
    index.add("pictures")                     # again later: only what is new or was changed
    print(index.search("a dog on the beach"))

Every picture is kept as its query vectors (32 of 256 numbers). A text's score with a picture is the largest cosine of
its one vector with any of the picture's (ITC); all pictures are compared, nothing is approximated. The best may then be
read again together with the text (ITM): score = logit of "yes" + cosine, as in the paper's evaluation (BLIP-2 paper,
section 4.4). Equal scores stand in the order in which pictures were added.

For collections that outgrow an exact search `Index.vectors()` gives the vectors for any other library. In faiss::

    faiss_index = faiss.index_factory(256, "HNSW32", faiss.METRIC_INNER_PRODUCT)
    for start in range(0, index.records, 4096):
        faiss_index.add(index.vectors(start, start + 4096).reshape(-1, 256))
    cosines, ids = faiss_index.search(model.embed_text(["a dog"]), 1000)
    entries = ids // index.queries            # each several times: keep the first
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from blip2c import _core, index_files
from blip2c.api import DEFAULT_BATCH, check_count, progress_bar
from blip2c.images import EXTENSIONS, is_picture
from blip2c.index_files import DTYPES, Header
from blip2c.matcher import match_probability

__all__ = ["Added", "Hit", "Hits", "Index"]

_COMMIT_SECONDS, _COMMIT_PICTURES = 10.0, 1024
_SCORES_AT_ONCE = 1 << 26  # of one pass over the vectors: 256 MiB


@dataclass(frozen=True)
class Hit:
    """A picture that was found.

    path: as it was added. score: what hits are ranked by: the cosine, or after re-ranking logit + cosine. cosine: of
    the nearest of the picture's vectors, between -1 and 1. logit, probability: of "this text belongs to this picture"
    (ITM), None where the picture was not re-ranked. error: why it could not be (its file is gone, say), or None.
    entry: number of the picture in the index.
    """

    path: str
    score: float
    cosine: float
    logit: float | None = None
    probability: float | None = None
    error: Exception | None = None
    entry: int = -1

    def __str__(self) -> str:
        more = "" if self.probability is None else f"  probability {self.probability:.4f}"
        failed = "" if self.error is None else f"  [{type(self.error).__name__}: {self.error}]"
        return f"cosine {self.cosine:+.4f}{more}  {self.path}{failed}"


class Hits(list[Hit]):
    """Hits of one query, the best first. Prints as one line a picture. query: the words, or the picture's name."""

    def __init__(self, hits: Iterable[Hit], query: str) -> None:
        super().__init__(hits)
        self.query = query

    def __str__(self) -> str:
        return "\n".join(map(str, self))


@dataclass(frozen=True)
class Added:
    """What add() did. added, known: pictures new and passed over. errors: (path, exception) of what can not be read."""

    added: int
    known: int
    errors: list[tuple[str, Exception]] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.added} added, {self.known} known, {len(self.errors)} failed"]
        return "\n".join([*lines, *(f"{path}: [{type(e).__name__}: {e}]" for path, e in self.errors)])


def model_identity(model: Any) -> dict[str, str]:
    """What an index remembers of the model that made it: name, a digest of its weights, how its parts are held.

    The digest is of all biases and norms: training changes them, holding the matrices in another dtype does not.
    """
    core, digest = model.model._core, sha256()
    for name in sorted(core.weight_names()):
        if name.endswith((".bias", "norm.weight", "norm1.weight", "norm2.weight", "LayerNorm.weight")):
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(core.weights(name)[name], np.float32).tobytes())
    held = ", ".join(f"{part} {dtype}" for part, dtype in sorted(core.dtypes.items()))
    return {"name": str(model.model.name_or_path), "fingerprint": digest.hexdigest(), "dtypes": held}


@dataclass(frozen=True)
class _Contents:
    """What an index holds at one time: who searches takes it once, who adds puts a new one in its place.

    newest: for each path its entry. replaced: entries of files as they were before they changed.
    """

    header: Header
    entries: list[dict[str, Any]]
    records: NDArray[np.uint8]
    newest: dict[str, int]
    replaced: list[int]

    @classmethod
    def read(cls, folder: Path, header: Header, check: bool) -> _Contents:
        empty = cls(header, [], np.zeros((0, header.record), np.uint8), {}, [])
        return empty.grown(folder, header, index_files.read_entries(folder, header), check)

    def grown(self, folder: Path, header: Header, entries: Sequence[dict[str, Any]], check: bool) -> _Contents:
        """With more entries; header: of all of them."""
        newest, replaced = dict(self.newest), list(self.replaced)
        for number, entry in enumerate(entries, len(self.entries)):
            if entry["path"] in newest:
                replaced.append(newest[entry["path"]])
            newest[entry["path"]] = number
        records = index_files.map_records(folder, header, check)
        return _Contents(header, [*self.entries, *entries], records, newest, replaced)

    @property
    def places(self) -> list[int]:
        """Entries of the pictures, in the order in which they were added."""
        return sorted(self.newest.values())

    def scores(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """[T, P] -> [T, entries]"""
        header = self.header
        return _core._picture_scores(np.ascontiguousarray(vectors), self.records, header.queries, header.dtype)

    def best(self, scores: NDArray[np.float32], k: int) -> list[list[Hit]]:
        """The k best of each row of scores()."""
        if not self.newest:
            return [[] for _ in scores]
        scores[:, self.replaced] = -np.inf
        values, found = _core._top_k(scores, min(k, len(self.newest)), "cpu")
        return [
            [Hit(self.entries[e]["path"], float(v), float(v), entry=int(e)) for v, e in zip(row, ids, strict=True)]
            for row, ids in zip(values, found, strict=True)
        ]


class Index:
    """Pictures in a folder of their own, to be searched. Made by Index.create() and Index.open().

    model: what blip2c.load() gives of a retrieval checkpoint. Threads may search one index; one of them may add.
    """

    def __init__(self, folder: Path, header: Header, model: Any, check: bool) -> None:
        """Use Index.create() or Index.open()."""
        self.folder, self.model = folder, model
        self._now = _Contents.read(folder, header, check)

    @classmethod
    def create(cls, folder: str | os.PathLike[str], model: Any, dtype: str = "float16") -> Index:
        """An empty index in `folder`, which must not hold one. dtype: of the vectors, "float16" or "int8" (half as
        large, twice as fast, cosines within about 0.003)."""
        path = Path(folder)
        _check_model(model)
        if dtype not in DTYPES:
            raise ValueError(f'dtype: expected "float16" or "int8", found {dtype!r}')
        if (path / index_files.HEADER).exists():
            raise FileExistsError(f"{path}: holds an index already; use Index.open()")
        path.mkdir(parents=True, exist_ok=True)
        core = model.model._core_config
        header = Header(
            model_identity(model), dtype, int(core["num_query_tokens"]), int(core["heads"]["projection_size"])
        )
        index_files.write_header(path, header)
        return cls(path, header, model, check=False)

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str], model: Any = None, dtype: str | None = None, check: bool = True
    ) -> Index:
        """The index in `folder`.

        model: the one it was made with; without it, vectors alone can be searched. dtype: what the vectors are expected
        to be. check: compare the checksum of all vectors, which reads them once. Raises FileNotFoundError where there
        is no index, CheckpointError where it is damaged, ValueError naming both where it was made with another model,
        the same held in other dtypes, or vectors of another dtype.
        """
        path = Path(folder)
        header = index_files.read_header(path)
        if dtype is not None and dtype != header.dtype:
            raise ValueError(f"{path}: holds vectors of {header.dtype}, asked for {dtype}")
        if model is not None:
            _check_model(model)
            _check_identity(path, header.model, model_identity(model))
        return cls(path, header, model, check)

    def __len__(self) -> int:
        return len(self._now.newest)

    def __repr__(self) -> str:
        return f"Index({str(self.folder)!r}, {len(self)} pictures, {self.dtype}, made with {self.made_with['name']})"

    @property
    def dtype(self) -> str:
        """Of the vectors: "float16" or "int8"."""
        return self._now.header.dtype

    @property
    def queries(self) -> int:
        """Vectors a picture."""
        return self._now.header.queries

    @property
    def records(self) -> int:
        """Entries of the files: the pictures, and what pictures were before their files changed."""
        return self._now.header.count

    @property
    def made_with(self) -> dict[str, str]:
        """{"name", "fingerprint", "dtypes"} of the model."""
        return dict(self._now.header.model)

    @property
    def paths(self) -> list[str]:
        """Of the pictures, in the order in which they were added."""
        now = self._now
        return [now.entries[entry]["path"] for entry in now.places]

    def vectors(self, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
        """float32 [N, Q, P]: the vectors of entries start to stop, as they are held."""
        now = self._now
        records = np.asarray(now.records[start:stop])
        return index_files.unpack_records(records, now.header.queries, now.header.width, now.header.dtype)

    # -- adding ---------------------------------------------------------------------------------------------------

    def add(
        self,
        pictures: Any,
        *,
        names: Sequence[str] | None = None,
        recursive: bool = True,
        batch_size: int = DEFAULT_BATCH,
        progress: bool | None = None,
    ) -> Added:
        """Add pictures: a folder, a path, or a list of paths; or, with `names`, bytes, Pillow images and arrays.

        A picture whose path (or name) is known and whose file has not changed is passed over; one whose file has
        changed is read anew. What can not be read is reported in Added.errors, the rest is indexed. Interrupted (Ctrl-C
        or worse), what was written stays, and the same call goes on from there. progress: True, False or None for a bar
        where stderr is a terminal. Raises BlockingIOError where another process is adding.
        """
        _check_model(self.model)
        sources = _sources(pictures, names, recursive)
        with index_files.only_writer(self.folder):
            self._catch_up()
            errors: list[tuple[str, Exception]] = []
            wanted = self._unknown(sources, errors)
            known = len(sources) - len(wanted) - len(errors)
            added = self._add(wanted, batch_size, progress, errors)
        return Added(added, known, errors)

    def _catch_up(self) -> None:
        """Another process may have added since this index was opened."""
        header = index_files.read_header(self.folder)
        if header != self._now.header:
            self._now = _Contents.read(self.folder, header, check=False)

    def _unknown(
        self, sources: Sequence[tuple[str, Any]], errors: list[tuple[str, Exception]]
    ) -> list[tuple[dict[str, Any], Any]]:
        wanted: dict[str, tuple[dict[str, Any], Any]] = {}
        for name, source in sources:
            try:
                # Of a picture without a file only the name is known.
                stamp = _stamp(source) if isinstance(source, str | os.PathLike) else None
            except OSError as error:
                errors.append((name, error))
                continue
            known = self._now.newest.get(name)
            if name not in wanted and (known is None or self._now.entries[known].get("stamp") != stamp):
                wanted[name] = {"path": name, "stamp": stamp}, source
        return list(wanted.values())

    def _add(
        self,
        wanted: Sequence[tuple[dict[str, Any], Any]],
        batch_size: int,
        progress: bool | None,
        errors: list[tuple[str, Exception]],
    ) -> int:
        waiting: list[tuple[dict[str, Any], NDArray[np.float32]]] = []
        before, last = self._now.header.count, time.monotonic()
        found = self.model.stream_embeddings([source for _, source in wanted], batch_size)
        with progress_bar(len(wanted), batch_size, progress) as bar:
            try:
                for (entry, _), vectors in zip(wanted, found, strict=True):
                    if isinstance(vectors, Exception):
                        errors.append((entry["path"], vectors))
                    else:
                        waiting.append((entry, vectors))
                    bar.update(1)
                    if len(waiting) >= _COMMIT_PICTURES or time.monotonic() - last >= _COMMIT_SECONDS:
                        self._commit(waiting)
                        last = time.monotonic()
            finally:
                self._commit(waiting)
        return self._now.header.count - before

    def _commit(self, waiting: list[tuple[dict[str, Any], NDArray[np.float32]]]) -> None:
        if not waiting:
            return
        vectors, entries = np.stack([v for _, v in waiting]), [entry for entry, _ in waiting]
        waiting.clear()
        records = index_files.pack_records(vectors, self.dtype)
        header = index_files.append(self.folder, self._now.header, records, entries)
        self._now = self._now.grown(self.folder, header, entries, check=False)

    # -- searching ------------------------------------------------------------------------------------------------

    def search(
        self, texts: str | Sequence[str], k: int = 10, *, rerank: int = 0, batch_size: int = DEFAULT_BATCH
    ) -> Any:
        """The k pictures nearest to a text, best first: Hits; of several texts a list of Hits, in one pass.

        rerank: how many of the nearest pictures are read again together with the text (ITM) and ranked by logit +
        cosine; each costs as much as adding it. The paper takes 128. Those that can not be read any more stand
        behind the others, with an error.
        """
        _check_model(self.model)
        one = isinstance(texts, str)
        asked = [texts] if isinstance(texts, str) else list(texts)
        if not asked:
            raise ValueError("texts is empty")
        check_count("rerank", rerank, 0)
        found = self.search_vectors(self.model.embed_text(asked), max(check_count("k", k, 1), rerank))
        results = []
        for text, hits in zip(asked, found, strict=True):
            again = [hit.path for hit in hits[:rerank]]
            ranked = rerank_hits(self.model, text, hits[:rerank], again, batch_size) + hits[rerank:]
            results.append(Hits(ranked[:k], text))
        return results[0] if one else results

    def search_picture(self, image: Any, k: int = 10) -> Hits:
        """The k pictures most like a picture, best first.

        The cosine is the mean over the picture's own vectors of the nearest of the other's: 1 for the same picture. (No
        paper defines it; ITM compares pictures with texts only.)
        """
        _check_model(self.model)
        check_count("k", k, 1)
        if not is_picture(image):
            raise TypeError(f"image: expected one picture, found {type(image).__name__}")
        vectors, now = np.ascontiguousarray(self.model.embed(image), np.float32), self._now
        scores = now.scores(vectors).mean(axis=0, keepdims=True, dtype=np.float64).astype(np.float32)
        name = str(os.fspath(image)) if isinstance(image, str | os.PathLike) else "picture"
        return Hits(now.best(scores, k)[0], name)

    def search_vectors(self, vectors: NDArray[np.float32], k: int = 10) -> list[list[Hit]]:
        """The k nearest pictures of each of vectors [T, P] (text vectors of length 1), best first."""
        vectors, now = np.ascontiguousarray(vectors), self._now
        if vectors.ndim != 2 or vectors.dtype != np.float32 or vectors.shape[1] != now.header.width:
            raise ValueError(
                f"vectors: expected float32 [T, {now.header.width}], found {vectors.dtype} {list(vectors.shape)}"
            )
        if not np.isfinite(vectors).all():
            raise _core.NumericError("vectors: hold values that are not finite")
        check_count("k", k, 1)
        step = max(1, _SCORES_AT_ONCE // max(1, now.header.count))
        found: list[list[Hit]] = []
        for start in range(0, len(vectors), step):
            found.extend(now.best(now.scores(vectors[start : start + step]), k))
        return found

    def scores(self, texts: str | Sequence[str]) -> NDArray[np.float32]:
        """[T, N]: the cosine of every text with every picture, in the order of `paths`."""
        _check_model(self.model)
        vectors = np.atleast_2d(self.model.embed_text([texts] if isinstance(texts, str) else list(texts)))
        now = self._now
        return np.ascontiguousarray(now.scores(vectors)[:, now.places])


def rerank_hits(model: Any, text: str, hits: Sequence[Hit], pictures: Sequence[Any], batch_size: int) -> list[Hit]:
    """Hits read again together with the text and ranked by logit + cosine; those that fail stand behind the others.

    pictures: where each hit's picture is read from.
    """
    found = model.stream_logits(pictures, [(place, text) for place in range(len(hits))], batch_size)
    done: list[Hit] = []
    failed: list[Hit] = []
    for hit, logits in zip(hits, found, strict=True):
        if isinstance(logits, Exception):
            failed.append(replace(hit, error=logits))
        else:
            yes = float(logits[1])
            done.append(replace(hit, score=yes + hit.cosine, logit=yes, probability=match_probability(logits)))
    return sorted(done, key=lambda hit: (-hit.score, hit.entry)) + failed


def is_index(place: Any) -> bool:
    """Whether it is an Index, or the folder of one."""
    if isinstance(place, str | os.PathLike):
        return (Path(place) / index_files.HEADER).is_file()
    return isinstance(place, Index)


def _check_model(model: Any) -> None:
    if model is None:
        raise ValueError("this index was opened without a model: Index.open(folder, model)")
    if not hasattr(model, "stream_embeddings"):
        raise TypeError(
            f"model: expected what blip2c.load() gives of a retrieval checkpoint, found {type(model).__name__}"
        )


def _check_identity(path: Path, made: dict[str, str] | Any, found: dict[str, str]) -> None:
    if made["fingerprint"] != found["fingerprint"]:
        same = " (other weights under the same name)" if made["name"] == found["name"] else ""
        raise ValueError(f"{path}: was made with {made['name']}, opened with {found['name']}{same}")
    if made["dtypes"] != found["dtypes"]:
        raise ValueError(
            f"{path}: was made with {made['name']} held as {made['dtypes']}, opened with {found['name']} held as"
            f" {found['dtypes']}"
        )


def _stamp(source: str | os.PathLike[str]) -> list[int]:
    try:
        info = os.stat(source)
    except FileNotFoundError:
        raise FileNotFoundError(f"{os.fspath(source)}: no such picture") from None
    return [info.st_size, info.st_mtime_ns]


def pictures_in(folder: str | os.PathLike[str], recursive: bool = True) -> list[str]:
    """Paths of the pictures in a folder, by the ends of their names, sorted."""
    inside = Path(folder).rglob("*") if recursive else Path(folder).iterdir()
    return sorted(str(path) for path in inside if path.suffix.lower() in EXTENSIONS and path.is_file())


def _sources(pictures: Any, names: Sequence[str] | None, recursive: bool) -> list[tuple[str, Any]]:
    """(name, source) of each; the name of a file is its absolute path."""
    if isinstance(pictures, str | os.PathLike) and os.path.isdir(pictures):
        pictures = pictures_in(pictures, recursive)
    given = [pictures] if is_picture(pictures) else list(pictures)
    if names is not None:
        labels = [names] if isinstance(names, str) else list(names)
        if len(labels) != len(given) or not all(isinstance(label, str) and label for label in labels):
            raise ValueError(f"names: expected {len(given)} strings, one a picture, found {len(labels)}")
        if any(isinstance(picture, str | os.PathLike) for picture in given):
            raise ValueError("names: a picture with a path is called by its path")
        return list(zip(labels, given, strict=True))
    for place, picture in enumerate(given):
        if not isinstance(picture, str | os.PathLike):
            raise ValueError(f"picture {place} is no path ({type(picture).__name__}): pass names")
    return [(os.path.abspath(os.fspath(picture)), os.path.abspath(os.fspath(picture))) for picture in given]
