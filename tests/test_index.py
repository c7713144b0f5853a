"""The picture index: what a search finds against NumPy, files that grow, break and are refused, the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import blip2c
from blip2c import CheckpointError, NumericError, _core, cli, index_files
from helpers import random_checkpoint
from running import child_process, run_python

QUERY = "a small red circle"


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.normal(size=shape).astype(np.float32)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def save_pictures(folder: Path, names: list[str], seed: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        values = np.random.default_rng(seed + i).integers(0, 256, (30, 40, 3), np.uint8)
        (folder / name).parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(folder / name)
    return [str(folder / name) for name in names]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("index"), seed=60, retrieval=True, tokenizer=True)


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> Any:
    return blip2c.load(checkpoint)


@pytest.fixture
def names(tmp_path: Path) -> list[str]:
    return save_pictures(tmp_path / "pictures", [f"{i}.png" for i in range(7)] + ["more/7.png"])


# -- the kernel -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize(
    ("texts", "pictures", "queries", "width"), [(1, 40, 32, 256), (33, 25, 32, 256), (16, 19, 17, 70), (3, 5, 4, 600)]
)
def test_scores_against_numpy(texts: int, pictures: int, queries: int, width: int, dtype: str) -> None:
    rng = np.random.default_rng(0)
    vectors, words = unit(rng, pictures, queries, width), unit(rng, texts, width)
    records = index_files.pack_records(vectors, dtype)
    held = index_files.unpack_records(records, queries, width, dtype)
    assert np.abs(held - vectors).max() <= (5e-4 if dtype == "float16" else np.abs(vectors).max() / 254 + 1e-7)
    found = _core._picture_scores(words, records, queries, dtype)
    exact = np.einsum("tp,nqp->tnq", words.astype(np.float64), held.astype(np.float64)).max(axis=2)
    # int8 rounds the words to 16 bits.
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-6 if dtype == "float16" else 2e-5)
    # An element does not depend on what stands beside it.
    for t in (0, texts - 1):
        alone = _core._picture_scores(words[t : t + 1].copy(), records[1:].copy(), queries, dtype)
        assert (alone[0] == found[t, 1:]).all()


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_scores_are_the_same_on_any_number_of_threads(dtype: str) -> None:
    rng = np.random.default_rng(1)
    records, words = index_files.pack_records(unit(rng, 300, 32, 64), dtype), unit(rng, 5, 64)
    threads = blip2c.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            blip2c.set_num_threads(count)
            found.append(_core._picture_scores(words, records, 32, dtype))
    finally:
        blip2c.set_num_threads(threads)
    assert (found[0] == found[1]).all()


SCORES = """
import sys, numpy as np
from blip2c import _core, index_files
rng = np.random.default_rng(2)
vectors = rng.normal(size=(9, 20, 50)).astype(np.float32)
out = [_core._picture_scores(vectors[0, :17].copy(), index_files.pack_records(vectors, d), 20, d)
       for d in ("float16", "int8")]
