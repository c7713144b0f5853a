"""The command line: blip2c caption PICTURE_OR_FOLDER..., ask PICTURE QUESTION, match PICTURE TEXT..., embed
PICTURE_OR_FOLDER..., info [MODEL], quantize MODEL OUT, cache.

Results go to stdout, one line a picture (or a JSON object a line with --json), everything else to stderr. Exit codes:
0 all went well, 1 some pictures failed, 2 wrong usage or a model that can not be loaded, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from blip2c import _core, cli_retrieval

FAILED, USAGE, INTERRUPTED, PIPE_CLOSED = 1, 2, 130, 141
RETRIEVAL = "sample-retrieval"  # the model of commands that compare, where none is named


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, found {text!r}")
    return value


def _dtype(text: str) -> Any:
    from blip2c.dtypes import parse_dtype

    try:
        return parse_dtype(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="blip2c", description="BLIP-2 in C: captions of pictures and answers about them."
    )
    parser.add_argument("--version", action="version", version=f"blip2c {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    caption = commands.add_parser("caption", help="describe pictures", description="Describe pictures.")
    caption.add_argument("pictures", nargs="+", metavar="PICTURE_OR_FOLDER")
    caption.add_argument("--prompt", help="a beginning for the caption to go on from")
    caption.add_argument("--recursive", action="store_true", help="look into folders of folders")
    _model_options(caption)
    _generation_options(caption, 30)

    ask = commands.add_parser("ask", help="answer questions on a picture", description="Answer questions on a picture.")
    ask.add_argument("picture", metavar="PICTURE")
    ask.add_argument("questions", nargs="+", metavar="QUESTION")
    ask.add_argument("--template", "--prompt", dest="template", help='how to put a question ("Question: {} Answer:")')
    _model_options(ask)
    _generation_options(ask, 20)

    match = commands.add_parser(
        "match", help="say how well texts fit a picture", description="Say how well texts fit a picture."
    )
    match.add_argument("picture", metavar="PICTURE")
    match.add_argument("texts", nargs="+", metavar="TEXT")
    _model_options(match, RETRIEVAL)
    _batch_option(match)

    what = "write vectors of pictures, one for each query of the Q-Former, to a file of NumPy's"
    embed = commands.add_parser("embed", help="pictures as vectors", description=what.capitalize() + ".")
    embed.add_argument("pictures", nargs="+", metavar="PICTURE_OR_FOLDER")
    embed.add_argument("--out", required=True, metavar="FILE.npz", help='"names" [B] and "embeddings" [B, Q, P]')
    embed.add_argument("--recursive", action="store_true", help="look into folders of folders")
    _model_options(embed)
    _batch_option(embed)

    cli_retrieval.add_parsers(commands)

    info = commands.add_parser(
        "info", help="about this machine and a model", description="About this machine and a model."
    )
    info.add_argument("model", nargs="?", metavar="MODEL", help="folder or Hub id (default: the sample inside)")
    info.add_argument("--json", action="store_true", help="one JSON object")
    info.add_argument("--local-files-only", action="store_true", help="never go to the Hub")

    what = "write a copy of a model with packed, quantised weights, which loads at once"
    quantize = commands.add_parser(
        "quantize", help="make a model small and fast to load", description=what.capitalize()
    )
    quantize.add_argument("model", metavar="MODEL", help="folder or Hub id of a plain checkpoint")
    quantize.add_argument("out", metavar="OUT", help="the folder to write")
    quantize.add_argument(
        "--dtype", type=_dtype, default="int8", help='default int8; "int4", "vision=int8,language=int4"'
    )
    quantize.add_argument("--revision", help="branch, tag or commit on the Hub")
    quantize.add_argument("--local-files-only", action="store_true", help="never go to the Hub")
    quantize.add_argument("--threads", type=_positive, metavar="N", help="threads to compute with")

    cache = commands.add_parser(
        "cache", help="packed weights kept for the next load", description="Packed weights kept for the next load."
    )
    cache.add_argument("--clear", action="store_true", help="remove them")
    return parser


def _model_options(
    parser: argparse.ArgumentParser, default: str | None = None, means: str = "the small sample inside the package"
) -> None:
    """default: the model where none is named (None: load()'s own); means: what help calls it."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default=default, help=f"folder or Hub id (default: {default or means})")
    group.add_argument("--revision", help="branch, tag or commit on the Hub")
    group.add_argument("--local-files-only", action="store_true", help="never go to the Hub")
    group.add_argument(
        "--dtype",
        type=_dtype,
        default="auto",
        help="how weights are held: auto (as stored, the default), float32, float16, bfloat16, int8, int4, or by part:"
        ' "vision=int8,language=int4"',
    )
    group.add_argument("--device", default="cpu", help="cpu (the default), cuda, cuda:1 ...; see blip2c info")
    group.add_argument("--no-cache", action="store_true", help="keep no packed weights for the next load, use none")
    group.add_argument("--threads", type=_positive, metavar="N", help="threads to compute with")
    group.add_argument("--json", action="store_true", help="a JSON object a line")
    group.add_argument("--no-progress", action="store_true", help="no bar")


def _generation_options(parser: argparse.ArgumentParser, new_tokens: int) -> None:
    group = parser.add_argument_group("generation")
    group.add_argument("--num-beams", type=_positive, default=1, metavar="N")
    group.add_argument(
        "--max-new-tokens", type=_positive, default=new_tokens, metavar="N", help=f"default {new_tokens}"
    )
    _batch_option(group)


def _batch_option(parser: Any) -> None:
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default 8")


def _version() -> str:
    from blip2c import __version__

    return __version__


def say(message: str) -> None:
    """A line on stderr."""
    print(f"blip2c: {message}", file=sys.stderr, flush=True)


class _Say(logging.Handler):
    """What the library logs (what took long, and what for) as lines on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        say(_one_line(record.getMessage()))


def _log_to_stderr() -> None:
    logger = logging.getLogger("blip2c")
    if not any(isinstance(handler, _Say) for handler in logger.handlers):
        logger.addHandler(_Say())
        logger.setLevel(logging.INFO)


def _encodable(text: str) -> bool:
    """Whether stdout can write it, and a reader take it for text: a file's name may be any bytes."""
    try:
        text.encode()
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _one_line(text: str) -> str:
    r"""Line breaks, and what stdout has no bytes for, as \n, \udcff and so on."""
    text = "".join(repr(c)[1:-1] if c in "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029" else c for c in text)
    if _encodable(text):
        return text
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def find_pictures(names: Sequence[str], recursive: bool = False) -> list[str]:
    """The files of `names`, folders replaced by the pictures in them, sorted. Missing files stay, as row errors."""
    from blip2c.images import EXTENSIONS

    found: list[str] = []
    for name in names:
        if not os.path.isdir(name):
            found.append(name)
            continue
        inside = Path(name).rglob("*") if recursive else Path(name).iterdir()
        found.extend(sorted(str(p) for p in inside if p.suffix.lower() in EXTENSIONS and p.is_file()))
    return found


def _load(args: argparse.Namespace) -> Any:
    from blip2c.api import load

    if args.threads is not None:
        _core.set_num_threads(args.threads)
    return load(
        args.model,
        dtype=args.dtype,
        device=args.device,
        cache=False if args.no_cache else None,
        revision=args.revision,
        local_files_only=args.local_files_only,
    )


def _report(results: Iterator[Any], names: Sequence[str], key: str, text_key: str, args: argparse.Namespace) -> int:
    """Prints each result as it comes; returns how many failed."""
    from blip2c.api import progress_bar

    failed = 0
    with progress_bar(len(names), args.batch_size, False if args.no_progress else None) as bar:
        for name, result in zip(names, results, strict=True):
            if isinstance(result, Exception):
                failed += 1
            _print_row(name, result, key, text_key, args.json, len(names) == 1, bar)
            bar.update(1)
    return failed


def _print_row(name: str, result: Any, key: str, text_key: str, as_json: bool, alone: bool, bar: Any) -> None:
    if as_json:
        row: dict[str, Any] = {key: name}
        if isinstance(result, Exception):
            row["error"] = f"{type(result).__name__}: {result}"
        else:
            row[text_key] = str(result)
            if result.reason:
                row["reason"] = result.reason
        line = json.dumps(row, ensure_ascii=not _encodable(name + row.get(text_key, "")))
    elif isinstance(result, Exception):
        say(_one_line(str(result) if name in str(result) else f"{name}: {result}"))
        return
    else:
        text = str(result) if result else f"(empty: {result.reason})"
        line = _one_line(text if alone else f"{name}: {text}")
    if hasattr(bar, "clear"):
        bar.clear()
    print(line, flush=True)


def _caption(args: argparse.Namespace) -> int:
    names = find_pictures(args.pictures, args.recursive)
    if not names:
        say(f"no pictures in {', '.join(args.pictures)}")
        return USAGE
    model = _load(args)
    options = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    rows = [(index, args.prompt) for index in range(len(names))]
    failed = _report(model.stream(names, rows, args.batch_size, **options), names, "image", "caption", args)
    if failed:
        say(f"{failed} of {len(names)} pictures failed")
    return FAILED if failed else 0


def _ask(args: argparse.Namespace) -> int:
    from blip2c.api import QUESTION

    template = args.template or QUESTION
    if "{}" not in template:
        say(f"--template must hold {{}} where the question goes, found {template!r}")
        return USAGE
    model = _load(args)
    rows = [(0, template.replace("{}", question)) for question in args.questions]
    options = {"max_new_tokens": args.max_new_tokens, "num_beams": args.num_beams}
    results = model.stream([args.picture], rows, args.batch_size, **options)
    return FAILED if _report(results, args.questions, "question", "answer", args) else 0


def describe(model: str | None, local_files_only: bool = False) -> dict[str, Any]:
    """What `blip2c info` says of this machine and of a checkpoint, whose weights are not read for it."""
    from blip2c.cache import cache_folder, entries
    from blip2c.checkpoint import resolve_files
    from blip2c.classes import model_class
    from blip2c.devices import describe_devices
    from blip2c.hub import resolve, sample_path
    from blip2c.packed import describe_packed

    kept = cache_folder()
    folder = sample_path() if model is None else resolve(model, local_files_only=local_files_only)
    kind = model_class(folder)
    core = kind._core_of(kind.config_class.from_pretrained(folder))
    for name in ("inv_freq", "slides"):  # numbers by the dozen that config.json says in words
        core.get("text", {}).pop(name, None)
    count, size, dtypes = 0, 0, set()
    for path in resolve_files(folder):
        file = _core.SafetensorsFile(str(path))
        size += os.path.getsize(path)
        packed = describe_packed(file)
        if packed:
            count += packed["parameters"]
            dtypes.update(packed["dtypes"].split(","))
        for name in file.names() if not packed else ():
            dtype, shape = file.info(name)
            dtypes.add(dtype)
            elements = 1
            for side in shape:
                elements *= side
            count += elements
    return {
        "blip2c": _version(),
        "threads": _core.get_num_threads(),
        "cpu": _core.cpu_info(),
        "cuda": describe_devices(),
        "cache": {"folder": None if kept is None else str(kept), "bytes": sum(entry.size for entry in entries())},
        "model": {
            "folder": str(folder),
            "parameters": count,
            "bytes": size,
            "stored_as": sorted(dtypes),
            **core,
        },
    }


def _info(args: argparse.Namespace) -> int:
    facts = describe(args.model, args.local_files_only)
    if args.json:
        print(json.dumps(facts, ensure_ascii=False, default=str))
        return 0
    model = facts["model"]
    vision, qformer = model["vision"], model["qformer"]
    print(f"blip2c {facts['blip2c']}, {facts['threads']} threads")
    print("cpu:      " + ", ".join(f"{key} {value}" for key, value in facts["cpu"].items()))
    for device in facts["cuda"]["devices"]:
        print("cuda:     " + ", ".join(f"{key} {value}" for key, value in device.items()))
    if not facts["cuda"]["devices"]:
        print(f"cuda:     none: {facts['cuda']['why_not']}")
    cache = facts["cache"]
    print(f"cache:    {cache['folder']}, {cache['bytes'] / 1e6:.1f} MB" if cache["folder"] else "cache:    off")
    print(f"model:    {model['folder']}")
    print(
        f"weights:  {model['parameters'] / 1e6:.1f} M, {model['bytes'] / 1e6:.1f} MB as {', '.join(model['stored_as'])}"
    )
    print(
        f"vision:   {vision['image_size']}x{vision['image_size']} in patches of {vision['patch_size']},"
        f" {vision['num_hidden_layers']} layers of {vision['hidden_size']}"
    )
    print(
        f"q-former: {model['num_query_tokens']} queries,"
        f" {qformer['num_hidden_layers']} layers of {qformer['hidden_size']}"
    )
    if "heads" in model:
        print(f"heads:    projections to {model['heads']['projection_size']}, matching of pictures and texts")
        return 0
    text = model["text"]
    print(
        f"text:     {text['model_type']}, {text['num_hidden_layers']} layers of {text['hidden_size']},"
        f" {text['vocab_size']} tokens, {text.get('max_position_embeddings', 'any number of')} positions"
    )
    return 0


def _quantize(args: argparse.Namespace) -> int:
    from blip2c.checkpoint import PACKED_WEIGHTS
    from blip2c.packed import quantize

    if args.threads is not None:
        _core.set_num_threads(args.threads)
    out = quantize(args.model, args.out, args.dtype, revision=args.revision, local_files_only=args.local_files_only)
    print(f"{out}: {os.path.getsize(out / PACKED_WEIGHTS) / 1e6:.1f} MB")
    return 0


def _cache(args: argparse.Namespace) -> int:
    from blip2c.cache import cache_folder, clear, entries

    folder = cache_folder()
    if folder is None:
        print("the cache is off")
    elif args.clear:
        print(f"{folder}: {clear() / 1e6:.1f} MB removed")
    else:
        found = entries()
        for entry in found:
            print(_one_line(f"{entry.size / 1e6:10.1f} MB  {entry.dtypes}  {', '.join(entry.sources)}"))
        print(_one_line(f"{sum(entry.size for entry in found) / 1e6:10.1f} MB  in {folder}"))
    return 0


def _match(args: argparse.Namespace) -> int:
    model = _load(args)
    if not hasattr(model, "stream_matches"):
        model.match(args.picture, args.texts)  # says why it can not
    failed = 0
    results = model.stream_matches([args.picture], [(0, text) for text in args.texts], args.batch_size)
    for text, result in zip(args.texts, results, strict=True):
        failed += isinstance(result, Exception)
        if args.json:
            row = {"error": f"{type(result).__name__}: {result}"} if isinstance(result, Exception) else result._asdict()
            print(json.dumps({"text": text, **row}, ensure_ascii=not _encodable(text)), flush=True)
        elif isinstance(result, Exception):
            say(_one_line(f"{text}: {result}"))
        else:
            print(_one_line(f"{result}  {text}"), flush=True)
    return FAILED if failed else 0


def _embed(args: argparse.Namespace) -> int:
    import numpy as np

    names = find_pictures(args.pictures, args.recursive)
    if not names:
        say(f"no pictures in {', '.join(args.pictures)}")
        return USAGE
    progress = False if args.no_progress else None
    found = _load(args).embed(names, batch_size=args.batch_size, progress=progress, errors="return")
    good = [(name, item) for name, item in zip(names, found, strict=True) if not isinstance(item, Exception)]
    for name, item in zip(names, found, strict=True):
        if isinstance(item, Exception):
            say(_one_line(str(item) if name in str(item) else f"{name}: {item}"))
    if good:
        with open(args.out, "wb") as file:
            np.savez(file, names=[name for name, _ in good], embeddings=np.stack([item for _, item in good]))
    shape = list(np.shape([item for _, item in good]))
    if args.json:
        print(json.dumps({"out": args.out, "shape": shape, "failed": len(names) - len(good)}))
    elif good:
        print(_one_line(f"{args.out}: {len(good)} pictures, {shape[1]} vectors of {shape[2]} each"))
    return FAILED if len(good) < len(names) else 0


COMMANDS = {
    "caption": _caption, "ask": _ask, "match": _match, "embed": _embed, "info": _info, "quantize": _quantize,
    "cache": _cache, **cli_retrieval.COMMANDS,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    args = build_parser().parse_args(argv)
    command = COMMANDS[args.command]
    _log_to_stderr()
    try:
        code = command(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        say("interrupted; what is printed above is done")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has gone. Keep the interpreter from complaining when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except (ValueError, OSError, NotImplementedError, ArithmeticError, MemoryError, TypeError) as error:
        say(f"{type(error).__name__}: {error}")
        return USAGE


if __name__ == "__main__":
    sys.exit(main())
