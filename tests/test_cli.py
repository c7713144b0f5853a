"""The command line as a process: what goes where, exit codes, Ctrl-C, closed pipes."""

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
from blip2c import cli
from helpers import random_checkpoint
from running import child_process


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint(tmp_path_factory.mktemp("cli"), 5, tokenizer=True, text={"eos_token_id": 300})


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder: three pictures, one that is broken, a text, and another folder with a picture."""
    place = tmp_path / "pictures"
    (place / "more").mkdir(parents=True)
    for seed, name in enumerate(["a.png", "b.JPG", "c.webp", "more/d.png"]):
        rng = np.random.default_rng(seed)
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(place / name)
    (place / "broken.jpg").write_bytes(b"not a picture")
    (place / "notes.txt").write_text("not a picture either")
    return place


def run(*args: Any, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blip2c", *map(str, args)]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=120, **child_process(), **options
    )


def main(capfd: Any, *args: Any) -> tuple[int, str, str]:
    """The command line in this process: (exit code, stdout, stderr)."""
    code = cli.main([str(arg) for arg in args])
    out, err = capfd.readouterr()
    return code, out, err


def test_caption_of_one_picture_is_one_line(folder: Path, pictures: Path) -> None:
    want = blip2c.load(folder).caption(pictures / "a.png", max_new_tokens=5)
    done = run("caption", pictures / "a.png", "--model", folder, "--max-new-tokens", 5)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{want}\n", "")


def test_captions_of_a_folder(folder: Path, pictures: Path, capfd: Any) -> None:
    model = blip2c.load(folder)
    code, out, err = main(capfd, "caption", pictures, "--model", folder, "--max-new-tokens", 5, "--num-beams", 2)
    names = ["a.png", "b.JPG", "c.webp"]
    want = [f"{pictures / n}: {model.caption(pictures / n, max_new_tokens=5, num_beams=2)}" for n in names]
    assert code == 1
    assert out.splitlines() == [line for text in want for line in text.splitlines()]
    assert "broken.jpg" in err
    assert "1 of 4 pictures failed" in err
    code, out, _ = main(capfd, "caption", pictures, "--model", folder, "--max-new-tokens", 2, "--recursive", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [Path(row["image"]).name for row in rows] == ["a.png", "b.JPG", "broken.jpg", "c.webp", "d.png"]
    assert ["error" in row for row in rows] == [False, False, True, False, False]
    assert "PictureError" in rows[2]["error"]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_a_name_may_be_any_bytes(folder: Path, pictures: Path, encoding: str) -> None:
    names = [b"line\nbreak.png", b"\xff\xfe.png", "ü漢🙂.png".encode(), b"plain.png"]
    paths = [os.path.join(os.fsencode(pictures), name) for name in names]
    for path in paths:
        shutil.copy(os.fsencode(pictures / "a.png"), path)
    command = [sys.executable, "-m", "blip2c", "caption", *paths, "--model", folder, "--max-new-tokens", "3"]
    child = child_process(PYTHONIOENCODING=encoding)
    plain = subprocess.run(command, capture_output=True, check=True, timeout=120, **child)
    assert len(plain.stdout.decode(encoding).splitlines()) == len(names)
    done = subprocess.run([*command, "--json"], capture_output=True, check=True, timeout=120, **child)
    rows = [json.loads(line) for line in done.stdout.decode(encoding).split("\n")[:-1]]
    assert [os.fsencode(row["image"]) for row in rows] == paths
    assert len({row["caption"] for row in rows}) == 1


def test_options_reach_the_model(folder: Path, pictures: Path, capfd: Any) -> None:
    model = blip2c.load(folder, dtype="bfloat16")
    want = model.caption(pictures / "a.png", "a dog", max_new_tokens=6, num_beams=3)
    threads = blip2c.get_num_threads()
    try:
        code, out, err = main(
            capfd, "caption", pictures / "a.png", "--model", folder, "--prompt", "a dog", "--max-new-tokens", 6,
            "--num-beams", 3, "--dtype", "bfloat16", "--batch-size", 2, "--threads", 1, "--no-progress", "--json",
        )  # fmt: skip
        assert blip2c.get_num_threads() == 1
    finally:
        blip2c.set_num_threads(threads)
    assert (code, err) == (0, "")
    assert json.loads(out) == {"image": str(pictures / "a.png"), "caption": str(want)}


def test_ask(folder: Path, pictures: Path, capfd: Any) -> None:
    model = blip2c.load(folder)
    questions = ["how many?", "what colour?"]
    want = model.ask(pictures / "a.png", questions, max_new_tokens=4)
    code, out, _ = main(
        capfd, "ask", pictures / "a.png", *questions, "--model", folder, "--max-new-tokens", 4, "--json"
    )
    assert code == 0
    assert [json.loads(line) for line in out.splitlines()] == [
        {"question": q, "answer": str(a)} for q, a in zip(questions, want, strict=True)
    ]
    code, out, _ = main(capfd, "ask", pictures / "a.png", "how many?", "--model", folder, "--max-new-tokens", 4)
    assert (code, out) == (0, f"{want[0]}\n")
    code, out, err = main(capfd, "ask", pictures / "broken.jpg", "how many?", "--model", folder)
    assert (code, out) == (1, "")
    assert "broken.jpg" in err
    code, _, err = main(capfd, "ask", pictures / "a.png", "how many?", "--template", "no place", "--model", folder)
    assert code == 2
    assert "--template" in err


def test_info(folder: Path, capfd: Any) -> None:
    code, out, err = main(capfd, "info", folder, "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert facts["model"]["num_query_tokens"] == 4
    assert facts["model"]["text"]["model_type"] == "opt"
    assert facts["model"]["stored_as"] == ["F32"]
    assert facts["model"]["parameters"] == blip2c.load(folder).model.num_parameters()
    assert facts["threads"] == blip2c.get_num_threads()
    code, out, _ = main(capfd, "info", folder)
    assert code == 0
    for words in (str(folder), "28x28 in patches of 14", "4 queries", "opt, 2 layers of 20"):
        assert words in out


@pytest.mark.parametrize(
    "arguments",
    [[], ["caption"], ["ask", "x.png"], ["dance"], ["caption", "x.png", "--num-beams", "0"],
     ["caption", "x.png", "--dtype", "int7"], ["caption", "x.png", "--threads", "many"]],
    ids=str,
)  # fmt: skip
def test_wrong_usage_exits_2(arguments: list[str], capfd: Any) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert "usage:" in capfd.readouterr().err


def test_a_model_that_is_not_there_exits_2(pictures: Path, tmp_path: Path, capfd: Any) -> None:
    code, out, err = main(capfd, "caption", pictures / "a.png", "--model", tmp_path)
    assert (code, out) == (2, "")
    assert "config.json" in err
    assert "Traceback" not in err
    code, _, err = main(capfd, "caption", tmp_path, "--model", tmp_path)
    assert code == 2
    assert "no pictures" in err
    assert main(capfd, "info", tmp_path / "nowhere" / "x")[0] == 2


def test_a_missing_picture_exits_1(folder: Path, pictures: Path, capfd: Any) -> None:
    code, out, err = main(capfd, "caption", pictures / "none.png", pictures / "a.png", "--model", folder)
    assert code == 1
    assert out.startswith(str(pictures / "a.png"))
    assert "none.png" in err


def test_a_pipe_is_refused_without_waiting_for_it(folder: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    done = run("caption", tmp_path / "pipe.png", "--model", folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert "pipe.png: is a pipe or device" in done.stderr


def test_version_and_help() -> None:
    assert run("--version").stdout.strip() == f"blip2c {blip2c.__version__}"
    for arguments in (["--help"], ["caption", "--help"], ["ask", "--help"], ["info", "--help"]):
        done = run(*arguments)
        assert done.returncode == 0
        assert "usage: blip2c" in done.stdout


def test_a_closed_pipe_is_quiet(folder: Path, pictures: Path) -> None:
    names = [str(pictures / "a.png")] * 200
    command = [
        sys.executable,
        "-m",
        "blip2c",
        "caption",
        *names,
        "--model",
        str(folder),
        "--max-new-tokens",
        "2",
        "--batch-size",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **child_process())
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=60) == cli.PIPE_CLOSED
    assert err == ""


def test_interrupted_keeps_what_was_done(folder: Path, pictures: Path) -> None:
    names = [str(pictures / "a.png")] * 3000
    command = [
        sys.executable,
        "-m",
        "blip2c",
        "caption",
        *names,
        "--model",
        str(folder),
        "--batch-size",
        "1",
        "--no-progress",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **child_process())
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    out, err = process.communicate(timeout=60)
    assert time.perf_counter() - start < 5
    assert process.returncode == cli.INTERRUPTED
    assert first.startswith(names[0])
    assert len(out.splitlines()) < 2900
    assert "interrupted" in err
    assert "Traceback" not in err
