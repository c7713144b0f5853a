"""Times blip2c and its peers on the same checkpoint: separate processes, interleaved, medians, ratios.

    python benchmarks/make_checkpoint.py /tmp/blip2-opt-2.7b-random
    python benchmarks/caption.py /tmp/blip2-opt-2.7b-random --rounds 5 --dtypes auto bfloat16 int8 int4

    pip install ctranslate2 && python benchmarks/make_peers.py /tmp/blip2-opt-2.7b-random /tmp/opt-2.7b-ct2
    python benchmarks/caption.py /tmp/blip2-opt-2.7b-random --dtypes int8 int4 --ctranslate2 /tmp/opt-2.7b-ct2

    pip install llama-cpp-python gguf && python benchmarks/make_peers.py LLAMA_CHECKPOINT /tmp/llama-2.7b.gguf
    python benchmarks/caption.py LLAMA_CHECKPOINT --dtypes int8 int4 --llama /tmp/llama-2.7b.gguf --no-transformers

Every round starts each engine once in a fresh process, which loads the checkpoint and runs every piece of work. Rows:
load, ViT, Q-Former with projection, prefill of 33 tokens, one decoded token, one step of 5 beams, captions of 20
tokens, greedy and with 5 beams; the ViT's share of the peak of its arithmetic; the rate at which the process read
memory in turns with decoding, and the share of it at which a token reads its weights; peak resident memory of the
process after a greedy caption and after everything. CTranslate2 has the language model, and the layers of the ViT as
those of its text encoder (make_peers.py), llama.cpp the language model alone. int8 and int4 are first written to a
packed folder beside the checkpoint (`blip2c quantize`), and load from there.

At the end the table of targets (targets.py) of the instruction set in force, AVX-512 or AVX2, with what was measured.
The AVX2 column on a processor that has more:

    export BLIP2C_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 CT2_FORCE_CPU_ISA=AVX2
"""

from __future__ import annotations

import argparse
import json
import os
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
    "greedy_20": "s", "beam5_20": "s", "peak_rss_greedy": "GB", "peak_rss": "GB",
    "vit_of_peak": "%", "read_rate": "GB/s", "decode_of_read": "%",
}  # fmt: skip
OF_THE_MACHINE = ("vit_of_peak", "read_rate", "decode_of_read")
NEW_TOKENS, PROMPT = 20, 33
# blip2c, and what imports it, is imported where it is needed: the processes of peers are to have nothing of it.
Medians = dict[str, dict[str, float]]  # engine: row: median


def processors() -> int:
    return len(os.sched_getaffinity(0))


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


def memory_rows(row: dict[str, float], size: float, generate: Callable[[int], Any]) -> None:
    """generate(new_tokens), each after the first reading `size` bytes of weights: in turns with plain reading."""
    import machine

    rates, shares = [], []
    for _ in range(3):
        rates.append(machine.read_rate(3, 256))
        one, _ = timed(lambda: generate(1))
        more, _ = timed(lambda: generate(11))
        shares.append(100 * size * 10 / (more - one) / rates[-1])
    row["read_rate"], row["decode_of_read"] = statistics.median(rates) / 1e9, statistics.median(shares)


def generation(model: Any, features: np.ndarray, text: int = 1, beams: int = 1) -> Callable[[int], Any]:
    """new_tokens to ids: the language model alone, exactly so many behind features [B, Q, D] and `text` tokens."""
    from blip2c.generation import core_options

    batch, queries = features.shape[:2]
    prompt = queries + text
    row = [-1] * queries + [2 + i % (model.config.text_config.vocab_size - 2) for i in range(text)]
    ids, offsets = np.array(row * batch, np.int32), np.arange(batch + 1, dtype=np.int64) * prompt
    decoded: tuple[np.ndarray, ...] = ()
    read, read_length = ids, prompt  # what the search goes on from
    if model.config.text_config.model_type == "t5":
        read, read_length = np.zeros(batch, np.int32), 1
        decoded = read, np.arange(batch + 1, dtype=np.int64)

    def run(tokens: int) -> Any:
        exactly = {"max_new_tokens": tokens, "min_new_tokens": tokens, "num_beams": beams}
        options = core_options(model.generation_config, exactly, [read_length] * batch)
        return model._core.generate(features, ids, offsets, None, read, options, *decoded)

    return run


