"""Measure the retrieval twin on scenes that training never drew: evaluate_retrieval.py --model DIR --scenes FOLDER

Draws 1,000 scenes with different captions, writes them to a folder as ``blip2c eval retrieval`` reads them, and ranks
pictures and texts with blip2c and with transformers: the paper's protocol, in which the 128 nearest by ITC are read
again by ITM and ranked by logit + cosine. transformers loads the saved float16 weights in float32; its vision encoder
sees each picture once, its Q-Former every pair.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import Blip2ForImageTextRetrieval, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

import blip2c
import scenes
from blip2c.evaluate import K_TEST

log = logging.getLogger("evaluate")
OUT_OF_REACH = -100.0


def _write_json(folder: Path, names: list[str], captions: list[str]) -> None:
    entries = [{"image": n, "caption": [c]} for n, c in zip(names, captions, strict=True)]
    (folder / "test.json").write_text(json.dumps(entries, indent=1) + "\n")


@dataclass
class Gallery:
    """Scenes, their pictures' files, and which of them hold nothing but held-out combinations."""

    scenes: list[scenes.Attributes]
    files: list[str]
    strict: np.ndarray

    @classmethod
    def write(cls, folder: Path, number: int, seed: int) -> Gallery:
        """Draw the scenes and write pictures and ``test.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        rng = random.Random(seed)
        drawn = scenes.distinct(rng, number)
        names = [f"{i:04d}.png" for i in range(number)]
        for attributes, name in zip(drawn, names, strict=True):
            scenes.compose(attributes, rng).image.save(folder / name)
        _write_json(folder, names, [scenes.caption(a) for a in drawn])
        strict = np.array([scenes.belongs(a, "heldout") for a in drawn])
        log.info("%d scenes, %d of them strictly held out", number, strict.sum())
        return cls(drawn, [str(folder / n) for n in names], strict)

    def write_some(self, folder: Path, number: int) -> None:
        """The first scenes again, as small files."""
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"{i:02d}.jpg" for i in range(number)]
        for file, name in zip(self.files, names, strict=False):
            Image.open(file).save(folder / name, quality=95)
        _write_json(folder, names, self.captions[:number])

    @property
    def captions(self) -> list[str]:
        """Of each scene."""
        return [scenes.caption(a) for a in self.scenes]


# ---------------------------------------------------------------------------
# the two libraries


class Ours:
    """blip2c, by its friendly calls."""

    name = "blip2c"

    def __init__(self, folder: str, files: list[str]) -> None:
        self.model, self.files = blip2c.load(folder), files

    def cosines(self, texts: list[str]) -> np.ndarray:
        """``[pictures, texts]``"""
        return self.model.similarity(self.model.embed(self.files, progress=False), self.model.embed_text(texts))

    def logits(self, texts: list[list[str]]) -> Iterator[np.ndarray]:
        """Of each picture with its texts: ITM's "no" and "yes", ``[texts, 2]``."""
        for file, some in zip(self.files, texts, strict=True):
            yield np.array(list(self.model.stream_logits([file], [(0, text) for text in some]))).reshape(-1, 2)


