"""CIDEr and BLEU beside pycocoevalcap's, on the same captions: prints both and the largest difference.

    pip install pycocoevalcap && python benchmarks/metrics.py          # its tokenizer runs where there is a java
    python benchmarks/metrics.py --captions OUT.json DATA.json         # captions of `blip2c eval captions --out`

Without arguments captions are put together from a few words, so that n-grams repeat as they do in a dataset, with the
punctuation, contractions and capitals that a tokenizer has to deal with.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

from blip2c.caption_metrics import tokenize_caption, word_scores
from blip2c.evaluate import read_captions

SUBJECTS = ["a man", "Two dogs", "the woman's cat", "A red fire-truck", "some kids", "it", "An old U.S. sign"]
VERBS = ["is riding", "isn't looking at", "sits on", "stands beside", "can't see", "is playing with"]
OBJECTS = ["a skateboard", 'the "blue" ball', "a (small) pizza", "10:30 trains", "the dogs' toys", "a $5 sandwich, too"]
ENDS = ["", ".", " in the park.", " at night!", "; the sky is grey.", " - again"]


def made_up(pictures: int, seed: int) -> tuple[list[str], list[list[str]]]:
    rng = random.Random(seed)

    def caption() -> str:
        return f"{rng.choice(SUBJECTS)} {rng.choice(VERBS)} {rng.choice(OBJECTS)}{rng.choice(ENDS)}"

    return [caption() for _ in range(pictures)], [[caption() for _ in range(5)] for _ in range(pictures)]


def main() -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", nargs=2, type=Path, metavar=("OUT.json", "DATA.json"))
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.captions:
        captions = [row["caption"] for row in json.loads(arguments.captions[0].read_text())]
        references = [entry.texts for entry in read_captions(arguments.captions[1])]
    else:
        captions, references = made_up(arguments.pictures, arguments.seed)
    ours = [tokenize_caption(c) for c in captions], [[tokenize_caption(r) for r in refs] for refs in references]
    if shutil.which("java"):
        cut = PTBTokenizer().tokenize
        theirs = (
            cut({i: [{"caption": c}] for i, c in enumerate(captions)}),
            cut({i: [{"caption": r} for r in refs] for i, refs in enumerate(references)}),
        )
        pairs = [(" ".join(words), theirs[0][i][0]) for i, words in enumerate(ours[0])]
        pairs += [(" ".join(w), t) for i, refs in enumerate(ours[1]) for w, t in zip(refs, theirs[1][i], strict=True)]
        wrong = [pair for pair in pairs if pair[0] != pair[1]]
        print(f"{len(pairs)} captions split into words, {len(wrong)} of them in another way: {wrong[:2]}")
    else:
        print("no java: pycocoevalcap is given the words that blip2c splits")
        theirs = (
            {i: [" ".join(words)] for i, words in enumerate(ours[0])},
            {i: [" ".join(words) for words in refs] for i, refs in enumerate(ours[1])},
        )
    found = word_scores(*ours)
    bleu, _ = Bleu(4).compute_score(theirs[1], theirs[0], verbose=0)
    cider, ciders = Cider().compute_score(theirs[1], theirs[0])
    print(f"| score of {len(captions)} pictures | blip2c | pycocoevalcap | difference |\n|---|---|---|---|")
    for name, own, other in [
        ("CIDEr", found.cider, cider),
        *((f"BLEU-{n}", own, other) for n, (own, other) in enumerate(zip(found.bleu, bleu, strict=True), 1)),
    ]:
        print(f"| {name} | {own:.12f} | {other:.12f} | {abs(own - other):.1e} |")
    print(f"largest difference in CIDEr of a picture: {max(map(abs, found.ciders - ciders)):.1e}")


if __name__ == "__main__":
    main()
