"""Times the search of an index beside faiss's flat index, in one process on the same vectors, taking turns.

    python benchmarks/index.py                 # 1 M vectors of 256: 31 250 pictures of 32; faiss where it is installed
    python benchmarks/index.py --texts 1 16    # texts in one pass

Rows: time of a search of all vectors (median) and bytes read per second. faiss keeps the k best vectors, not the k best
pictures. The build rate is that of packing and writing records; encoding a picture costs far more and depends on the
model.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

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


def build_rate(vectors: np.ndarray, dtype: str) -> float:
    """Pictures a second: packed, appended in files of 1024 at a time, on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        model = {"name": "", "fingerprint": "", "dtypes": ""}
        header = index_files.Header(model, dtype, QUERIES, WIDTH)
        start = time.perf_counter()
        for first in range(0, len(vectors), 1024):
            part = vectors[first : first + 1024]
            entries = [{"path": str(i), "stamp": None} for i in range(len(part))]
            header = index_files.append(Path(folder), header, index_files.pack_records(part, dtype), entries)
        return len(vectors) / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    vectors = unit(rng, arguments.vectors // QUERIES, QUERIES, WIDTH)
    records = {dtype: index_files.pack_records(vectors, dtype) for dtype in index_files.DTYPES}
    rates = {dtype: build_rate(vectors[:4096], dtype) for dtype in records}
    flat = None
    try:
        import faiss

        faiss.omp_set_num_threads(_core.get_num_threads())
        flat = faiss.IndexFlatIP(WIDTH)
        flat.add(vectors.reshape(-1, WIDTH))
        half = faiss.IndexScalarQuantizer(WIDTH, faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT)
        half.train(vectors.reshape(-1, WIDTH)[:1000])
        half.add(vectors.reshape(-1, WIDTH))
    except ImportError:
        print("faiss is not installed (pip install faiss-cpu): its rows are left out")
    print(f"{vectors.shape[0]} pictures of {QUERIES} vectors of {WIDTH}, {_core.get_num_threads()} threads")
    print(" | ".join(f"{dtype}: {rate:.0f} pictures/s built" for dtype, rate in rates.items()))
    print("| texts | engine | ms | GB/s |\n|---|---|---|---|")
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
            engines["faiss flat float16"] = lambda words=words: half.search(words, K)
            sizes["faiss flat float32"], sizes["faiss flat float16"] = vectors.nbytes, vectors.nbytes // 2
        for name, seconds in times(engines, arguments.rounds).items():
            print(f"| {texts} | {name} | {1e3 * seconds:.1f} | {sizes[name] / seconds / 1e9:.1f} |")


if __name__ == "__main__":
    main()
