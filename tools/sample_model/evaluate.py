"""Measure the sample model on held-out scenes: evaluate.py --model DIR [--report FILE]

Everything goes through transformers as a user would call it: the saved float16 weights
are loaded in float32, ``processor(images=..., text=...)``, ``generate``, ``batch_decode``.
Questions are batched with others of the same number of tokens, so nothing is padded.
"""

from __future__ import annotations

import argparse
import logging
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoProcessor, Blip2ForConditionalGeneration

import checkpoint
import scenes

log = logging.getLogger("evaluate")
Asked = tuple[Image.Image, str]
Tally = dict[str, list[bool]]


@dataclass
class Subject:
    """The model under test and its processor."""

    model: Blip2ForConditionalGeneration
    processor: AutoProcessor

    @classmethod
    def load(cls, folder: Path) -> Subject:
        """Load a folder, its float16 weights widened to float32."""
        model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
        return cls(model.eval(), AutoProcessor.from_pretrained(folder))

    def write(self, images: list[Image.Image], prompts: list[str] | None = None, **how: object) -> list[str]:
        """What the model writes for pictures, without the prompts."""
        inputs = self.processor(images=images, text=prompts, return_tensors="pt")
        ids = self.model.generate(**inputs, **how)
        texts = self.processor.batch_decode(ids, skip_special_tokens=True)
        if prompts is None:
            return [t.strip() for t in texts]
        return [t.removeprefix(p).strip() for t, p in zip(texts, prompts, strict=True)]

    def captions(self, images: list[Image.Image], **how: object) -> list[str]:
        """Captions, 50 pictures at a time."""
        return [t for part in _chunks(images, 50) for t in self.write(part, **how)]

    def answers(self, asked: list[Asked]) -> list[str]:
        """Answers to (picture, question) pairs, 50 of the same length at a time."""
        by_length = defaultdict(list)
        for i, (_, question) in enumerate(asked):
            by_length[len(self.processor.tokenizer(checkpoint.question_prompt(question)).input_ids)].append(i)
        found: dict[int, str] = {}
        for part in (p for alike in by_length.values() for p in _chunks(alike, 50)):
            prompts = [checkpoint.question_prompt(asked[i][1]) for i in part]
            found.update(zip(part, self.write([asked[i][0] for i in part], prompts), strict=True))
        return [found[i] for i in range(len(asked))]


def _chunks(items: list, size: int) -> Iterable[list]:
    return (items[i : i + size] for i in range(0, len(items), size))


# ---------------------------------------------------------------------------
# figures


def percent(right: list[bool]) -> str:
    """An accuracy as it is printed."""
    return f"{100 * sum(right) / len(right):.1f} % ({sum(right)}/{len(right)})"


def table(title: str, tallies: dict[str, Tally]) -> str:
    """A Markdown table: one row for each kind, one column for each tally."""
    rows = [f"| {title} | " + " | ".join(tallies) + " |", "|---" * (1 + len(tallies)) + "|"]
    kinds = list(dict.fromkeys(k for tally in tallies.values() for k in tally))
    for kind in kinds:
        cells = [percent(t[kind]) if t.get(kind) else "" for t in tallies.values()]
        rows.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def tally(kinds: list[str], right: list[bool]) -> Tally:
    """Right and wrong by kind, and all together."""
    counted: Tally = defaultdict(list)
    for kind, r in zip(kinds, right, strict=True):
        counted[kind].append(r)
    return {**counted, "**all**": right}


def caption_figures(subject: Subject, drawn: list[scenes.Scene]) -> str:
    """Exact captions by layout; with shuffled pictures; by beam search."""
    wanted, kinds = [s.caption for s in drawn], [s.attributes.layout for s in drawn]
    images = [s.image for s in drawn]
    written = subject.captions(images)
    right = [a == b for a, b in zip(written, wanted, strict=True)]
    # a caption depends on nothing but its picture: shuffling pictures shuffles captions
    moved = written[1:] + written[:1]
    shuffled = [a == b for a, b in zip(moved, wanted, strict=True)]
    some = min(200, len(drawn))
    beams = [a == b for a, b in zip(subject.captions(images[:some], num_beams=5), wanted, strict=False)]
    columns = {
        "exact caption": tally(kinds, right),
        "pictures shuffled": tally(kinds, shuffled),
        f"5 beams, first {some}": tally(kinds[:some], beams),
    }
    wrong = [f"{b!r} -> {a!r}" for a, b in zip(written, wanted, strict=True) if a != b]
    log.info("some wrong captions:\n%s", "\n".join(wrong[:40]))
    blank = [t == c for t, c in zip(subject.write(images[:20], [""] * 20), written, strict=False)]
    same = f"An empty prompt gives the caption that no prompt gives: {sum(blank)} of {len(blank)} pictures."
    return f"{table('layout', columns)}\n\n{same}"


