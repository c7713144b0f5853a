"""Times blip2c and its peers on the same checkpoint: separate processes, interleaved, medians, ratios.

    python benchmarks/make_checkpoint.py /tmp/blip2-opt-2.7b-random
    python benchmarks/caption.py /tmp/blip2-opt-2.7b-random --rounds 5 --dtypes auto bfloat16 int8 int4

    pip install ctranslate2 && python benchmarks/make_peers.py /tmp/blip2-opt-2.7b-random /tmp/opt-2.7b-ct2
    python benchmarks/caption.py /tmp/blip2-opt-2.7b-random --dtypes int8 int4 --ctranslate2 /tmp/opt-2.7b-ct2

    pip install llama-cpp-python gguf && python benchmarks/make_peers.py LLAMA_CHECKPOINT /tmp/llama-2.7b.gguf
    python benchmarks/caption.py LLAMA_CHECKPOINT --dtypes int8 int4 --llama /tmp/llama-2.7b.gguf --no-transformers

Every round starts each engine once in a fresh process, which loads the checkpoint and runs every piece of work. Rows:
load, ViT, Q-Former with projection, prefill of 33 tokens, one decoded token, one step of 5 beams, captions of 20
tokens, greedy and with 5 beams; the rate at which this process read memory just then; peak resident memory of the
process after a greedy caption and after everything. CTranslate2 and llama.cpp have the language model alone. int8 and
int4 are first written to a packed folder beside the checkpoint (`blip2c quantize`), and load from there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROWS = {
    "load": "s", "vit": "s", "qformer": "s", "prefill_33": "s", "decode_token": "s", "beam5_step": "s",
    "greedy_20": "s", "beam5_20": "s", "read_rate": "GB/s", "peak_rss_greedy": "GB", "peak_rss": "GB",
}  # fmt: skip
NEW_TOKENS, PROMPT = 20, 33


def peak_rss() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def several(work: Callable[[], Any]) -> float:
    """Median of three."""
    return statistics.median(timed(work)[0] for _ in range(3))


def picture(size: int) -> np.ndarray:
    """One random picture [1, 3, S, S], normalised."""
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


def captions(row: dict[str, float], generate: Callable[[int, int], Any]) -> None:
    """generate(new_tokens, beams) to ids. A token or a step is (20 tokens - 1 token) / 19."""
    one, _ = timed(lambda: generate(1, 1))
    row["greedy_20"], _ = timed(lambda: generate(NEW_TOKENS, 1))
    row["decode_token"] = (row["greedy_20"] - one) / (NEW_TOKENS - 1)
    row["peak_rss_greedy"] = peak_rss()
    one, _ = timed(lambda: generate(1, 5))
    row["beam5_20"], _ = timed(lambda: generate(NEW_TOKENS, 5))
    row["beam5_step"] = (row["beam5_20"] - one) / (NEW_TOKENS - 1)
    row["peak_rss"] = peak_rss()


def read_rate() -> float:
    """GB/s at which both threads read memory: the check for NaN does nothing else."""
    from blip2c import kernels

    memory = np.ones((8192, 8192), np.float32)
    return max(memory.nbytes / timed(lambda: kernels.first_bad_row(memory))[0] for _ in range(5)) / 1e9


def run_blip2c(folder: str, dtype: str) -> dict[str, float]:
    import blip2c
    from blip2c.generation import core_options

    row: dict[str, float] = {}
    packed = packed_folder(folder, dtype)
    options = {} if packed else {"dtype": dtype}
    row["load"], model = timed(
        lambda: blip2c.Blip2ForConditionalGeneration.from_pretrained(packed or folder, **options)
    )
    core, pixels = model._core, picture(model.config.vision_config.image_size)
    features = core.encode(pixels)  # first touch of every page
    row["vit"] = several(lambda: core.vision(pixels))
    vision = core.vision(pixels)
    row["qformer"] = several(lambda: core.read(vision))
    ids = np.array([-1] * model.config.num_query_tokens + [2], np.int32)
    offsets = np.array([0, len(ids)], np.int64)
    one_token = core_options(model.generation_config, {"max_new_tokens": 1}, [len(ids)])
    core.generate(features, ids, offsets, None, ids, one_token)
    row["prefill_33"] = several(lambda: core.generate(features, ids, offsets, None, ids, one_token))
    captions(
        row,
        lambda tokens, beams: model.generate(
            pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams
        ),
    )
    row["read_rate"] = read_rate()
    return row


def packed_folder(folder: str, dtype: str) -> str | None:
    return f"{folder.rstrip('/')}-{dtype}" if dtype in ("int8", "int4") else None


def quantize(folder: str, dtype: str) -> None:
    """Writes the packed folder, unless one of the same checkpoint and version is there."""
    from blip2c import _core
    from blip2c.checkpoint import PACKED_WEIGHTS

    out = packed_folder(folder, dtype)
    if out is None:
        return
    sources = sorted(path for path in Path(folder).iterdir() if path.suffix in (".safetensors", ".json"))
    stamps = [f"{path} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in sources]
    made_of = "\n".join([f"packed {_core.PACKED_VERSION}", *stamps, ""])
    note = Path(out, "made_of.txt")
    if note.is_file() and note.read_text() == made_of and Path(out, PACKED_WEIGHTS).is_file():
        return
    for stale in (note, Path(out, PACKED_WEIGHTS)):
        stale.unlink(missing_ok=True)
    subprocess.run([sys.executable, "-m", "blip2c", "quantize", folder, out, "--dtype", dtype], check=True)
    note.write_text(made_of)


def language_rows(generate: Callable[[int, int], Any]) -> dict[str, float]:
    """generate(new_tokens, beams) behind a prompt of 33 tokens, of an engine that has the language model alone.

    Prefill is the time to the first token less one step: these engines read the last token of a prompt in a step.
    """
    generate(2, 1)
    row: dict[str, float] = {}
    first = several(lambda: generate(1, 1))
    all_of_them, _ = timed(lambda: generate(NEW_TOKENS, 1))
    row["decode_token"] = (all_of_them - first) / (NEW_TOKENS - 1)
    row["prefill_33"] = first - row["decode_token"]
    first, _ = timed(lambda: generate(1, 5))
    all_of_them, _ = timed(lambda: generate(NEW_TOKENS, 5))
    row["beam5_step"] = (all_of_them - first) / (NEW_TOKENS - 1)
    row["peak_rss"] = peak_rss()
    return row


def run_ctranslate2(folder: str) -> dict[str, float]:
    import ctranslate2

    threads = len(os.sched_getaffinity(0))
    load, model = timed(lambda: ctranslate2.Generator(folder, compute_type="int8", intra_threads=threads))
    prompt = [f"<{i}>" for i in range(100, 100 + PROMPT)]
    return {"load": load} | language_rows(
        lambda tokens, beams: model.generate_batch(
            [prompt], max_length=tokens, min_length=tokens, beam_size=beams, include_prompt_in_result=False
        )
    )


def run_llama(file: str) -> dict[str, float]:
    """Greedy alone: the library has no beam search."""
    from llama_cpp import Llama

    threads = len(os.sched_getaffinity(0))
    load, model = timed(
        lambda: Llama(file, n_ctx=256, n_threads=threads, n_threads_batch=threads, use_mmap=True, verbose=False)
    )
    prompt = list(range(100, 100 + PROMPT))

    def run() -> tuple[float, float]:
        model.reset()
        prefill, _ = timed(lambda: model.eval(prompt))
        step = statistics.median(timed(lambda: model.eval(prompt[:1]))[0] for _ in range(NEW_TOKENS - 1))
        return prefill, step

    run()
    prefill, step = (statistics.median(times) for times in zip(*(run() for _ in range(3)), strict=True))
    return {"load": load, "prefill_33": prefill, "decode_token": step, "peak_rss": peak_rss()}


def run_transformers(folder: str, dtype: str) -> dict[str, float]:
    # transformers looks for a package called `kernels`, which must not be the script of that name beside this one.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    import torch
    from transformers import Blip2ForConditionalGeneration

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    row: dict[str, float] = {}
    kind = getattr(torch, dtype)
    row["load"], model = timed(lambda: Blip2ForConditionalGeneration.from_pretrained(folder, dtype=kind).eval())
    pixels = torch.from_numpy(picture(model.config.vision_config.image_size)).to(kind)
    with torch.inference_mode():
        embeds = model.get_image_features(pixels).pooler_output.to(kind)
        vision = model.vision_model(pixels).last_hidden_state
        row["vit"] = several(lambda: model.vision_model(pixels))

        def qformer() -> torch.Tensor:
            out = model.qformer(query_embeds=model.query_tokens, encoder_hidden_states=vision)
            projected: torch.Tensor = model.language_projection(out.last_hidden_state.to(kind))
            return projected

        row["qformer"] = several(qformer)
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([[2]]))], 1)
        row["prefill_33"], _ = timed(lambda: model.language_model(inputs_embeds=embeds, logits_to_keep=1))
        captions(
            row,
            lambda tokens, beams: model.generate(
                pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams
            ),
        )
    return row


def has_bf16() -> bool:
    with open("/proc/cpuinfo") as file:
        return "avx512_bf16" in file.read()


def cpu_name() -> str:
    with open("/proc/cpuinfo") as file:
        fields = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    name = values.get("model name", platform.processor())
    return f"{name} (family {values.get('cpu family')}, model {values.get('model')})"


def run_engine(engine: str, arguments: argparse.Namespace) -> dict[str, float]:
    """In this process: "blip2c-int8", "transformers-float32", "ctranslate2-int8", "llama.cpp-Q8_0" ..."""
    name, _, kind = engine.partition("-")
    if name == "blip2c":
        return run_blip2c(arguments.folder, kind)
    if name == "transformers":
        return run_transformers(arguments.folder, kind)
    if name == "ctranslate2":
        return run_ctranslate2(arguments.ctranslate2)
    file = Path(arguments.llama)
    return run_llama(str(file if kind == "Q8_0" else file.with_stem(f"{file.stem}-q4")))


def start_engine(engine: str, arguments: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, arguments.folder, "--engine", engine]
    for option in ("ctranslate2", "llama"):
        if getattr(arguments, option):
            command += [f"--{option}", getattr(arguments, option)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: the median of each piece of work in each engine."""
    engines = list(results)
    lines = ["| work | " + " | ".join(engines) + " |", "|---" * (len(engines) + 1) + "|"]
    for key, unit in ROWS.items():
        medians = [median(results[engine], key) for engine in engines]
        lines.append(f"| {key} | " + " | ".join("" if m is None else f"{m:.3g} {unit}" for m in medians) + " |")
    return "\n".join(lines)