class Theirs:
    """transformers, its modules called as its forward does."""

    name = "transformers"

    def __init__(self, folder: str, files: list[str]) -> None:
        self.model = Blip2ForImageTextRetrieval.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        images = [Image.open(file).convert("RGB") for file in files]
        pixels = np.stack(BlipImageProcessorPil.from_pretrained(folder)(images)["pixel_values"])
        self.states = torch.cat([self._see(torch.from_numpy(part)) for part in np.array_split(pixels, 20)])

    @torch.no_grad()
    def _see(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.vision_model(pixel_values=pixels).last_hidden_state

    def _queries(self, number: int) -> torch.Tensor:
        return self.model.query_tokens.expand(number, -1, -1)

    @torch.no_grad()
    def cosines(self, texts: list[str]) -> np.ndarray:
        """``[pictures, texts]``"""
        model, words = self.model, self.tokenizer(texts, padding=True, return_tensors="pt")
        read = model.qformer(
            query_embeds=model.embeddings(input_ids=words.input_ids),
            query_length=0,
            attention_mask=words.attention_mask,
        ).last_hidden_state[:, 0]
        read = torch.nn.functional.normalize(model.text_projection(read), dim=-1)
        rows = []
        for states in self.states.split(50):
            queries = self._queries(len(states))
            seen = model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
            seen = torch.nn.functional.normalize(model.vision_projection(seen), dim=-1)
            rows.append(torch.matmul(seen, read.t()).amax(1))
        return torch.cat(rows).numpy()

    @torch.no_grad()
    def logits(self, texts: list[list[str]]) -> Iterator[np.ndarray]:
        """As ``Ours.logits``."""
        model = self.model
        for states, some in zip(self.states, texts, strict=True):
            words, queries = self.tokenizer(some, padding=True, return_tensors="pt"), self._queries(len(some))
            ones = torch.ones(queries.shape[:2], dtype=torch.long)
            read = model.qformer(
                query_embeds=model.embeddings(input_ids=words.input_ids, query_embeds=queries),
                query_length=queries.shape[1],
                attention_mask=torch.cat([ones, words.attention_mask], 1),
                encoder_hidden_states=states.expand(len(some), -1, -1),
            ).last_hidden_state[:, : queries.shape[1]]
            yield model.itm_head(read).mean(1).numpy()


# ---------------------------------------------------------------------------
# figures


@dataclass
class Scores:
    """Of pictures (rows) with texts: the cosine, and ITM's "yes" where it was asked (NaN elsewhere).

    ``chosen``: the pictures and texts whose nearest were read again.
    """

    cosine: np.ndarray
    logit: np.ndarray
    chosen: np.ndarray

    @classmethod
    def of(cls, subject: Ours | Theirs, texts: list[str], chosen: np.ndarray) -> Scores:
        """All cosines; logits of the chosen's pairs that are among the 128 nearest in one direction or the other."""
        cosine, start = subject.cosines(texts), time.time()
        wanted = (nearest(cosine) & chosen[:, None]) | (nearest(cosine.T) & chosen[:, None]).T
        logit = np.full(cosine.shape, np.nan)
        asked = [[texts[j] for j in np.flatnonzero(row)] for row in wanted]
        for i, found in enumerate(subject.logits(asked)):
            logit[i, wanted[i]] = found[:, 1]
            if i % 100 == 0:
                log.info("%s: picture %d, %.0f s", subject.name, i, time.time() - start)
        return cls(cosine, logit, chosen)

    def sides(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Where the right one (the diagonal) stands, 0 being first.

        Among texts and among pictures by ITC; for the chosen, among texts and among pictures by ITC and ITM.
        """
        summed = self.logit + self.cosine
        texts = np.where(nearest(self.cosine), summed, OUT_OF_REACH)
        pictures = np.where(nearest(self.cosine.T), summed.T, OUT_OF_REACH)
        return (
            *(ranks(scores) for scores in (self.cosine, self.cosine.T)),
            *(ranks(scores)[self.chosen] for scores in (texts, pictures)),
        )


def nearest(scores: np.ndarray) -> np.ndarray:
    """Where the 128 largest of each row stand."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :K_TEST]
    found = np.zeros(scores.shape, bool)
    np.put_along_axis(found, order, True, axis=1)
    return found


def ranks(scores: np.ndarray) -> np.ndarray:
    """Where each row's own column stands among its scores: 0 is first."""
    order = np.argsort(-scores, axis=1, kind="stable")
    return np.argmax(order == np.arange(len(scores))[:, None], axis=1)


def recall_table(ours: Scores, strict: np.ndarray) -> str:
    """Recall in both directions: ITC alone, ITC and ITM, and of the strictly held-out scenes."""
    head = [f"{side}@{k}" for side in ("text", "picture") for k in (1, 5, 10)]
    rows = [f"| | {' | '.join(head)} |", "|---" * 7 + "|"]
    texts, pictures, *again = ours.sides()
    held = f"the {strict.sum()} strictly held-out among all"
    kinds = {
        "ITC alone": [texts, pictures],
        f"{held}, ITC alone": [texts[strict], pictures[strict]],
        f"{K_TEST} read again by ITM": again,
        f"{held}, {K_TEST} read again": [side[strict[ours.chosen]] for side in again],
    }
    if not ours.chosen.all():
        del kinds[f"{K_TEST} read again by ITM"]
    for name, found in kinds.items():
        cells = [f"{100 * (side < k).mean():.1f} %" for side in found for k in (1, 5, 10)]
        rows.append(f"| {name} | {' | '.join(cells)} |")
    chance = [f"{100 * k / len(strict):.1f} %" for k in (1, 5, 10)]
    rows.append(f"| chance | {' | '.join(chance * 2)} |")
    return "\n".join(rows)


def agreement(ours: Scores, theirs: Scores) -> str:
    """How far blip2c and transformers are apart."""
    sorts = ("texts by ITC", "pictures by ITC", "texts read again", "pictures read again")
    same = [
        f"{(a == b).sum()} of {len(a)} ({sort})" for sort, a, b in zip(sorts, ours.sides(), theirs.sides(), strict=True)
    ]
    asked = np.isfinite(ours.logit) & np.isfinite(theirs.logit)
    cosine = np.abs(ours.cosine - theirs.cosine).max()
    logit = np.abs(ours.logit - theirs.logit)[asked].max()
    return (
        f"The right one has the same rank in blip2c and in transformers: {', '.join(same)}. Cosines differ by at most"
        f" {cosine:.1e}, logits of {asked.sum()} pairs by at most {logit:.1e}."
    )


def match_table(gallery: Gallery, subject: Ours, cosine: np.ndarray, seed: int) -> str:
    """Whether ITM says rightly that captions fit (probability over one half) or that wrong ones do not."""
    rng, captions = random.Random(seed), gallery.captions
    others = cosine - 2 * np.eye(len(cosine))
    far = [[captions[rng.choice([j for j in range(len(captions)) if j != i])]] for i in range(len(captions))]
    kinds = {
        "its own caption": [[c] for c in captions],
        "the nearest other caption by ITC": [[captions[j]] for j in others.argmax(1)],
        "captions with one thing changed, four each": [
            [scenes.caption(a) for a in scenes.related(attributes, rng, None, 4)[1:]] for attributes in gallery.scenes
        ],
        "another scene's caption": far,
    }
    rows = ["| a picture with | ITM is right | chance |", "|---|---|---|"]
    for kind, texts in kinds.items():
        fits = np.concatenate([found[:, 1] > found[:, 0] for found in subject.logits(texts)])
        right = fits if kind == "its own caption" else ~fits
        rows.append(f"| {kind} | {100 * right.mean():.1f} % ({right.sum()}/{len(right)}) | 50 % |")
    return "\n".join(rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="the checkpoint's folder")
    parser.add_argument("--scenes", type=Path, required=True, help="the folder to write the scenes to")
    parser.add_argument("--number", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--again", choices=["all", "strict"], default="all", help="whose nearest ITM reads again")
    parser.add_argument("--only-scenes", action="store_true", help="write the scenes, measure nothing")
    parser.add_argument("--some", type=Path, metavar="FOLDER", help="write the first 64 as JPEG to this folder too")
    parser.add_argument("--report", type=Path, help="write the tables (Markdown) to this file too")
    options = parser.parse_args()
    if options.model is None and not options.only_scenes:
        parser.error("--model is missing")
    return options


def main() -> None:
    """Draw the scenes, measure, print."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options = parse()
    gallery = Gallery.write(options.scenes, options.number, options.seed)
    if options.some:
        gallery.write_some(options.some, 64)
    if options.only_scenes:
        return
    torch.set_num_threads(options.threads)
    blip2c.set_num_threads(options.threads)
    subject = Ours(options.model, gallery.files)
    chosen = gallery.strict | (options.again == "all")
    ours = Scores.of(subject, gallery.captions, chosen)
    parts = [recall_table(ours, gallery.strict), match_table(gallery, subject, ours.cosine, options.seed)]
    print("\n\n".join(parts), flush=True)
    parts.append(agreement(ours, Scores.of(Theirs(options.model, gallery.files), gallery.captions, chosen)))
    print(f"\n{parts[-1]}", flush=True)
    if options.report:
        options.report.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