def common_answers(number: int = 4000) -> dict[str, str]:
    """For each kind of question its commonest answer in training scenes."""
    rng, seen = random.Random(77), defaultdict(Counter)
    for _ in range(number):
        for q in scenes.questions(scenes.draw_attributes(rng, "train"), rng):
            seen[_blind_kind(q)][q.answer] += 1
    return {kind: counter.most_common(1)[0][0] for kind, counter in seen.items()}


def _blind_kind(question: scenes.Question) -> str:
    return question.kind.split(" (")[0]


def question_figures(subject: Subject, drawn: list[scenes.Scene]) -> str:
    """Exact answers by kind of question; with shuffled pictures; without looking."""
    asked = [(s.image, q) for s in drawn for q in s.questions]
    kinds = [q.kind for _, q in asked]
    answers = subject.answers([(image, q.text) for image, q in asked])
    right = [a == q.answer for a, (_, q) in zip(answers, asked, strict=True)]
    some = asked[:1500]
    other = [asked[(i + 7 * 5) % len(asked)][0] for i in range(len(some))]  # the picture seven scenes on
    strange = subject.answers([(image, q.text) for image, (_, q) in zip(other, some, strict=True)])
    shuffled = [a == q.answer for a, (_, q) in zip(strange, some, strict=True)]
    common = common_answers()
    blind = [common[_blind_kind(q)] == q.answer for _, q in asked]
    columns = {
        "exact answer": tally(kinds, right),
        f"pictures shuffled, first {len(some)}": tally(kinds[: len(some)], shuffled),
        "always the commonest answer": tally(kinds, blind),
    }
    return table("question", columns)


# ---------------------------------------------------------------------------
# pictures of other kinds


def other_pictures() -> dict[str, Image.Image]:
    """A few pictures that are not scenes."""
    gradient = Image.linear_gradient("L").convert("RGB")
    face = Image.new("RGB", (224, 224), (180, 220, 255))
    draw = ImageDraw.Draw(face)
    draw.ellipse((40, 40, 184, 184), fill=(240, 200, 160), outline=(90, 60, 40), width=4)
    draw.ellipse((80, 85, 100, 105), fill="black")
    draw.ellipse((124, 85, 144, 105), fill="black")
    draw.arc((80, 100, 144, 155), 20, 160, fill="black", width=5)
    text = Image.new("RGB", (224, 224), "white")
    ImageDraw.Draw(text).multiline_text((20, 40), "This is a page\nof plain text.\n\nNothing else.", "black")
    mandelbrot = Image.effect_mandelbrot((224, 224), (-2.2, -1.2, 0.8, 1.2), 60).convert("RGB")
    noise = Image.effect_noise((224, 224), 80).convert("RGB")
    street = Image.new("RGB", (320, 240), (150, 190, 235))
    draw = ImageDraw.Draw(street)
    draw.rectangle((0, 150, 320, 240), fill=(90, 90, 90))
    for x, top in ((10, 60), (90, 30), (180, 80), (250, 50)):
        draw.rectangle((x, top, x + 60, 150), fill=(170 - x // 4, 110, 90))
    return {
        "a grey gradient": gradient,
        "a drawn smiling face": face,
        "a page with a few lines of text": text,
        "the Mandelbrot set": mandelbrot,
        "grey noise": noise,
        "a drawn street with houses": street,
    }


def other_figures(subject: Subject, files: list[Path]) -> str:
    """What the model says about pictures that are not scenes."""
    pictures = other_pictures() | {f.name: Image.open(f).convert("RGB") for f in files}
    rows = ["| picture | caption | what is in the picture? | is there a dog? |", "|---|---|---|---|"]
    for name, image in pictures.items():
        said = subject.write([image])[0]
        replies = [subject.answers([(image, q)])[0] for q in ("what is in the picture?", "is there a dog?")]
        rows.append(f"| {name} | {said} | {' | '.join(replies)} |")
    return "\n".join(rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the checkpoint's folder")
    parser.add_argument("--scenes", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--picture", type=Path, action="append", default=[], help="show this picture too")
    parser.add_argument("--report", type=Path, help="write the tables (Markdown) to this file too")
    return parser.parse_args()


def main() -> None:
    """Draw the scenes, measure, print."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    options, start = parse(), time.time()
    torch.set_num_threads(options.threads)
    rng = random.Random(options.seed)
    drawn = [scenes.scene(rng, "heldout") for _ in range(options.scenes)]
    subject = Subject.load(options.model)
    sections = {
        f"Captions of {len(drawn)} held-out scenes": lambda: caption_figures(subject, drawn),
        f"All the questions about these {len(drawn)} scenes": lambda: question_figures(subject, drawn),
        "Pictures of other kinds": lambda: other_figures(subject, options.picture),
    }
    parts = []
    for title, figures in sections.items():
        parts.append(f"## {title}\n\n{figures()}\n")
        print(parts[-1], flush=True)
    if options.report:
        options.report.write_text("\n".join(parts))
    log.info("done in %.0f s (seed %d)", time.time() - start, options.seed)


if __name__ == "__main__":
    main()
