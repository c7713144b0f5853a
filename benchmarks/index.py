"""Times the search of an index beside faiss's flat index, in one process on the same vectors, taking turns.

    python benchmarks/index.py                 # 1 M vectors of 256: 31 250 pictures of 32; faiss where it is installed
    python benchmarks/index.py --texts 1 16    # texts in one pass
    python benchmarks/index.py --model FOLDER  # building and matching with a model (make_checkpoint.py --language none)

Rows: time of a search of all vectors (median), bytes read per second, and that beside the rate at which the same memory
is merely read, in the same run. faiss keeps the k best vectors, not the k best pictures. With a model: pictures per
second into an index, from pixels to the disk, and milliseconds a text of matching a picture that is encoded already.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

import blip2c
from blip2c import _core, index_files

QUERIES, WIDTH, K = 32, 256, 100


def unit(rng: np.random.Generator, *shape: int) -> np.ndarray:
    x = rng.standard_normal(shape, np.float32)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    return x


def times(engines: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Medians, the engines taking turns."""
    found: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, work in engines.items():
            start = time.perf_counter()
            work()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def read_rate(array: np.ndarray, rounds: int) -> float:
    """Bytes per second of adding the array up, in as many threads as searches have."""
    parts = np.array_split(array.reshape(-1).view(np.int64), _core.get_num_threads())

    def work() -> None:
        with ThreadPoolExecutor(len(parts)) as pool:
            list(pool.map(np.add.reduce, parts))

    return array.nbytes / times({"read": work}, rounds)["read"]


def search(arguments: argparse.Namespace) -> None:
    rng = np.random.default_rng(0)
    vectors = unit(rng, arguments.vectors // QUERIES, QUERIES, WIDTH)
    records = {dtype: index_files.pack_records(vectors, dtype) for dtype in index_files.DTYPES}
    flat = None
    try:
        import faiss

        faiss.omp_set_num_threads(_core.get_num_threads())
        flat = faiss.IndexFlatIP(WIDTH)
        flat.add(vectors.reshape(-1, WIDTH))
    except ImportError:
        print("faiss is not installed (pip install faiss-cpu): its rows are left out")
    print(f"{vectors.shape[0]} pictures of {QUERIES} vectors of {WIDTH}, {_core.get_num_threads()} threads")
    print("| texts | engine | ms | GB/s | of the read rate |\n|---|---|---|---|---|")
    for texts in arguments.texts:
        words = unit(rng, texts, WIDTH)
        engines: dict[str, Callable[[], object]] = {}
        for dtype, data in records.items():
            engines[f"blip2c {dtype}"] = lambda data=data, dtype=dtype, words=words: _core._top_k(
                _core._picture_scores(words, data, QUERIES, dtype), K, "cpu"
            )
        sizes = {f"blip2c {dtype}": data.nbytes for dtype, data in records.items()}
        if flat is not None:
            engines["faiss flat float32"] = lambda words=words: flat.search(words, K)
            sizes["faiss flat float32"] = vectors.nbytes
        ceiling = read_rate(vectors, arguments.rounds)
        for name, seconds in times(engines, arguments.rounds).items():
            rate = sizes[name] / seconds
            print(f"| {texts} | {name} | {1e3 * seconds:.1f} | {rate / 1e9:.1f} | {rate / ceiling:.0%} |")


def with_model(folder: Path, pictures: int, rounds: int) -> None:
    core = blip2c.Blip2ForImageTextRetrieval.from_pretrained(folder)._core
    rng = np.random.default_rng(0)
    pixels = rng.standard_normal((pictures, 3, 224, 224), np.float32)
    with tempfile.TemporaryDirectory() as place:
        model = {"name": "", "fingerprint": "", "dtypes": ""}
        header = index_files.Header(model, "float16", QUERIES, WIDTH)
        start = time.perf_counter()
        vectors = core.encode_stages(pixels)["embeds"]
        encoded = time.perf_counter()
        entries = [{"path": str(i), "stamp": None} for i in range(pictures)]
        index_files.append(Path(place), header, index_files.pack_records(vectors, "float16"), entries)
        end = time.perf_counter()
    print(f"{pictures / (end - start):.2f} pictures/s into an index; {1e3 * (end - encoded):.1f} ms of it on the disk")
    seen = core.encode_stages(pixels[:1])["vision"]
    for texts in (1, 8, 64):
        ids = rng.integers(1000, 30000, 12 * texts).astype(np.int32)
        text = ids, np.arange(texts + 1, dtype=np.int64) * 12, None
        of_one, copies = np.zeros(texts, np.int32), np.repeat(seen, texts, axis=0)
        engines: dict[str, Callable[[], object]] = {
            "sharing the picture": lambda text=text, of_one=of_one: core.match(seen, text, of_one),
            "each its own": lambda text=text, copies=copies: core.encode_stages(image_embeds=copies, text=text),
        }
        for name, seconds in times(engines, rounds).items():
            print(f"{texts:3d} texts of 12 tokens, {name}: {1e3 * seconds / texts:.2f} ms a text")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pictures", type=int, default=8)
    arguments = parser.parse_args()
    if arguments.model is None:
        search(arguments)
    else:
        with_model(arguments.model, arguments.pictures, arguments.rounds)


if __name__ == "__main__":
    main()
