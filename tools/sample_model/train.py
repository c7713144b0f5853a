"""Train the sample model: python tools/sample_model/train.py --out DIR

Stages, in order; each leaves a file in --work and is skipped when its file is there:

1. ``vision``   the vision encoder alone, with a label for every patch;
2. ``queries``  the Q-Former on the frozen encoder, with a label for five of its queries;
3. ``joint``    the Q-Former and the language model on the frozen encoder;
4. ``all``      everything, at a small learning rate.

The linear layers that read the labels off are thrown away at the end.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import Blip2ForConditionalGeneration, PreTrainedModel

import checkpoint
import scenes
from feed import Drawn, Feed, Pool, normalised, shrink
from texts import Packed, Packer, all_segments, segments

log = logging.getLogger("train")

CLASSES = len(scenes.THINGS) + len(scenes.COLOURS)
#: Sizes of the labels that a scene has: layout, background, first and second object.
LABELS = (len(scenes.LAYOUTS), len(scenes.COLOURS), len(scenes.THINGS), len(scenes.THINGS) + 1)
LABEL_NAMES = ("layout", "background", "first", "second")


@dataclass
class Trained:
    """A model, its tokenizer and, in what is derived from this, what else has weights while it is trained."""

    model: PreTrainedModel
    tokenizer: Tokenizer

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {k: v for k, v in vars(self).items() if isinstance(v, torch.nn.Module)}

    def keep(self, path: Path, **more: object) -> None:
        """Save all weights in one step."""
        temporary = path.with_suffix(".tmp")
        torch.save({k: v.state_dict() for k, v in self._modules().items()} | more, temporary)
        temporary.rename(path)

    def restore(self, path: Path) -> dict[str, Any]:
        """Load the weights that ``keep`` saved and return what else there is."""
        saved = torch.load(path)
        for name, module in self._modules().items():
            if name in saved:
                module.load_state_dict(saved.pop(name))
        return saved

    def parameters(self, *names: str) -> list[torch.nn.Parameter]:
        """The parameters of the named parts of the model or of these parts, freezing the rest."""
        everything = torch.nn.ModuleDict(self._modules())
        everything.requires_grad_(False)
        chosen = []
        for name in names:
            part = getattr(self, name, None) if name in vars(self) else getattr(self.model, name)
            chosen += [part] if isinstance(part, torch.nn.Parameter) else list(part.parameters())
        for parameter in chosen:
            parameter.requires_grad_(True)
        return chosen


@dataclass
class Parts(Trained):
    """The sample model and the linear layers that read labels off it."""

    patch_reader: torch.nn.Linear
    place_reader: torch.nn.Linear
    class_readers: torch.nn.ModuleList
    query_readers: torch.nn.ModuleList

    @classmethod
    def fresh(cls) -> Parts:
        """Everything at its start."""
        tokenizer = checkpoint.make_tokenizer()
        model = checkpoint.make_model(tokenizer.get_vocab_size())
        model.set_attn_implementation("eager")  # on the CPU faster than sdpa's backward
        vision, text = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        patch, place = torch.nn.Linear(vision, CLASSES), torch.nn.Linear(vision, scenes.GRID**2)
        return cls(model, tokenizer, patch, place, heads(vision), heads(text))


class Average:
    """Running averages of named figures."""

    def __init__(self, decay: float = 0.97) -> None:
        self.decay, self.values = decay, {}

    def __call__(self, **figures: float) -> None:
        """Take in one step's figures."""
        for name, value in figures.items():
            old = self.values.get(name, value)
            self.values[name] = self.decay * old + (1 - self.decay) * value

    def __str__(self) -> str:
        return " ".join(f"{name} {value:.3f}" for name, value in self.values.items())


