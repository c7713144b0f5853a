"""Train the sample model's twin, which compares pictures with texts: python train_retrieval.py --out DIR

The paper's first stage, without its generating part: the Q-Former learns on the frozen vision encoder of the sample
model, with two losses on the same scenes and captions,

* ITC: of a batch's captions, which is the picture's, and of its pictures, which is the caption's, by the cosines of
  what each becomes alone (of a picture's 32 queries, the nearest one);
* ITM: whether a picture and a caption, read together, fit. Those that do not fit are drawn from the batch, near misses
  (by ITC) most often.

The scenes of a batch come in families of four that differ in one thing (an object, the colour, the count, left and
right): captions that could be mistaken for each other must meet.
"""

from __future__ import annotations

import argparse
import logging
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.lib.format import open_memmap
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy, normalize
from transformers import Blip2ForConditionalGeneration

import checkpoint
import scenes
from feed import shrink
from train import Stage, Trained, begin, bf16, features

log = logging.getLogger("train")

FAMILY = 4
STATES = (1 + scenes.GRID**2, 192)


@dataclass
class Twin(Trained):
    """The model and ITC's temperature, which is learned and thrown away."""

    contrast: torch.nn.ParameterDict

    @classmethod
    def fresh(cls, sample: Path) -> Twin:
        """The twin at its start."""
        model = checkpoint.make_retrieval_model(
            Blip2ForConditionalGeneration.from_pretrained(sample, dtype=torch.float32)
        )
        model.set_attn_implementation("eager")  # on the CPU faster than sdpa's backward
        contrast = torch.nn.ParameterDict({"temperature": torch.tensor(0.07)})
        return cls(model, Tokenizer.from_file(str(sample / "tokenizer.json")), contrast)


# ---------------------------------------------------------------------------
# scenes


def picture(attributes: scenes.Attributes, rng: random.Random) -> np.ndarray:
    """A scene's pixels ``[112, 112, 3]``; some are drawn larger and made small again."""
    scale = rng.choices((1, 2, 3), (85, 10, 5))[0]
    return np.asarray(shrink(scenes.compose(attributes, rng, scale).image))