def run_blip2c(folder: str, dtype: str) -> dict[str, float]:
    import machine

    import blip2c

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
    decode = generation(model, features)
    decode(1)
    row["prefill_33"] = several(lambda: decode(1))
    captions(
        row,
        lambda tokens, beams: model.generate(
            pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams
        ),
    )
    memory_rows(row, machine.token_bytes(model.config.text_config, model.dtypes["language"]), decode)
    reached = machine.vision_operations(model.config.vision_config) / row["vit"]
    row["vit_of_peak"] = 100 * reached / machine.peak(machine.arithmetic_of(model.dtypes["vision"]))
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

    load, model = timed(lambda: ctranslate2.Generator(folder, compute_type="int8", intra_threads=processors()))
    prompt = [f"<{i}>" for i in range(100, 100 + PROMPT)]
    row = {"load": load} | language_rows(
        lambda tokens, beams: model.generate_batch(
            [prompt], max_length=tokens, min_length=tokens, beam_size=beams, include_prompt_in_result=False
        )
    )
    vision = Path(folder, "vision")
    if vision.is_dir():
        encoder = ctranslate2.Encoder(str(vision), compute_type="int8", intra_threads=processors())
        patches = [[f"<{i}>" for i in range(len(json.loads((vision / "vocabulary.json").read_text())))]]
        encoder.forward_batch(patches)
        row["vit"] = several(lambda: encoder.forward_batch(patches).last_hidden_state)
    return row


def run_llama(file: str) -> dict[str, float]:
    """Greedy alone: the library has no beam search."""
    from llama_cpp import Llama

    threads = processors()
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

    torch.set_num_threads(processors())
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
        t5 = model.config.text_config.model_type == "t5"
        read = {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)} if t5 else {"logits_to_keep": 1}
        row["prefill_33"], _ = timed(lambda: model.language_model(inputs_embeds=embeds, **read))
        captions(
            row,
            lambda tokens, beams: model.generate(
                pixel_values=pixels, max_new_tokens=tokens, min_new_tokens=tokens, num_beams=beams
            ),
        )
    return row


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
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{done.stderr}\n{engine}: ended with status {done.returncode}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def table(found: Medians) -> str:
    """Markdown: the median of each piece of work in each engine."""
    engines = list(found)
    lines = ["| work | " + " | ".join(engines) + " |", "|---" * (len(engines) + 1) + "|"]
    for key, unit in ROWS.items():
        cells = [f"{found[engine][key]:.3g} {unit}" if key in found[engine] else "" for engine in engines]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ratios(found: Medians) -> str:
    """Markdown: how many times as long (or as much) each peer took as each of ours; above 1, blip2c is better."""
    ours = [engine for engine in found if engine.startswith("blip2c")]
    peers = [engine for engine in found if engine not in ours]
    pairs = [(peer, own) for own in ours for peer in peers]
    lines = ["| work | " + " | ".join(f"{peer} / {own}" for peer, own in pairs) + " |", "|---" * (len(pairs) + 1) + "|"]
    for key in (key for key in ROWS if key not in OF_THE_MACHINE):
        cells = [
            f"{found[peer][key] / found[own][key]:.2f} x" if key in found[peer] and key in found[own] else ""
            for peer, own in pairs
        ]
        lines.append(f"| {key} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def medians_of(results: dict[str, list[dict[str, float]]]) -> Medians:
    return {
        engine: {key: statistics.median(run[key] for run in runs) for key in ROWS if runs and key in runs[0]}
        for engine, runs in results.items()
    }


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
    import machine
    import targets

    engines = [f"blip2c-{dtype}" for dtype in arguments.dtypes]
    if not arguments.no_transformers:
        # Without products of bfloat16 torch computes it tens of times slower than float32.
        bfloat16 = machine.arithmetic_of("bfloat16") == "bfloat16"
        engines += ["transformers-float32", *(["transformers-bfloat16"] if bfloat16 else [])]
    engines += ["ctranslate2-int8"] if arguments.ctranslate2 else []
    engines += ["llama.cpp-Q8_0", "llama.cpp-Q4_0"] if arguments.llama else []
    for dtype in arguments.dtypes:
        quantize(arguments.folder, dtype)
    results: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
    for i in range(arguments.rounds):
        for engine in engines:
            results[engine].append(start_engine(engine, arguments))
            print(f"round {i + 1}: {engine}: {json.dumps(results[engine][-1])}", file=sys.stderr, flush=True)
    found, text = medians_of(results), json.loads(Path(arguments.folder, "config.json").read_text())["text_config"]
    print(f"{machine.title()}, medians of {arguments.rounds}\n")
    print(table(found), ratios(found), targets.target_table(found, text["model_type"]), sep="\n\n")
    print("\n" + targets.memory_lines(found))


if __name__ == "__main__":
    main()
