"""Save a few held-out scenes that the sample model captions rightly: pictures.py --model DIR

One PNG for each layout goes to DIR/pictures, with captions.json beside them: for each file
its true caption and one question with its true answer.  These are examples to try
the model with, chosen because it gets them right; they say nothing about its accuracy.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
from pathlib import Path

import scenes
from evaluate import Subject

log = logging.getLogger("pictures")


def is_right(subject: Subject, scene: scenes.Scene) -> bool:
    """Whether the model gets the caption (greedily and with 5 beams) and all the answers right."""
    captions = subject.captions([scene.image]) + subject.captions([scene.image], num_beams=5)
    answers = subject.answers([(scene.image, q.text) for q in scene.questions])
    return captions == [scene.caption] * 2 and answers == [q.answer for q in scene.questions]


def choose(subject: Subject, rng: random.Random, layout: str, tries: int = 50) -> scenes.Scene | None:
    """The first held-out scene of a layout that the model gets right."""
    for _ in range(tries):
        scene = scenes.scene(rng, "heldout", scale=2, layout=layout)
        if is_right(subject, scene):
            return scene
    return None


def main() -> None:
    """Choose and save."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--seed", type=int, default=31)
    options = parser.parse_args()
    folder = options.model / "pictures"
    folder.mkdir(exist_ok=True)
    subject, rng, texts = Subject.load(options.model), random.Random(options.seed), {}
    for layout in scenes.LAYOUTS:
        scene = choose(subject, rng, layout)
        if scene is None:
            log.warning("no scene found for %s", layout)
            continue
        question = scene.questions[1 if scene.attributes.count > 1 else 0]
        name = f"{layout}.png"
        scene.image.save(folder / name, optimize=True)
        texts[name] = {"caption": scene.caption, "question": question.text, "answer": question.answer}
        log.info("%s: %s", name, scene.caption)
    (folder / "captions.json").write_text(json.dumps(texts, indent=2) + "\n")


if __name__ == "__main__":
    main()