def make_optimizer(parameters: Iterable[torch.nn.Parameter]) -> torch.optim.AdamW:
    """AdamW; weight decay for matrices only."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)


#: All stages; the last is train_retrieval.py's.
ORDER = ("vision", "queries", "joint", "all", "retrieval")


class Stage:
    """A stage's optimizer, its place in the work folder, and its learning rate.

    The rate warms up and then follows a cosine over the stage's steps, or over its minutes
    if these run out first.
    """

    def __init__(self, name: str, parts: Trained, options: argparse.Namespace, trained: tuple[str, ...]) -> None:
        self.name, self.parts, self.step = name, parts, 0
        self.peak, self.steps, self.minutes = (getattr(options, f"{k}_{name}") for k in ("peak", "steps", "minutes"))
        self.seed = options.seed + 10 * ORDER.index(name)
        self.batch = options.batch
        self.partial = options.work / f"{name}.partial.pt"
        self.optimizer = make_optimizer(parts.parameters(*trained))
        self.average = Average()
        if self.partial.exists():
            self._resume()
        self.start = time.time()

    def _resume(self) -> None:
        saved = self.parts.restore(self.partial)
        self.step = saved.get("step", 0)
        if "optimizer" in saved:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.seed += self.step  # other scenes than before
        log.info("%s: resumed at step %d", self.name, self.step)

    def rates(self) -> Iterator[int]:
        """Set the rate and yield the step's number, until the steps or the minutes are spent."""
        self.start = time.time()
        while (done := max(self.step / self.steps, (time.time() - self.start) / (60 * self.minutes))) < 1:
            self.step += 1
            rate = self.peak * min(1, self.step / 200) * (0.5 + 0.5 * math.cos(math.pi * done))
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            yield self.step

    def update(self, loss: torch.Tensor, figures: dict[str, float]) -> None:
        """One step against the gradient, clipped to norm 1."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], 1.0)
        self.optimizer.step()
        self.average(**figures)

    def report(self, every: int, check: Callable[[], str]) -> None:
        """Log at every so many steps; check and save at every third of these."""
        if self.step % every == 0:
            log.info("%s %5d %4.0f s %s", self.name, self.step, time.time() - self.start, self.average)
        if self.step % (3 * every) == 0:
            log.info("%s %5d %s", self.name, self.step, check())
            self.parts.keep(self.partial, optimizer=self.optimizer.state_dict(), step=self.step)


def bf16() -> torch.autocast:
    """Matrix products in bfloat16."""
    return torch.autocast("cpu", torch.bfloat16)


# ---------------------------------------------------------------------------
# labels


def heads(width: int) -> torch.nn.ModuleList:
    """One linear layer for each label of a scene."""
    return torch.nn.ModuleList(torch.nn.Linear(width, n) for n in LABELS)


Possible = tuple[torch.Tensor, ...] | None
Said = tuple[Packed, torch.Tensor] | None


def label_losses(
    readers: torch.nn.ModuleList, states: list[torch.Tensor], numbers: torch.Tensor, possible: Possible = None
) -> tuple[torch.Tensor, list[float]]:
    """The summed loss of a scene's labels and the accuracy of each (-1: no label).

    What is not ``possible`` does not compete in the softmax.
    """
    total, right = torch.zeros(()), []
    for i, (reader, state, wanted) in enumerate(zip(readers, states, numbers.unbind(1), strict=True)):
        logits = reader(state.float())
        known = wanted >= 0
        right.append((logits.argmax(-1)[known] == wanted[known]).float().mean().item())
        if possible is not None:
            ok = possible[min(i, 2)]
            logits[:, : ok.shape[1]].masked_fill_(~ok, -1e4)
        total = total + cross_entropy(logits, wanted, ignore_index=-1)
    return total, right


# ---------------------------------------------------------------------------
# stage 1: vision


@dataclass
class HeldOut:
    """A few held-out scenes, to watch the training with."""

    pixels: torch.Tensor
    patches: torch.Tensor
    numbers: torch.Tensor
    scenes: list[scenes.Scene]

    @classmethod
    def draw(cls, seed: int, number: int) -> HeldOut:
        """Draw held-out scenes."""
        rng = random.Random(seed)
        drawn = [scenes.scene(rng, "heldout") for _ in range(number)]
        pixels = np.stack([np.asarray(shrink(s.image)) for s in drawn])
        patches = torch.from_numpy(np.stack([s.patches.reshape(-1) for s in drawn]))
        numbers = torch.tensor([s.attributes.indices() for s in drawn])
        return cls(normalised(pixels), patches, numbers, drawn)


def patch_loss(logits: torch.Tensor, patches: torch.Tensor, possible: Possible = None) -> tuple[torch.Tensor, float]:
    """Cross-entropy over patches, those of objects counted most; their accuracy."""
    objects = (patches < len(scenes.THINGS)).flatten()
    right = (logits.flatten(0, 1).argmax(-1) == patches.flatten())[objects].float().mean()
    if possible is not None:
        ok = torch.cat([possible[2], possible[1]], 1)
        logits = logits.masked_fill(~ok[:, None], -1e4)
    losses = cross_entropy(logits.flatten(0, 1), patches.flatten(), reduction="none", ignore_index=CLASSES)
    weights = torch.where(objects, 1.0, 0.2)
    return (losses * weights).sum() / weights.sum(), right.item()


@torch.no_grad()
def check_vision(parts: Parts, held: HeldOut) -> str:
    """Accuracy of the encoder's labels on held-out scenes."""
    with bf16():
        states = parts.model.vision_model(held.pixels).last_hidden_state
    _, right = patch_loss(parts.patch_reader(states[:, 1:].float()), held.patches)
    _, labels = label_losses(parts.class_readers, [states[:, 0]] * 4, held.numbers)
    named = [f"{n} {r:.3f}" for n, r in zip(LABEL_NAMES, labels, strict=True)]
    return f"held-out object patches {right:.3f} {' '.join(named)}"


