"""How nearly blip2c agrees with transformers, family by family: the largest error of logits and loss, and tokens.

    python benchmarks/agreement.py [--options 500] [--seed 2] [FAMILY ...]      # opt llama t5 instructblip

Models, pictures, option sets and what counts as a tie are those of tests/test_generate.py. Logits and loss are compared
in float32 on two batches a model. Beside the difference of the two stand each one's own from transformers in float64,
and the logits' standard deviation: random models magnify rounding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import test_generate as cases
from helpers import prompt_ids, reference_model

COLUMNS = (
    "family", "models", "logits max error", "ours from float64", "theirs from float64", "logits spread", "loss error",
    "tried", "equal", "tie", "refused",
)  # fmt: skip


class Folders:
    """pytest's tmp_path_factory, as far as it is used."""

    def __init__(self, root: str) -> None:
        self.root, self.count = Path(root), 0

    def mktemp(self, name: str) -> Path:
        self.count += 1
        folder = self.root / f"{name}{self.count}"
        folder.mkdir()
        return folder


def forward_errors(model: Any, reference: Any, folder: Path, seed: int) -> tuple[float, ...]:
    """Largest difference of logits, of ours and of theirs from float64, their standard deviation, that of the loss."""
    rng = np.random.default_rng(seed)
    inputs: dict[str, Any] = {}
    while "input_ids" not in inputs:
        inputs = cases.inputs_for(rng, reference.config)
    inputs["input_ids"] = prompt_ids(reference.config, len(inputs["pixel_values"]), 12, seed)
    inputs.pop("attention_mask", None)
    ids = inputs["input_ids"]
    labels = np.where(ids == reference.config.image_token_index, -100, ids)
    if reference.config.text_config.is_encoder_decoder:
        labels = np.ascontiguousarray(labels[:, -8:])
    ours = model(**inputs, labels=labels)
    with torch.no_grad():
        theirs = reference(**cases.torch_inputs(inputs), labels=torch.from_numpy(labels))
        wide = {**inputs, "pixel_values": inputs["pixel_values"].astype(np.float64)}
        exact = reference_model(folder, torch.float64)(
            **cases.torch_inputs(wide), labels=torch.from_numpy(labels)
        ).logits.numpy()
    logits = theirs.logits.numpy()
    distances = (np.abs(a - b).max() for a, b in ((ours.logits, logits), (ours.logits, exact), (logits, exact)))
    return *distances, logits.std(), abs(float(ours.loss) - float(theirs.loss))


def row(family: str, count: int, seed: int) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory() as root, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pairs = cases.make_pairs(Folders(root), family)  # type: ignore[arg-type]
        errors = [forward_errors(*pair, seed + i) for pair in pairs for i in range(2)]
        tally = cases.run_cases(pairs, count, seed)
    for wrong in tally.wrong:
        print(wrong, file=sys.stderr)
    *logits, spread, loss = (max(values) for values in zip(*errors, strict=True))
    counts = (tally.cases, tally.equal, tally.excused, tally.refused)
    return (
        family,
        str(len(pairs)),
        *(f"{error:.1e}" for error in logits),
        f"{spread:.1f}",
        f"{loss:.1e}",
        *map(str, counts),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=[])
    parser.add_argument("--options", type=int, default=500, help="option sets a family")
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for family in args.families or cases.CHECKPOINTS:
        print("| " + " | ".join(row(family, args.options, args.seed)) + " |", flush=True)


if __name__ == "__main__":
    main()
