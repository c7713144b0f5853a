"""How well a process stays alive beside blip2c.

The share of its rate that a Python thread keeps while generate() runs, and how fast a signal is answered.

    python benchmarks/responsiveness.py [FOLDER]
"""

from __future__ import annotations

import random
import signal
import statistics
import sys
import threading
import time
from typing import Any

import numpy as np

import blip2c

ROUNDS = 5


class Counter(threading.Thread):
    """Counts in pure Python until told to stop."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            self.count += 1


def rate(work: Any) -> float:
    """Counts per second of a Python thread while `work` runs."""
    counter = Counter()
    counter.start()
    start, first = time.perf_counter(), counter.count
    work()
    elapsed, counted = time.perf_counter() - start, counter.count - first
    counter.stop.set()
    counter.join()
    return counted / elapsed


class SignalError(Exception):
    pass


def signal_delay(work: Any, after: float) -> float:
    """Seconds from a signal, sent `after` seconds into `work`, until its exception is out."""

    def handler(number: int, frame: Any) -> None:
        raise SignalError

    before = signal.signal(signal.SIGALRM, handler)
    due = time.perf_counter() + after
    signal.setitimer(signal.ITIMER_REAL, after)
    try:
        while True:
            work()
    except SignalError:
        return time.perf_counter() - due
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def main() -> None:
    folder = sys.argv[1] if len(sys.argv) > 1 else blip2c.sample_path()
    model = blip2c.Blip2ForConditionalGeneration.from_pretrained(folder)
    size = model.config.vision_config.image_size
    pixels = np.random.default_rng(0).standard_normal((4, 3, size, size)).astype(np.float32)

    def generate() -> None:
        model.generate(pixel_values=pixels, max_new_tokens=30, min_new_tokens=30, num_beams=4)

    def for_a_second() -> None:
        end = time.perf_counter() + 1.0
        while time.perf_counter() < end:
            generate()

    solo = [rate(lambda: time.sleep(1.0)) for _ in range(ROUNDS)]
    beside = [rate(for_a_second) for _ in range(ROUNDS)]
    share = statistics.median(b / s for b, s in zip(beside, solo, strict=True))
    print(f"a Python thread beside generate() keeps {share:.0%} of its solo rate (medians of {ROUNDS})")
    rng = random.Random(0)
    delays = sorted(signal_delay(generate, rng.uniform(0.02, 0.5)) for _ in range(100))
    median, high, worst = (1e3 * delays[i] for i in (50, 98, -1))
    print(f"signal to exception: median {median:.1f} ms, 99 % {high:.1f} ms, worst {worst:.1f} ms")


if __name__ == "__main__":
    main()