def ratios(results: dict[str, list[dict[str, float]]]) -> str:
    """Markdown: how many times as long (or as much) each peer took as each of ours; above 1, blip2c is better."""
    ours = [engine for engine in results if engine.startswith("blip2c")]
    peers = [engine for engine in results if engine not in ours]
    pairs = [(peer, own) for own in ours for peer in peers]
    lines = ["| work | " + " | ".join(f"{peer} / {own}" for peer, own in pairs) + " |", "|---" * (len(pairs) + 1) + "|"]
    for key in (key for key in ROWS if key != "read_rate"):
        cells = []
        for peer, own in pairs:
            m, n = median(results[peer], key), median(results[own], key)
            cells.append(f"{m / n:.2f} x" if m is not None and n else "")
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def median(runs: list[dict[str, float]], key: str) -> float | None:
    found = [run[key] for run in runs if key in run]
    return statistics.median(found) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["auto"], help="of blip2c: auto bfloat16 int8 int4")
    parser.add_argument("--ctranslate2", metavar="FOLDER", help="the language model for CTranslate2")
    parser.add_argument("--llama", metavar="FILE", help="the language model for llama.cpp, Q8_0")
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--engine", help="run one engine in this process and print its figures as JSON")
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(run_engine(arguments.engine, arguments)))
        return
    engines = [f"blip2c-{dtype}" for dtype in arguments.dtypes]
    if not arguments.no_transformers:
        engines += ["transformers-float32", *(["transformers-bfloat16"] if has_bf16() else [])]
    engines += ["ctranslate2-int8"] if arguments.ctranslate2 else []
    engines += ["llama.cpp-Q8_0", "llama.cpp-Q4_0"] if arguments.llama else []
    for dtype in arguments.dtypes:
        quantize(arguments.folder, dtype)
    results: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for i in range(arguments.rounds):
        for engine in engines:
            results[engine].append(start_engine(engine, arguments))
            print(f"round {i + 1}: {engine}: {json.dumps(results[engine][-1])}", file=sys.stderr, flush=True)
    print(f"{cpu_name()}, {len(os.sched_getaffinity(0))} processors, medians of {arguments.rounds}\n")
    print(table(results), "\n\n", ratios(results), sep="")


if __name__ == "__main__":
    main()