def vision_losses(
    parts: Parts, states: torch.Tensor, patches: torch.Tensor, numbers: torch.Tensor, possible: Possible
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss of stage 1: a label and its place for each patch, the scene's at the class token.

    The place is asked for because the Q-Former could not tell left from right without it.
    """
    with bf16():
        logits, places = parts.patch_reader(states[:, 1:]), parts.place_reader(states[:, 1:])
    place = cross_entropy(places.float().flatten(0, 1), torch.arange(scenes.GRID**2).repeat(len(states)))
    loss, right = patch_loss(logits.float(), patches, possible)
    labelled, _ = label_losses(parts.class_readers, [states[:, 0]] * 4, numbers, possible)
    figures = {"loss": loss.item(), "patches": right, "labels": labelled.item(), "place": place.item()}
    return loss + 0.15 * labelled + 0.2 * place, figures


def train_vision(parts: Parts, options: argparse.Namespace) -> None:
    """Stage 1: the vision encoder alone, on scenes and crowded pictures."""
    stage = Stage("vision", parts, options, ("vision_model", "patch_reader", "place_reader", "class_readers"))
    held = HeldOut.draw(options.seed + 100, 256)
    pool = Pool.empty(30_000, (scenes.SIZE, scenes.SIZE, 3), np.uint8)
    rng = np.random.default_rng(stage.seed)
    with Feed(stage.seed + 1, stage.batch // 3, collages=0.5) as fresh:
        for _ in range(50):
            pool.add_pixels(fresh())
        for _ in stage.rates():
            pool.add_pixels(fresh())
            at = pool.draw(rng, stage.batch)
            with bf16():
                states = parts.model.vision_model(normalised(pool.inputs[at])).last_hidden_state
            stage.update(*vision_losses(parts, states, *pool.labels(at), pool.possible(at)))
            stage.report(100, lambda: check_vision(parts, held))
    log.info("vision ended at step %d: %s", stage.step, check_vision(parts, held))


# ---------------------------------------------------------------------------
# stages 2 and 3: Q-Former, then language model, on the frozen encoder


@torch.no_grad()
def features(model: Blip2ForConditionalGeneration, pixels: np.ndarray) -> np.ndarray:
    """The vision encoder's output ``[n, 65, 192]`` in half precision."""
    with bf16():
        return model.vision_model(normalised(pixels)).last_hidden_state.half().numpy()


def query_features(model: Blip2ForConditionalGeneration, states: torch.Tensor) -> torch.Tensor:
    """Vision states to what the language model is given, ``[n, 32, 160]``."""
    with bf16():
        queries = model.query_tokens.expand(len(states), -1, -1)
        output = model.qformer(query_embeds=queries, encoder_hidden_states=states)
        return model.language_projection(output.last_hidden_state)


def predictions(
    model: Blip2ForConditionalGeneration, queries: torch.Tensor, texts: Packed
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at every place that has a target, and these targets."""
    with bf16():
        embeddings = model.get_input_embeddings()(texts.ids)
        inputs = torch.cat([queries, embeddings.to(queries.dtype)], 1)
        places = torch.arange(checkpoint.QUERIES).expand(len(queries), -1)
        states = model.language_model.model.decoder(
            inputs_embeds=inputs,
            attention_mask=texts.mask(queries.dtype),
            position_ids=torch.cat([places, texts.positions], 1),
            use_cache=False,
        ).last_hidden_state[:, checkpoint.QUERIES :]
        wanted = texts.targets >= 0
        return model.language_model.lm_head(states[wanted]).float(), texts.targets[wanted]


def exact(logits: torch.Tensor, texts: Packed) -> torch.Tensor:
    """``[B, parts]``: 1 where a whole text is predicted, 0 where not, -1 where there is none.

    With the right text before it, each next token is right just when greedy search
    would write the whole text.
    """
    wrong = torch.zeros(texts.targets.shape, dtype=torch.long)
    wanted = texts.targets >= 0
    wrong[wanted] = (logits.argmax(-1) != texts.targets[wanted]).long()
    number = int(texts.part.max()) + 1
    errors = torch.zeros(len(wrong), number, dtype=torch.long).scatter_add_(1, texts.part, wrong)
    there = torch.zeros_like(errors).scatter_add_(1, texts.part, torch.ones_like(wrong)) > 0
    return torch.where(there, (errors == 0).long(), -1)[:, 1:]


@torch.no_grad()
def check_queries(parts: Parts, held: HeldOut, packer: Packer | None = None) -> str:
    """Accuracy on held-out scenes: the queries' labels, and captions and answers."""
    with bf16():
        states = parts.model.vision_model(held.pixels).last_hidden_state
    queries = query_features(parts.model, states.float())
    chosen = [queries[:, i] for i in range(4)]
    _, labels = label_losses(parts.query_readers, chosen, held.numbers)
    named = [f"{n} {r:.3f}" for n, r in zip(LABEL_NAMES, labels, strict=True)]
    if packer is None:
        return f"held-out {' '.join(named)}"
    texts = packer([all_segments(s) for s in held.scenes])
    right = exact(predictions(parts.model, queries, texts)[0], texts).float()
    answers = right[:, 1:][right[:, 1:] >= 0]
    return f"held-out {' '.join(named)} captions {right[:, 0].mean():.3f} answers {answers.mean():.3f}"


def text_loss(
    parts: Parts, queries: torch.Tensor, texts: Packed, excluded: torch.Tensor
) -> tuple[torch.Tensor, dict[str, float]]:
    """The language model's loss and the share of captions and answers that are exact."""
    logits, targets = predictions(parts.model, queries, texts)
    right = exact(logits.detach(), texts).float()
    answers = right[:, 1:][right[:, 1:] >= 0]
    row = torch.nonzero(texts.targets >= 0)[:, 0]
    loss = cross_entropy(logits.masked_fill(excluded[row], -1e4), targets)
    figures = {"text": loss.item(), "captions": right[:, 0].mean().item(), "answers": answers.mean().item()}
    return loss, figures


def query_losses(
    parts: Parts, states: torch.Tensor, numbers: torch.Tensor, possible: Possible, said: Said
) -> tuple[torch.Tensor, dict[str, float]]:
    """Labels at the first four queries and, if there are texts, the language model's loss."""
    queries = query_features(parts.model, states)
    chosen = [queries[:, i] for i in range(4)]
    labelled, right = label_losses(parts.query_readers, chosen, numbers, possible)
    figures = {"labels": labelled.item(), **dict(zip(LABEL_NAMES, right, strict=True))}
    if said is None:
        return labelled, figures
    loss, more = text_loss(parts, queries, *said)
    return loss + 0.2 * labelled, figures | more


def texts_of(pool: Pool, at: np.ndarray, packer: Packer, rng: random.Random) -> Said:
    """Texts for the scenes of a batch, and the tokens excluded for each."""
    return packer([segments(pool.attributes[i], rng) for i in at]), packer.excluded(pool.possible(at))


def frozen_stage(stage: Stage, with_texts: bool, seed: int) -> None:
    """Train behind the frozen vision encoder, on features that are kept in a pool."""
    parts, packer = stage.parts, Packer(stage.parts.tokenizer)
    held = HeldOut.draw(seed + 100, 512)
    width = parts.model.config.vision_config.hidden_size
    pool = Pool.empty(60_000, (1 + scenes.GRID**2, width), np.float16)
    rng, text_rng = np.random.default_rng(stage.seed), random.Random(stage.seed)

    def add(drawn: Drawn) -> None:
        pool.add(features(parts.model, drawn[0]), drawn)

    def check() -> str:
        return check_queries(parts, held, packer if with_texts else None)

    with Feed(stage.seed + 1, stage.batch // 4, collages=0) as fresh:
        for _ in range(200):
            add(fresh())
        for _ in stage.rates():
            add(fresh())
            at = pool.draw(rng, stage.batch)
            said = texts_of(pool, at, packer, text_rng) if with_texts else None
            states = torch.from_numpy(pool.inputs[at]).float()
            stage.update(*query_losses(parts, states, pool.labels(at)[1], pool.possible(at), said))
            stage.report(100, check)
    log.info("%s ended at step %d: %s", stage.name, stage.step, check())


def train_queries(parts: Parts, options: argparse.Namespace) -> None:
    """Stage 2: the Q-Former learns to say at four queries what is in the picture."""
    trained = ("query_tokens", "qformer", "language_projection", "query_readers")
    frozen_stage(Stage("queries", parts, options, trained), False, options.seed)


def train_joint(parts: Parts, options: argparse.Namespace) -> None:
    """Stage 3: the Q-Former and the language model together."""
    trained = ("query_tokens", "qformer", "language_projection", "language_model", "query_readers")
    frozen_stage(Stage("joint", parts, options, trained), True, options.seed)


# ---------------------------------------------------------------------------
# stage 4: everything


def train_all(parts: Parts, options: argparse.Namespace) -> None:
    """Stage 4: all of the model, the vision encoder too, on scenes that are seen about once."""
    stage = Stage("all", parts, options, ("model", "patch_reader", "place_reader", "class_readers", "query_readers"))
    held, packer = HeldOut.draw(options.seed + 100, 512), Packer(parts.tokenizer)
    pool = Pool.empty(20 * stage.batch, (scenes.SIZE, scenes.SIZE, 3), np.uint8)
    rng, text_rng = np.random.default_rng(stage.seed), random.Random(stage.seed)
    with Feed(stage.seed + 1, stage.batch, collages=0) as fresh:
        for _ in range(10):
            pool.add_pixels(fresh())
        for _ in stage.rates():
            pool.add_pixels(fresh())
            at = pool.draw(rng, stage.batch)
            with bf16():
                states = parts.model.vision_model(normalised(pool.inputs[at])).last_hidden_state
            patches, numbers = pool.labels(at)
            possible = pool.possible(at)
            seen, place = vision_losses(parts, states, patches, numbers, possible)
            said = texts_of(pool, at, packer, text_rng)
            loss, figures = query_losses(parts, states.float(), numbers, possible, said)
            stage.update(loss + 0.3 * seen, figures | {"place": place["place"]})
            stage.report(50, lambda: check_queries(parts, held, packer))
    log.info("all ended at step %d: %s", stage.step, check_queries(parts, held, packer))


# ---------------------------------------------------------------------------
# the whole


STAGES: dict[str, Callable[[Parts, argparse.Namespace], None]] = {
    "vision": train_vision,
    "queries": train_queries,
    "joint": train_joint,
    "all": train_all,
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the checkpoint's folder")
    parser.add_argument("--work", type=Path, default=Path("build/sample_model"), help="unfinished states")
    parser.add_argument("--log", type=Path, help="also append the log to this file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    budgets = ((1600, 60, 1e-3), (500, 15, 1e-3), (1000, 60, 1e-3), (900, 60, 5e-4))
    for stage, (steps, minutes, peak) in zip(STAGES, budgets, strict=True):
        parser.add_argument(f"--steps-{stage}", type=int, default=steps)
        parser.add_argument(f"--minutes-{stage}", type=float, default=minutes, help="at most so long")
        parser.add_argument(f"--peak-{stage}", type=float, default=peak, help="highest learning rate")
    return parser.parse_args()


def begin(options: argparse.Namespace) -> None:
    """Log to the terminal and to `options.log`, make the work folder, set threads and seed."""
    handlers = [logging.StreamHandler(), *([logging.FileHandler(options.log)] if options.log else [])]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    options.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)


def main() -> None:
    """Run the stages that are not done and write the checkpoint."""
    options = parse()
    begin(options)
    parts = Parts.fresh()
    size = sum(p.numel() for p in parts.model.parameters()) / 1e6
    log.info("%.2f M parameters, seed %d", size, options.seed)
    for name, stage in STAGES.items():
        path = options.work / f"{name}.pt"
        if path.exists():
            parts.restore(path)
            log.info("%s: taken from an earlier run", name)
            continue
        stage(parts, options)
        parts.keep(path)
        checkpoint.save(parts.model, parts.tokenizer, options.out)


if __name__ == "__main__":
    main()