@dataclass
class Families:
    """Scenes in families of four: the encoder's states ``[n, 65, 192]`` and what is in them ``[n, 4]``."""

    states: np.ndarray
    numbers: np.ndarray

    @classmethod
    def of(cls, twin: Twin, folder: Path, number: int, seed: int) -> Families:
        """Those in the folder, or fresh ones, drawn and put through the encoder once."""
        states, numbers = folder / "states.npy", folder / "numbers.npy"
        if not numbers.exists():
            cls._draw(twin, folder, number, seed)
        return cls(np.load(states, mmap_mode="r"), np.load(numbers))

    @staticmethod
    def _draw(twin: Twin, folder: Path, number: int, seed: int) -> None:
        rng = random.Random(seed)
        states = open_memmap(folder / "states.npy", "w+", np.float16, (number * FAMILY, *STATES))
        numbers = np.zeros((number * FAMILY, 4), np.int16)
        for start in range(0, len(states), 16 * FAMILY):
            stop = min(start + 16 * FAMILY, len(states))
            drawn: list[scenes.Attributes] = []
            while len(drawn) < stop - start:
                family = scenes.related(scenes.draw_attributes(rng, "train"), rng, "train", FAMILY - 1)
                drawn += family if len(family) == FAMILY else []
            states[start:stop] = features(twin.model, np.stack([picture(a, rng) for a in drawn]))
            numbers[start:stop] = [a.indices() for a in drawn]
            if start % 6400 == 0:
                log.info("%d of %d scenes drawn", start, len(states))
        np.save(folder / "numbers.npy", numbers)

    def batch(self, rng: np.random.Generator, size: int) -> tuple[torch.Tensor, list[str]]:
        """States and captions of ``size`` scenes: whole families, drawn at random."""
        chosen = rng.choice(len(self.numbers) // FAMILY, size // FAMILY, replace=False)
        at = (chosen[:, None] * FAMILY + np.arange(FAMILY)).reshape(-1)
        captions = [scenes.caption(scenes.Attributes.from_indices(*n)) for n in self.numbers[at].tolist()]
        return torch.from_numpy(self.states[at].astype(np.float32)), captions


# ---------------------------------------------------------------------------
# the two losses


def token_ids(twin: Twin, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[J, T]``, padded at the right."""
    rows = [e.ids for e in twin.tokenizer.encode_batch(texts)]
    length = max(len(row) for row in rows)
    ids = torch.tensor([row + [checkpoint.PAD] * (length - len(row)) for row in rows])
    return ids, (torch.arange(length) < torch.tensor([[len(row)] for row in rows])).long()


def embed_pictures(twin: Twin, states: torch.Tensor) -> torch.Tensor:
    """The encoder's states to vectors of length 1, ``[B, 32, P]``."""
    model = twin.model
    queries = model.query_tokens.expand(len(states), -1, -1)
    with bf16():
        output = model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state
        return normalize(model.vision_projection(output).float(), dim=-1)


def embed_texts(twin: Twin, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Texts to vectors of length 1, ``[J, P]``."""
    model = twin.model
    with bf16():
        words = model.embeddings(input_ids=ids)
        output = model.qformer(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state
        return normalize(model.text_projection(output[:, 0]).float(), dim=-1)


def match_logits(twin: Twin, states: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Pictures and texts, pair by pair, to the logits of "no" and "yes", ``[B, 2]``."""
    model = twin.model
    queries = model.query_tokens.expand(len(states), -1, -1)
    seen = torch.cat([torch.ones(len(states), checkpoint.QUERIES, dtype=torch.long), mask], 1)
    with bf16():
        output = model.qformer(
            query_embeds=model.embeddings(input_ids=ids, query_embeds=queries),
            query_length=checkpoint.QUERIES,
            attention_mask=seen,
            encoder_hidden_states=states,
        ).last_hidden_state
        return model.itm_head(output[:, : checkpoint.QUERIES]).float().mean(1)


def cosines(pictures: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """``[B, 32, P]`` and ``[J, P]`` to ``[B, J]``: of each picture's queries the nearest."""
    return torch.einsum("bqp,jp->bjq", pictures, words).amax(-1)


def contrast_loss(logits: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
    """ITC in both directions; other pictures with the same caption do not count."""
    wanted = torch.arange(len(logits))
    logits = logits.masked_fill(same & ~torch.eye(len(logits), dtype=torch.bool), -1e4)
    return (cross_entropy(logits, wanted) + cross_entropy(logits.T, wanted)) / 2


def near_misses(logits: torch.Tensor, same: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each picture a text and for each text a picture that do not fit, drawn by ITC's softmax."""
    logits = logits.detach().masked_fill(same, -1e4)
    texts = torch.multinomial(logits.softmax(1) + 1e-6 * ~same, 1)[:, 0]
    return texts, torch.multinomial(logits.T.softmax(1) + 1e-6 * ~same, 1)[:, 0]


def losses(
    twin: Twin, states: torch.Tensor, captions: list[str], matched: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """ITC of a batch and ITM of its first ``matched`` scenes, each with two near misses."""
    ids, mask = token_ids(twin, captions)
    logits = cosines(embed_pictures(twin, states), embed_texts(twin, ids, mask)) / twin.contrast["temperature"]
    same = torch.tensor([[a == b for b in captions] for a in captions])
    itc = contrast_loss(logits, same)
    figures = {
        "itc": itc.item(),
        "nearest": (logits.detach().masked_fill(same, -1e4).amax(1) < logits.detach().diagonal()).float().mean().item(),
        "temperature": twin.contrast["temperature"].item(),
    }
    if not matched:
        return itc, figures
    here = torch.arange(matched)
    other_text, other_picture = (found[:matched] for found in near_misses(logits, same))
    pictures, texts = torch.cat([here, here, other_picture]), torch.cat([here, other_text, here])
    answers = match_logits(twin, states[pictures], ids[texts], mask[texts])
    wanted = (torch.arange(3 * matched) < matched).long()
    itm = cross_entropy(answers, wanted)
    right = (answers.argmax(1) == wanted).float()
    figures |= {"itm": itm.item(), "fits": right[:matched].mean().item(), "misses": right[matched:].mean().item()}
    return itc + itm, figures


# ---------------------------------------------------------------------------
# the training


@dataclass
class Watched:
    """Scenes that training never draws, with different captions, to watch it with."""

    states: torch.Tensor
    captions: list[str]

    @classmethod
    def draw(cls, twin: Twin, seed: int, number: int) -> Watched:
        """Draw them."""
        rng = random.Random(seed)
        drawn = scenes.distinct(rng, number)
        states = features(twin.model, np.stack([picture(a, rng) for a in drawn]))
        return cls(torch.from_numpy(states.astype(np.float32)), [scenes.caption(a) for a in drawn])

    @torch.no_grad()
    def check(self, twin: Twin) -> str:
        """Recall by ITC alone, in both directions, and by ITM among the eight nearest texts."""
        ids, mask = token_ids(twin, self.captions)
        found = cosines(embed_pictures(twin, self.states), embed_texts(twin, ids, mask))
        here = torch.arange(len(found))
        texts, pictures = ((side.argmax(1) == here).float().mean() for side in (found, found.T))
        near = found.topk(8, 1).indices
        logits = [
            match_logits(twin, state.expand(8, -1, -1), ids[at], mask[at])[:, 1]
            for state, at in zip(self.states, near, strict=True)
        ]
        best = (torch.stack(logits) + found.gather(1, near)).argmax(1)
        again = (near[here, best] == here).float().mean()
        return f"unseen: text@1 {texts:.3f} picture@1 {pictures:.3f}, text@1 read again {again:.3f}"


LEARNED = ("query_tokens", "embeddings", "qformer", "vision_projection", "text_projection", "itm_head", "contrast")


def train(twin: Twin, options: argparse.Namespace) -> None:
    """ITC alone for the first steps, then both losses."""
    stage = Stage("retrieval", twin, options, LEARNED)
    families = Families.of(twin, options.work, options.families, options.seed + 51)
    watched = Watched.draw(twin, options.seed + 100, 256)
    rng = np.random.default_rng(stage.seed)
    torch.manual_seed(stage.seed)
    for step in stage.rates():
        matched = 0 if step <= options.alone else options.matched
        stage.update(*losses(twin, *families.batch(rng, stage.batch), matched))
        with torch.no_grad():
            twin.contrast["temperature"].clamp_(0.01, 0.5)
        stage.report(50, lambda: watched.check(twin))
    log.info("retrieval ended at step %d: %s", stage.step, watched.check(twin))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--sample", type=Path, default=Path("blip2c/sample"), help="the sample model's folder")
    parser.add_argument("--work", type=Path, default=Path("build/sample_retrieval"), help="unfinished states")
    parser.add_argument("--log", type=Path, help="also append the log to this file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="scenes of a step, a multiple of four")
    parser.add_argument("--matched", type=int, default=32, help="how many of them ITM sees, each with two near misses")
    parser.add_argument("--alone", type=int, default=300, help="steps of ITC alone")
    parser.add_argument("--families", type=int, default=8000, help="families of four scenes")
    parser.add_argument("--steps", dest="steps_retrieval", type=int, default=2000)
    parser.add_argument("--minutes", dest="minutes_retrieval", type=float, default=60, help="at most so long")
    parser.add_argument("--peak", dest="peak_retrieval", type=float, default=1e-3, help="highest learning rate")
    return parser.parse_args()


def main() -> None:
    """Train and write the checkpoint."""
    options = parse()
    begin(options)
    twin = Twin.fresh(options.sample)
    log.info("%.2f M parameters, seed %d", sum(p.numel() for p in twin.model.parameters()) / 1e6, options.seed)
    train(twin, options)
    checkpoint.save(twin.model, twin.tokenizer, options.out)


if __name__ == "__main__":
    main()