np.save(sys.argv[1], np.stack(out))
"""


def test_scores_of_every_instruction_set(tmp_path: Path) -> None:
    found = {}
    for isa in ["generic", *(name for name in ("avx2", "avx512", "avx512_vnni") if _core.cpu_info().get(name))]:
        path = tmp_path / f"{isa}.npy"
        done = run_python(SCORES, path, BLIP2C_ISA=isa)
        assert done.returncode == 0, done.stderr
        found[isa] = np.load(path)
    for isa, scores in found.items():
        np.testing.assert_allclose(scores[0], found["generic"][0], rtol=2e-6, atol=1e-5, err_msg=isa)
        assert (scores[1] == found["generic"][1]).all(), isa


def test_scores_refuse_what_does_not_fit() -> None:
    records = index_files.pack_records(unit(np.random.default_rng(0), 3, 4, 20), "float16")
    words = np.zeros((1, 20), np.float32)
    with pytest.raises(ValueError, match="records: expected 640 bytes each"):
        _core._picture_scores(words, records[:, :-1].copy(), 4, "float16")
    with pytest.raises(ValueError, match="expected float16 or int8"):
        _core._picture_scores(words, records, 4, "float32")
    with pytest.raises(ValueError, match="1 to 65536"):
        _core._picture_scores(words, records, 0, "float16")
    with pytest.raises(TypeError, match="texts"):
        _core._picture_scores(words.astype(np.float64), records, 4, "float16")
    _core._fail_allocation_after(1)
    with pytest.raises(MemoryError):
        _core._picture_scores(words, records, 4, "float16")


# -- searching --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "off"), [("float16", 1e-3), ("int8", 0.02)])
def test_a_search_finds_what_the_model_says(
    names: list[str], tmp_path: Path, model: Any, dtype: str, off: float
) -> None:
    index = blip2c.Index.create(tmp_path / "index", model, dtype)
    done = index.add(tmp_path / "pictures")
    assert (done.added, done.known, done.errors) == (8, 0, [])
    texts = [QUERY, "two cats"]
    cosines = model.similarity(model.embed(index.paths), model.embed_text(texts))
    for column, hits in enumerate(index.search(texts, k=20)):
        assert [hit.path for hit in hits] == [index.paths[hit.entry] for hit in hits]
        assert sorted(hit.path for hit in hits) == sorted(names)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
        for hit in hits:
            assert abs(hit.cosine - cosines[hit.entry, column]) < off
    np.testing.assert_allclose(index.scores(texts), cosines.T, atol=off)
    assert [hit.path for hit in index.search(QUERY, k=3)] == [hit.path for hit in index.search(texts, k=20)[0][:3]]
    assert index.vectors(2, 4).shape == (2, 4, 12)
    best = index.search_picture(names[3])
    assert best[0].path == names[3]
    assert best[0].cosine == pytest.approx(1, abs=off)


def test_reranking_is_logit_plus_cosine(names: list[str], tmp_path: Path, model: Any) -> None:
    index = blip2c.Index.create(tmp_path / "index", model)
    index.add(names)
    plain = index.search(QUERY, k=8)
    first, rest = plain[:5], plain[5:]
    os.unlink(first[1].path)
    hits = index.search(QUERY, k=8, rerank=5)
    readable = [hit for hit in first if hit is not first[1]]
    logits = [model.match(hit.path, QUERY).logit for hit in readable]
    order = np.argsort([-(logit + hit.cosine) for logit, hit in zip(logits, readable, strict=True)], kind="stable")
    assert [hit.path for hit in hits] == [readable[i].path for i in order] + [first[1].path, *(h.path for h in rest)]
    assert hits[0].score == pytest.approx(logits[order[0]] + hits[0].cosine, abs=1e-6)
    assert isinstance(hits[4].error, FileNotFoundError)
    assert "FileNotFoundError" in str(hits)
    assert index.search(QUERY, k=2, rerank=5) == hits[:2]


def test_equal_scores_stand_in_the_order_of_adding(tmp_path: Path, model: Any) -> None:
    index = blip2c.Index.create(tmp_path / "index", model)
    picture = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    index.add([picture] * 20, names=[f"{chr(116 - i)}" for i in range(20)])
    assert [hit.entry for hit in index.search(QUERY, k=15)] == list(range(15))


def test_bad_questions(names: list[str], tmp_path: Path, model: Any) -> None:
    index = blip2c.Index.create(tmp_path / "index", model)
    assert index.search(QUERY) == []
    index.add(names[:2])
    for options in ({"k": 0}, {"k": 2.5}, {"rerank": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            index.search(QUERY, **options)
    with pytest.raises(ValueError, match="empty"):
        index.search("")
    with pytest.raises(ValueError, match=r"expected float32 \[T, 12\]"):
        index.search_vectors(np.zeros((1, 11), np.float32))
    with pytest.raises(NumericError):
        index.search_vectors(np.full((1, 12), np.nan, np.float32))
    with pytest.raises(ValueError, match="pass names"):
        index.add([np.zeros((30, 40, 3), np.uint8)])
    with pytest.raises(ValueError, match="opened without a model"):
        blip2c.Index.open(tmp_path / "index").search(QUERY)


# -- growing ----------------------------------------------------------------------------------------------------------


def test_adding_again_adds_nothing_twice(names: list[str], tmp_path: Path, model: Any) -> None:
    folder = tmp_path / "pictures"
    (folder / "broken.jpg").write_bytes(b"not a picture")
    index = blip2c.Index.create(tmp_path / "index", model)
    done = index.add([*names[:5], names[0], str(folder / "none.png"), str(folder / "broken.jpg")])
    assert (done.added, done.known) == (5, 1)
    assert [Path(path).name for path, _ in done.errors] == ["none.png", "broken.jpg"]
    again = blip2c.Index.open(tmp_path / "index", model)
    done = again.add(folder)
    assert (done.added, done.known, len(done.errors)) == (3, 5, 1)
    before = again.search(QUERY, k=20)
    # A file that changed is read anew, and its old vectors are found no more.
    save_pictures(folder, ["2.png"], seed=99)
    os.utime(folder / "2.png", ns=(1, 1))
    assert again.add(folder).added == 1
    after = again.search(QUERY, k=20)
    assert (len(again), again.records, len(after)) == (8, 9, 8)
    changed = {hit.path: hit.cosine for hit in before}
    assert [hit.path for hit in after if hit.cosine != changed[hit.path]] == [names[2]]
    # Another handle, opened before, goes on from what the files say.
    assert index.add(folder).added == 0
    assert index.search(QUERY, k=20) == after


def test_an_interrupted_add_goes_on(names: list[str], tmp_path: Path, model: Any, monkeypatch: Any) -> None:
    index = blip2c.Index.create(tmp_path / "index", model)
    stream = model.stream_embeddings

    def interrupted(pictures: Any, batch_size: int) -> Any:
        for place, found in enumerate(stream(pictures, batch_size)):
            if place == 5:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(model, "stream_embeddings", interrupted)
    with pytest.raises(KeyboardInterrupt):
        index.add(tmp_path / "pictures")
    monkeypatch.undo()
    assert len(blip2c.Index.open(tmp_path / "index", model)) == 5
    # What a process that was killed left behind the end does not count.
    with open(tmp_path / "index" / "vectors.bin", "ab") as file:
        file.write(b"half a record")
    with open(tmp_path / "index" / "pictures.jsonl", "ab") as file:
        file.write(b'{"path": "half')
    index = blip2c.Index.open(tmp_path / "index", model)
    done = index.add(tmp_path / "pictures")
    assert (done.added, done.known) == (3, 5)
    whole = blip2c.Index.create(tmp_path / "whole", model)
    whole.add(tmp_path / "pictures")
    assert blip2c.Index.open(tmp_path / "index", model).search(QUERY, 20) == whole.search(QUERY, 20)


def test_one_process_adds_at_a_time(names: list[str], tmp_path: Path, model: Any) -> None:
    index = blip2c.Index.create(tmp_path / "index", model)
    with index_files.only_writer(tmp_path / "index"), pytest.raises(BlockingIOError, match="another process"):
        index.add(names)
    assert index.add(names[:1]).added == 1


def test_a_search_sees_one_state_of_an_index_that_grows(
    names: list[str], tmp_path: Path, model: Any, monkeypatch: Any
) -> None:
    """Pictures come and are replaced just after the vectors were compared: the search knows nothing of them."""
    index = blip2c.Index.create(tmp_path / "index", model)
    index.add(names[:2])
    before, plain = index.search(QUERY, 10), _core._picture_scores

    def compare_while_it_grows(*arguments: Any) -> Any:
        found = plain(*arguments)
        save_pictures(tmp_path / "pictures", ["0.png"], seed=90)
        index.add(names)
        return found

    monkeypatch.setattr(_core, "_picture_scores", compare_while_it_grows)
    assert index.search(QUERY, 10) == before
    monkeypatch.setattr(_core, "_picture_scores", plain)
    assert len(index.search(QUERY, 10)) == len(names) == len(index)


# -- files that are refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [index_files.HEADER, index_files.VECTORS, index_files.PICTURES])
@pytest.mark.parametrize("how", ["flipped", "cut", "missing"])
def test_a_damaged_file_is_refused(names: list[str], tmp_path: Path, model: Any, name: str, how: str) -> None:
    blip2c.Index.create(tmp_path / "index", model).add(names[:3])
    path = tmp_path / "index" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(data if how == "flipped" else data[: len(data) // 2])
    missing_index = name == index_files.HEADER and how == "missing"
    with pytest.raises(FileNotFoundError if missing_index else CheckpointError, match="index"):
        blip2c.Index.open(tmp_path / "index", model)


def test_a_header_nested_without_end_is_refused(tmp_path: Path, model: Any) -> None:
    blip2c.Index.create(tmp_path / "index", model)
    (tmp_path / "index" / index_files.HEADER).write_text("[" * 200_000)
    with pytest.raises(CheckpointError, match=r"index\.json: "):
        blip2c.Index.open(tmp_path / "index", model)


def test_a_file_that_becomes_shorter_while_it_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "vectors.bin"
    path.write_bytes(bytes(10))
    monkeypatch.setattr(Path, "stat", lambda *_, **__: os.stat_result((0o100644, *[0] * 5, 20, 0, 0, 0)))
    with pytest.raises(CheckpointError, match=r"vectors\.bin: ends 10 bytes early"):
        index_files.check_file(path, index_files.Extent(20, 1))


def test_another_version_model_or_dtype_is_refused(
    names: list[str], tmp_path: Path, model: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path / "index"
    blip2c.Index.create(path, model).add(names[:1])
    with pytest.raises(FileExistsError):
        blip2c.Index.create(path, model)
    with pytest.raises(ValueError, match="float16, asked for int8"):
        blip2c.Index.open(path, model, dtype="int8")
    other = random_checkpoint(tmp_path_factory.mktemp("other"), seed=61, retrieval=True, tokenizer=True)
    with pytest.raises(ValueError, match=f"made with {checkpoint}, opened with {other}"):
        blip2c.Index.open(path, blip2c.load(other))
    with pytest.raises(ValueError, match=r"float32.*held as.*int8"):
        blip2c.Index.open(path, blip2c.load(checkpoint, dtype="int8"))
    copied = shutil.copytree(checkpoint, tmp_path / "copy")
    assert len(blip2c.Index.open(path, blip2c.load(copied))) == 1
    header = json.loads((path / "index.json").read_text())
    header["version"] = 2
    (path / "index.json").write_text(json.dumps(header))
    with pytest.raises(CheckpointError, match="version 2"):
        blip2c.Index.open(path, model)
    with pytest.raises(TypeError, match="retrieval checkpoint"):
        blip2c.Index.create(tmp_path / "new", blip2c.load())


# -- the command line -------------------------------------------------------------------------------------------------


def test_index_and_search_on_the_command_line(
    names: list[str], tmp_path: Path, model: Any, checkpoint: Path, capfd: Any
) -> None:
    folder = tmp_path / "pictures"
    evil = save_pictures(folder, ["<b>&\"'.png"], seed=50)[0]
    (folder / "broken.jpg").write_bytes(b"not a picture")
    assert cli.main(["index", str(folder), "--model", str(checkpoint)]) == 1
    out, err = capfd.readouterr()
    assert out == f"{folder}/blip2c.index: 9 added, 0 known, 1 failed\n"
    assert "broken.jpg" in err
    place = str(folder / "blip2c.index")
    page = tmp_path / "page.html"
    command = ["search", place, QUERY, "-k", "20", "--rerank", "3", "--html", str(page)]
    assert cli.main([*command, "--json"]) == 0
    rows = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    want = blip2c.Index.open(place, model).search(QUERY, 20, rerank=3)
    assert [(row["image"], row["score"], row.get("probability")) for row in rows] == [
        (hit.path, hit.score, hit.probability) for hit in want
    ]
    text = page.read_text()
    assert text.count("data:image/jpeg;base64,") == 9
    assert "&lt;b&gt;&amp;&quot;&#x27;.png" in text
    assert "<b>" not in text
    assert "http" not in text
    assert cli.main(["search", place, "--picture", evil, "-k", "1"]) == 0
    assert evil in capfd.readouterr().out
    for wrong in (["search", place], ["search", place, "words", "--picture", evil], ["search", str(tmp_path), "x"]):
        assert cli.main(wrong) == 2


def test_interrupting_the_command_keeps_what_was_done(tmp_path: Path, checkpoint: Path) -> None:
    folder = tmp_path / "many"
    first = save_pictures(folder, ["0.png"])[0]
    for i in range(1, 3000):
        os.link(first, folder / f"{i}.png")
    command = [sys.executable, "-m", "blip2c", "index", str(folder), "--model", str(checkpoint), "--batch-size", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **child_process())
    header = folder / "blip2c.index" / "index.json"
    end = time.monotonic() + 60
    while time.monotonic() < end and not (header.is_file() and json.loads(header.read_text())["count"]):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED, err
    index = blip2c.Index.open(folder / "blip2c.index", blip2c.load(checkpoint))
    assert 0 < len(index) < 3000
    assert len(set(index.paths)) == len(index)
