"""What generate(return_dict_in_generate=True) returns, under transformers' class names, and what is made of it.

Source: transformers 5.23, generation/utils.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from blip2c.images import is_torch
from blip2c.inputs import to_numpy
from blip2c.outputs import Like, ModelOutput

if TYPE_CHECKING:
    from blip2c.callables import Hooks
    from blip2c.generation import Call

__all__ = [
    "GenerateBeamDecoderOnlyOutput", "GenerateBeamEncoderDecoderOutput", "GenerateDecoderOnlyOutput",
    "GenerateEncoderDecoderOutput", "compute_transition_scores", "generated",
]  # fmt: skip


class GenerateDecoderOnlyOutput(ModelOutput):
    """Without beams. B counts rows, num_return_sequences of each prompt; of every tuple there is one entry a step.

    sequences int64 [B, T]; scores float32 [B, V], processed; logits float32 [B, V], as the model gave them;
    attentions [B, H, Tq, Tk] and hidden_states [B, Tq, D]: a tuple over layers, Tq being the prompt's length in the
    first step, then 1. past_key_values is None: blip2c keeps no cache behind generate().
    """


class GenerateEncoderDecoderOutput(ModelOutput):
    """As GenerateDecoderOnlyOutput; sequences are decoder ids, and attentions and states come by part.

    decoder_attentions, cross_attentions and decoder_hidden_states by step; encoder_attentions and
    encoder_hidden_states, tuples over layers, with one row for each prompt.
    """


class GenerateBeamDecoderOnlyOutput(ModelOutput):
    """Beam search. Entries as in GenerateDecoderOnlyOutput, with B * num_beams rows in what comes by step, and

    sequences_scores float32 [B]: sum of log-probabilities / length ** length_penalty (only with output_scores);
    scores: log-probabilities, processed; beam_indices int32 [B, new]: the row of `scores` that each new token was taken
    from, -1 behind the end.
    """


class GenerateBeamEncoderDecoderOutput(ModelOutput):
    """As GenerateBeamDecoderOnlyOutput; sequences are decoder ids, and attentions and states come by part."""


def generated(
    call: Call, out: dict[str, Any], prompts: NDArray[np.int64], hooks: Hooks, like: Like, *, is_encoder_decoder: bool
) -> Any:
    """What generate() returns: ids [B * num_return_sequences, T + new], or an output that holds them.

    out: the C part's result. prompts [B, T]: the ids in front of the new ones.
    """
    rows = np.repeat(prompts, out["ids"].shape[0] // prompts.shape[0], axis=0)
    sequences = like.ids(np.concatenate([rows, np.asarray(out["ids"], np.int64)], axis=1))
    if call["return_dict_in_generate"] is not True:
        return sequences
    entries: dict[str, Any] = {
        "scores": _steps(hooks.scores, call["output_scores"], like),
        "logits": _steps(hooks.logits, call["output_logits"], like),
        "past_key_values": None,
    }
    states = {} if hooks.states is None else hooks.states.entries(like, is_encoder_decoder)
    if call.core["num_beams"] == 1:
        kind = GenerateEncoderDecoderOutput if is_encoder_decoder else GenerateDecoderOnlyOutput
        return kind(sequences=sequences, **entries, **states)
    beam = GenerateBeamEncoderDecoderOutput if is_encoder_decoder else GenerateBeamDecoderOnlyOutput
    scores = like.floats(out["scores"], keep=True) if call["output_scores"] is True else None
    indices = like.ids(out["beam_indices"])
    return beam(sequences=sequences, sequences_scores=scores, **entries, beam_indices=indices, **states)


def _steps(arrays: list[NDArray[np.float32]], is_wanted: Any, like: Like) -> Any:
    return tuple(like.floats(array, keep=True) for array in arrays) if is_wanted is True else None


def compute_transition_scores(
    sequences: Any, scores: Any, beam_indices: Any = None, normalize_logits: bool = False
) -> Any:
    """Scores of the chosen tokens, float32 [B, new]; 0 behind the end of a beam. A tensor for tensors.

    sequences [B, T], scores (a [rows, V] for each step) and beam_indices [B, new] (None without beams) are entries of
    what generate() returned. normalize_logits: scores are made log-probabilities first.
    Source: transformers' `GenerationMixin.compute_transition_scores`.
    """
    ids, steps = to_numpy(sequences), [np.asarray(to_numpy(step), np.float32) for step in scores]
    if not steps:
        raise ValueError("scores: expected the scores of at least one step; ask generate() for output_scores=True")
    stacked = np.stack(steps)
    if normalize_logits:
        stacked = log_softmax(stacked)
    if beam_indices is None:
        beams = np.repeat(np.arange(stacked.shape[1])[:, None], stacked.shape[0], axis=1)
    else:
        beams = to_numpy(beam_indices)
        beams = beams[:, : int((beams >= 0).sum(axis=1).max(initial=0))]
    new = beams.shape[1]
    if beams.shape[0] != ids.shape[0] or new > min(ids.shape[1], stacked.shape[0]):
        raise ValueError(
            f"beam_indices {list(beams.shape)} do not belong to sequences {list(ids.shape)} and {len(steps)} scores"
        )
    chosen, rows = ids[:, ids.shape[1] - new :], np.where(beams < 0, 0, beams)
    for name, found, end in (("sequences", chosen, stacked.shape[2]), ("beam_indices", rows, stacked.shape[1])):
        if found.size and not 0 <= found.min() <= found.max() < end:
            raise ValueError(f"{name}: expected 0 to {end - 1}, found {found.min()} to {found.max()}")
    result = stacked[np.arange(new)[None, :], rows, chosen]
    result[beams < 0] = 0
    if not is_torch(sequences):
        return result
    import torch

    return torch.from_numpy(result)


def log_softmax(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis; forbidden tokens stay forbidden."""
    top = scores.max(axis=-1, keepdims=True)
    total = np.log(np.exp(scores - top, dtype=np.float64).sum(axis=-1, keepdims=True)).astype(np.float32)
    result: NDArray[np.float32] = (scores - top) - total
    return result
