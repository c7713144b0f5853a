"""What blip2c is to reach at the true size, and whether medians of caption.py reach it.

There are two columns of targets, of processors with AVX-512 and of those with AVX2; seconds and gigabytes among them
are of blip2-opt-2.7b's shapes on two cores. Ratios are how many times as long a peer took in the same run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from blip2c import _core

Medians = dict[str, dict[str, float]]  # engine ("blip2c-int8", "transformers-float32" ...): row: median

FLOAT32, BFLOAT16, CTRANSLATE2 = "transformers-float32", "transformers-bfloat16", "ctranslate2-int8"


@dataclass(frozen=True)
class Target:
    work: str
    dtype: str  # of blip2c; "auto" is as the file has it
    bound: float
    at_least: bool  # else at most
    unit: str  # behind the figure: " s", " x transformers-float32" ...
    measure: Callable[[dict[str, float], Medians], float]  # (own medians, all): KeyError where one is missing
    families: tuple[str, ...] = ("opt",)


def limit(work: str, dtype: str, row: str, bound: float, unit: str) -> Target:
    return Target(work, dtype, bound, False, unit, lambda own, _: own[row])


def share(work: str, dtype: str, row: str, bound: float, of: str) -> Target:
    return Target(work, dtype, bound, True, f" % of {of}", lambda own, _: own[row], ("opt", "t5"))


def faster(work: str, dtype: str, row: str, times: float, peer: str) -> Target:
    families = {"llama.cpp": ("llama",), "transformers": ("opt", "t5"), "ctranslate2": ("opt",)}[peer.split("-")[0]]
    return Target(work, dtype, times, True, f" x {peer}", lambda own, every: every[peer][row] / own[row], families)


def within(work: str, dtype: str, row: str, times: float, other: str) -> Target:
    """At most so many times another row of the same engine."""
    return Target(work, dtype, times, False, f" x {other}", lambda own, _: own[row] / own[other], ("opt", "t5"))


BOTH_FIRST = [
    share("decode, a token", "auto", "decode_of_read", 85, "the read rate"),
]
BOTH_LAST = [
    faster("LLaMA, a token", "int8", "decode_token", 1.12, "llama.cpp-Q8_0"),
    faster("LLaMA, a token", "int4", "decode_token", 1.03, "llama.cpp-Q4_0"),
    faster("LLaMA, prefill 33", "int8", "prefill_33", 3, "llama.cpp-Q8_0"),
    faster("LLaMA, prefill 33", "int4", "prefill_33", 2, "llama.cpp-Q4_0"),
    within("a step of 5 beams", "int8", "beam5_step", 1.25, "decode_token"),
    limit("load of a packed file", "int8", "load", 0.15, " s"),
    limit("load of a packed file", "int4", "load", 0.15, " s"),
    limit("peak memory", "int8", "peak_rss", 4.3, " GB"),
    limit("peak memory", "int4", "peak_rss", 3.0, " GB"),
]
TARGETS = {
    "AVX-512": [
        limit("vision encoder", "bfloat16", "vit", 1.32, " s"),
        faster("vision encoder", "bfloat16", "vit", 1.3, BFLOAT16),
        faster("vision encoder", "auto", "vit", 1.2, FLOAT32),
        limit("vision encoder", "int8", "vit", 0.72, " s"),
        faster("vision encoder", "int8", "vit", 2.4, BFLOAT16),
        *BOTH_FIRST,
        faster("decode, a token", "auto", "decode_token", 2, BFLOAT16),
        faster("decode, a token", "auto", "decode_token", round(1 / 1.1, 3), CTRANSLATE2),
        faster("decode, a token", "int8", "decode_token", 1.9, CTRANSLATE2),
        limit("decode, a token", "int8", "decode_token", 0.088, " s"),
        faster("decode, a token", "int4", "decode_token", 3.4, CTRANSLATE2),
        limit("decode, a token", "int4", "decode_token", 0.050, " s"),
        faster("a step of 5 beams", "int8", "beam5_step", 2.2, CTRANSLATE2),
        faster("prefill 33", "int8", "prefill_33", 1.5, CTRANSLATE2),
        faster("caption of 20, greedy", "int8", "greedy_20", 3.1, BFLOAT16),
        faster("caption of 20, greedy", "int8", "greedy_20", 5.8, FLOAT32),
        limit("caption of 20, greedy", "int8", "greedy_20", 2.8, " s"),
        faster("caption of 20, greedy", "int4", "greedy_20", 4.2, BFLOAT16),
        limit("caption of 20, greedy", "int4", "greedy_20", 2.05, " s"),
        faster("caption of 20, 5 beams", "int8", "beam5_20", 3.4, BFLOAT16),
        faster("caption of 20, 5 beams", "int8", "beam5_20", 10, FLOAT32),
        limit("caption of 20, 5 beams", "int8", "beam5_20", 3.1, " s"),
        *BOTH_LAST,
    ],
    "AVX2": [
        share("vision encoder", "auto", "vit_of_peak", 80, "the multiply-add peak"),
        faster("vision encoder", "auto", "vit", 1.25, FLOAT32),
        faster("vision encoder", "int8", "vit", 2.1, FLOAT32),
        faster("vision encoder", "int8", "vit", 1.1, CTRANSLATE2),
        *BOTH_FIRST,
        faster("decode, a token", "auto", "decode_token", 2, FLOAT32),
        faster("decode, a token", "int8", "decode_token", 1.8, CTRANSLATE2),
        limit("decode, a token", "int8", "decode_token", 0.100, " s"),
        faster("decode, a token", "int4", "decode_token", 3.4, CTRANSLATE2),
        limit("decode, a token", "int4", "decode_token", 0.052, " s"),
        faster("a step of 5 beams", "int8", "beam5_step", 2, CTRANSLATE2),
        faster("prefill 33", "int8", "prefill_33", 1.1, CTRANSLATE2),
        faster("caption of 20, greedy", "int8", "greedy_20", 3, FLOAT32),
        faster("caption of 20, 5 beams", "int8", "beam5_20", 4, FLOAT32),
        *BOTH_LAST,
    ],
}  # fmt: skip


def column() -> str:
    """Of the instruction set in force."""
    return "AVX-512" if _core.cpu_info()["isa"].startswith("avx512") else "AVX2"


def verdict(target: Target, medians: Medians) -> tuple[str, str]:
    """(what was measured, whether that meets it)"""
    engine = f"blip2c-{target.dtype}"
    try:
        found = target.measure(medians[engine], medians)
    except KeyError as missing:
        return "", f"not measured: no {missing.args[0]}"
    met = found >= target.bound if target.at_least else found <= target.bound
    return f"{found:.3g} {target.unit.split()[0]}", "met" if met else "not met"


def target_table(medians: Medians, family: str) -> str:
    """Markdown: each target of this column and family of language models ("opt", "t5", "llama"), and what was found."""
    chosen = [target for target in TARGETS[column()] if family in target.families]
    lines = ["| work | dtype | target | measured | |", "|---|---|---|---|---|"]
    for target in chosen:
        sign = ">=" if target.at_least else "<="
        measured, met = verdict(target, medians)
        lines.append(f"| {target.work} | {target.dtype} | {sign} {target.bound:g}{target.unit} | {measured} | {met} |")
    counts = [sum(line.endswith(f"| {word} |") for line in lines) for word in ("met", "not met")]
    return "\n".join([*lines, "", f"{column()} targets: {counts[0]} met, {counts[1]} not met, of {len(chosen)}."])


def memory_lines(medians: Medians) -> str:
    """How nearly decoding reads its weights at the rate of plain reading, engine by engine."""
    lines = []
    for engine, rows in medians.items():
        if "decode_of_read" in rows:
            lines.append(
                f"{engine}: a token reads its weights at {rows['decode_of_read']:.0f} % of the rate of plain reading,"
                f" {rows['read_rate']:.1f} GB/s in turns with it"
            )
    return "\n".join(lines)
