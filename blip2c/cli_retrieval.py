"""The command line of an index and of evaluation: blip2c index FOLDER, search INDEX WORDS, eval KIND DATA."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from blip2c.evaluate import PictureTexts


def add_parsers(commands: Any) -> None:
    """The parsers of these commands."""
    from blip2c.cli import RETRIEVAL, _model_options, _positive

    index = commands.add_parser(
        "index",
        help="index pictures for search",
        description="Index pictures for search. Again later: only what is new or has changed.",
    )
    index.add_argument("pictures", nargs="+", metavar="PICTURE_OR_FOLDER")
    index.add_argument(
        "--index", metavar="INDEX", help="the index's folder (default: blip2c.index in the first folder)"
    )
    index.add_argument("--vectors", choices=["float16", "int8"], help="how vectors are held (default float16)")
    _model_options(index, RETRIEVAL)
    index.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default 8")

    search = commands.add_parser(
        "search", help="find pictures by words", description="Find the pictures of an index by words, or by a picture."
    )
    search.add_argument("index", metavar="INDEX", help="the folder of an index")
    search.add_argument("words", nargs="?", metavar="WORDS")
    search.add_argument("--picture", metavar="PICTURE", help="instead of words: pictures like this one")
    search.add_argument("-k", type=_positive, default=10, metavar="N", help="how many to find (default 10)")
    search.add_argument(
        "--rerank",
        type=_positive,
        metavar="N",
        help="read the N nearest again together with the words (the paper: 128)",
    )
    search.add_argument("--html", metavar="OUT", help="write a page that shows the pictures")
    _model_options(search, means="the one the index was made with")
    search.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default 8")

    evaluate = commands.add_parser(
        "eval", help="measure a model on a dataset", description="Measure a model on a dataset."
    )
    kinds = evaluate.add_subparsers(dest="kind", required=True, metavar="captions|vqa|retrieval")
    for name, what in (("captions", "CIDEr and BLEU of captions"), ("retrieval", "recall of pictures and texts")):
        parser = kinds.add_parser(name, help=what, description=what)
        parser.add_argument("data", metavar="DATA.json", help="Karpathy's splits, or a list of image and caption")
        parser.add_argument("--split", default="test", help='default "test"')
        _eval_options(parser, RETRIEVAL if name == "retrieval" else None)
        if name == "captions":
            parser.add_argument("--prompt", help="a beginning for the captions to go on from")
            _search_options(parser, 30)
        else:
            parser.add_argument("--k-test", type=int, default=128, metavar="K", help="pairs to re-rank, default 128")
    vqa = kinds.add_parser("vqa", help="accuracy of answers", description="VQA accuracy of answers")
    vqa.add_argument("data", metavar="QUESTIONS.json", help="VQA's questions, or a list with answers in it")
    vqa.add_argument("annotations", nargs="?", metavar="ANNOTATIONS.json")
    vqa.add_argument("--template", help='how to put a question (default "Question: {} Short answer:")')
    _eval_options(vqa)
    _search_options(vqa, 10)


def _eval_options(parser: argparse.ArgumentParser, model: str | None = None) -> None:
    from blip2c.cli import _model_options, _positive

    parser.add_argument("--images", default=".", metavar="FOLDER", help="what the pictures' names are relative to")
    parser.add_argument("--limit", type=_positive, metavar="N", help="the first N entries only")
    _model_options(parser, model)
    parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default 8")


def _search_options(parser: argparse.ArgumentParser, tokens: int) -> None:
    from blip2c.cli import _positive

    parser.add_argument("--num-beams", type=_positive, default=5, metavar="N", help="default 5")
    parser.add_argument("--max-new-tokens", type=_positive, default=tokens, metavar="N", help=f"default {tokens}")
    parser.add_argument("--out", metavar="FILE.json", help="write what the model said")


def _index(args: argparse.Namespace) -> int:
    import os

    from blip2c.cli import FAILED, USAGE, _load, _one_line, find_pictures, say
    from blip2c.index import Index
    from blip2c.index_files import HEADER

    place = args.index
    if place is None:
        folder = next((name for name in args.pictures if os.path.isdir(name)), None)
        if folder is None:
            say("--index: say where the index is to be: no folder was named")
            return USAGE
        place = os.path.join(folder, "blip2c.index")
    names = find_pictures(args.pictures, recursive=True)
    if not names:
        say(f"no pictures in {', '.join(args.pictures)}")
        return USAGE
    model = _load(args)
    if os.path.exists(os.path.join(place, HEADER)):
        index = Index.open(place, model, args.vectors)
    else:
        index = Index.create(place, model, args.vectors or "float16")
    done = index.add(names, batch_size=args.batch_size, progress=False if args.no_progress else None)
    for path, error in done.errors:
        say(_one_line(str(error) if path in str(error) else f"{path}: {error}"))
    if args.json:
        failed = [{"image": path, "error": f"{type(error).__name__}: {error}"} for path, error in done.errors]
        print(json.dumps({"index": place, "added": done.added, "known": done.known, "failed": failed}))
    else:
        print(_one_line(f"{place}: {done.added} added, {done.known} known, {len(done.errors)} failed"))
    return FAILED if done.errors else 0


def _search(args: argparse.Namespace) -> int:
    from blip2c.cli import USAGE, _load, _one_line, say
    from blip2c.index import Index

    if (args.words is None) == (args.picture is None):
        say("search needs either words or --picture")
        return USAGE
    if args.picture is not None and args.rerank:
        say("--rerank: a picture is read together with words only")
        return USAGE
    if args.model is None:
        args.model = Index.open(args.index, check=False).made_with["name"]
    index = Index.open(args.index, _load(args))
    if args.picture is not None:
        hits = index.search_picture(args.picture, args.k)
    else:
        hits = index.search(args.words, args.k, rerank=args.rerank or 0, batch_size=args.batch_size)
    for hit in hits:
        print(json.dumps(_row(hit)) if args.json else _one_line(str(hit)))
    if args.html:
        from blip2c.index_page import write_page

        write_page(hits, args.html)
        say(f"{args.html}: {len(hits)} pictures")
    return 0


def _row(hit: Any) -> dict[str, Any]:
    row = {"image": hit.path, "score": hit.score, "cosine": hit.cosine}
    if hit.probability is not None:
        row.update(logit=hit.logit, probability=hit.probability)
    if hit.error is not None:
        row["error"] = f"{type(hit.error).__name__}: {hit.error}"
    return row


def _eval(args: argparse.Namespace) -> int:
    from blip2c.cli import USAGE, _load, say

    kinds: dict[str, Callable[[argparse.Namespace, Any, Any], tuple[Any, Any]]] = {
        "captions": _captions, "vqa": _vqa, "retrieval": _retrieval,
    }  # fmt: skip
    data = _read(args)
    model = _load(args)
    if hasattr(model, "stream_matches") != (args.kind == "retrieval"):
        other = "compares pictures and texts" if args.kind != "retrieval" else "writes texts"
        say(f"eval {args.kind}: {args.model or 'this model'} {other}")
        return USAGE
    scores, rows = kinds[args.kind](args, model, data[: args.limit])
    print(json.dumps(_facts(scores)) if args.json else scores)
    if getattr(args, "out", None):
        with open(args.out, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    return 0


def _read(args: argparse.Namespace) -> Any:
    from blip2c.evaluate import read_captions, read_questions

    if args.kind == "vqa":
        return read_questions(args.data, args.annotations, args.images)
    return read_captions(args.data, args.images, args.split)


def _facts(scores: Any) -> dict[str, Any]:
    """The figures of a result, without those of single entries."""
    return {key: value for key, value in vars(scores).items() if key not in ("ciders", "accuracies")}


def _common(args: argparse.Namespace) -> dict[str, Any]:
    return {"batch_size": args.batch_size, "progress": False if args.no_progress else None}


def _captions(args: argparse.Namespace, model: Any, data: list[PictureTexts]) -> tuple[Any, Any]:
    from blip2c.evaluate import evaluate_captions

    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens, **_common(args)}
    scores, captions = evaluate_captions(model, data, prompt=args.prompt, **options)
    return scores, [{"image": d.image, "caption": text} for d, text in zip(data, captions, strict=True)]


def _vqa(args: argparse.Namespace, model: Any, data: Any) -> tuple[Any, Any]:
    from blip2c.evaluate import SHORT_ANSWER, evaluate_vqa

    options = {"num_beams": args.num_beams, "max_new_tokens": args.max_new_tokens, **_common(args)}
    scores, answers = evaluate_vqa(model, data, template=args.template or SHORT_ANSWER, **options)
    return scores, [{"question_id": q.number, "answer": text} for q, text in zip(data, answers, strict=True)]


def _retrieval(args: argparse.Namespace, model: Any, data: list[PictureTexts]) -> tuple[Any, Any]:
    from blip2c.evaluate import evaluate_retrieval

    return evaluate_retrieval(model, data, k_test=args.k_test, **_common(args)), None


COMMANDS = {"index": _index, "search": _search, "eval": _eval}
