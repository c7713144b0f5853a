"""How long a checkpoint takes to load, the first time and later, in fresh processes; what huge pages change.

    python benchmarks/make_checkpoint.py /tmp/blip2-opt-2.7b-random
    python benchmarks/load.py /tmp/blip2-opt-2.7b-random --dtype int8 --rounds 3

Ways to load, taking turns: the plain checkpoint as it is stored; rounded while loading, with nothing kept; rounded and
kept in an empty cache; from that cache; a packed folder beside the checkpoint (written when it is missing). All but
those of the cache again without huge pages. Columns, medians: seconds until the model is there; seconds of the first
caption token after that (which touches every page); seconds of a further token; peak resident memory. Files that were
just read come from the system's cache as far as memory allows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from caption import generation, packed_folder, peak_rss, picture, quantize, timed

PR_SET_THP_DISABLE = 41
COLUMNS = {"load": "s", "first_token": "s", "token": "s", "peak_rss": "GB"}
NEW_TOKENS = 16


def run(folder: str, options: dict[str, Any], small_pages: bool) -> dict[str, float]:
    """In this process."""
    if small_pages and ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0:
        raise SystemExit("load.py: prctl: huge pages can not be switched off")
    import blip2c

    row: dict[str, float] = {}
    row["load"], model = timed(lambda: blip2c.Blip2ForConditionalGeneration.from_pretrained(folder, **options))
    pixels = picture(model.config.vision_config.image_size)
    row["first_token"], _ = timed(lambda: generation(model, model._core.encode(pixels))(1))
    row["peak_rss"] = peak_rss()
    decode = generation(model, model._core.encode(pixels))
    one, _ = timed(lambda: decode(1))
    more, _ = timed(lambda: decode(1 + NEW_TOKENS))
    row["token"] = (more - one) / NEW_TOKENS
    return row


def start(folder: str, options: dict[str, Any], small_pages: bool, cache: str) -> dict[str, float]:
    command = [sys.executable, __file__, folder, "--run", json.dumps(options), *["--small-pages"] * small_pages]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "BLIP2C_CACHE": cache})
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{folder}: ended with status {done.returncode}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--dtype", choices=("int8", "int4"), default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", help="load once in this process with these options and print the figures as JSON")
    parser.add_argument("--small-pages", action="store_true", help="with --run")
    arguments = parser.parse_args()
    if arguments.run:
        print(json.dumps(run(arguments.folder, json.loads(arguments.run), arguments.small_pages)))
        return
    import machine

    folder, dtype = arguments.folder, arguments.dtype
    quantize(folder, dtype)
    packed = packed_folder(folder, dtype)
    assert packed is not None
    plain, rounded = (folder, {"dtype": "auto"}), (folder, {"dtype": dtype, "cache": False})
    kept = (folder, {"dtype": dtype})
    ways: dict[str, tuple[tuple[str, dict[str, Any]], bool]] = {
        "as stored": (plain, False),
        f"{dtype}, nothing kept": (rounded, False),
        f"{dtype}, first load, kept": (kept, False),
        f"{dtype}, from the cache": (kept, False),
        f"{dtype}, packed folder": ((packed, {}), False),
        "as stored, small pages": (plain, True),
        f"{dtype}, nothing kept, small pages": (rounded, True),
        f"{dtype}, packed folder, small pages": ((packed, {}), True),
    }
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory(dir=Path(folder).parent) as cache:
            for way, ((where, options), small_pages) in ways.items():
                found[way].append(start(where, options, small_pages, cache))
                print(f"{way}: {json.dumps(found[way][-1])}", file=sys.stderr, flush=True)
    print(f"{machine.title()}, medians of {arguments.rounds}\n")
    print("| way | " + " | ".join(COLUMNS) + " |\n" + "|---" * (len(COLUMNS) + 1) + "|")
    for way, rows in found.items():
        cells = [f"{statistics.median(row[name] for row in rows):.3g} {unit}" for name, unit in COLUMNS.items()]
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
