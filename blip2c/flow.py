"""`Flow`: pictures and prompts go in, captions come out, and the batch of the language model stays full.

    pictures -> loaders (threads: decode, resize) -> encoder (a thread: ViT, Q-Former) -> decoder (a thread: the search)

A row that has finished leaves the running batch and the next one enters. What lies between two stations is bounded: a
few pictures of pixels, one batch of features. The decoder waits for the encoder where a place of its batch is empty: a
step costs nearly the same for one row as for all, and while it waits the encoder has all processors. Rows are packed,
so what one gets does not depend on what runs beside it.
"""

from __future__ import annotations

import atexit
import threading
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from os import PathLike
from typing import Any

import numpy as np

from blip2c import _core
from blip2c.captions import picture_name
from blip2c.prompts import F32, ROW_ERRORS, Plan, Prompts
from blip2c.states import State

__all__ = ["Flow"]

NAME = "blip2c-"
LOADERS = 4
# Pictures that are encoded in one go: enough to use the processors well, few enough to begin soon.
GROUP = 4
# By how many batches results may be ahead of the one who takes them.
AHEAD = 16


class _Closed(BaseException):
    """Raised in the flow's own threads when nobody wants its results any more."""


class Flow:
    """One run over rows (number of a picture, prompt). Iterate over it, and close it whatever happens.

    places: rows that run together. counters: the search's, when all is done (see _core.Model.generate_stream).
    """

    def __init__(
        self, prompts: Prompts, plan: Plan, pictures: Sequence[Any], rows: Sequence[tuple[int, str | None]], places: int
    ) -> None:
        self.counters: dict[str, Any] = {}
        self._prompts = prompts
        self._plan = plan
        self._pictures = pictures
        self._rows = rows
        self._places = min(places, len(rows))
        self._ids = self._tokenised()
        self._order = list(dict.fromkeys(index for index, _ in rows))
        self._left = Counter(index for index, _ in rows)
        self._several = {index: list[list[int]]() for index, count in self._left.items() if count > 1}
        for index, prompt in rows:
            ids = self._ids[prompt]
            if index in self._several and not isinstance(ids, Exception):
                self._several[index].append(ids)
        # Everything below is guarded by this.
        self._changed = threading.Condition()
        self._ready: deque[tuple[int, tuple[Any, ...]]] = deque()
        self._results: dict[int, Any] = {}
        self._finished: deque[int] = deque()  # numbers of results, as they came
        self._entered: list[int] = []  # numbers of the rows, as they entered the search
        self._taken = 0
        self._all_encoded = False
        self._is_far_ahead = False  # the encoder waits for results to be taken
        self._error: BaseException | None = None
        self._closed = False
        # Pillow images and open files may be one object in many places, and do not like several readers.
        self._objects = threading.Lock()
        self._loaders = ThreadPoolExecutor(min(LOADERS, len(self._order)), NAME + "load")
        self._loading: dict[int, Future[F32]] = {}
        self._threads = [
            threading.Thread(target=self._run, args=(work,), name=NAME + work.__name__[1:], daemon=True)
            for work in (self._encode, self._decode)
        ]
        # At the interpreter's end threads in the C part must be gone before it is.
        atexit.register(self.close)
        for thread in self._threads:
            thread.start()

    def in_order(self) -> Iterator[Any]:
        """For each row its Caption (Captions, where several were asked for), or the exception that it met."""
        for number in range(len(self._rows)):
            yield self._take(number)

    def as_finished(self) -> Iterator[tuple[int, Any]]:
        """The same as (number of the row, result), the first to finish first."""
        for _ in range(len(self._rows)):
            with self._changed:
                self._await(lambda: bool(self._finished))
                number = self._finished[0]
            yield number, self._take(number)

    def close(self) -> None:
        """Ends what still runs, within one tile of a matrix product. No thread is left behind."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._loaders.shutdown(wait=False, cancel_futures=True)
        atexit.unregister(self.close)
        if threading.current_thread().name.startswith(NAME):  # the garbage collector runs anywhere
            return
        for thread in self._threads:
            # Again and again: a thread may be about to begin a call.
            while thread.is_alive():
                if thread.ident is not None:
                    _core.cancel_calls(thread.ident)
                thread.join(0.005)
        self._loaders.shutdown()

    # -- whoever takes the results -------------------------------------------------------------------------------

    def _await(self, condition: Any) -> None:
        """Waits, `_changed` held; raises what a thread met instead."""
        while not condition():
            if self._error is not None:
                raise self._error
            if self._closed:
                raise RuntimeError("the flow was closed")
            self._changed.wait()

    def _take(self, number: int) -> Any:
        with self._changed:
            self._await(lambda: number in self._results)
            self._taken += 1
            self._finished.remove(number)
            self._changed.notify_all()
            return self._results.pop(number)

    # -- threads -------------------------------------------------------------------------------------------------

    def _run(self, work: Any) -> None:
        try:
            work()
        except _Closed:
            pass
        except BaseException as error:
            with self._changed:
                # A call that close() ended is no error.
                if not self._closed and self._error is None:
                    self._error = error
                self._closed = True
                self._changed.notify_all()

    def _tokenised(self) -> dict[str | None, list[int] | Exception]:
        found: dict[str | None, list[int] | Exception] = {}
        for _, prompt in self._rows:
            if prompt not in found:
                try:
                    found[prompt] = self._prompts.ids(prompt, self._plan)
                except ROW_ERRORS as error:
                    found[prompt] = error
        return found

    def _finish(self, number: int, result: Any) -> None:
        with self._changed:
            self._results[number] = result
            self._finished.append(number)
            self._changed.notify_all()

    # Loaders.

    def _load(self, index: int) -> F32:
        picture = self._pictures[index]
        if isinstance(picture, str | PathLike | bytes | bytearray | np.ndarray):
            return self._prompts.pixels(picture)
        with self._objects:
            return self._prompts.pixels(picture)

    def _load_ahead(self, place: int) -> None:
        """Pictures from number `place` in the order of their first rows on are being loaded, as many as are needed
        soon."""
        for index in self._order[place : place + self._places + GROUP]:
            if index not in self._loading and not isinstance(self._pictures[index], State):
                self._loading[index] = self._loaders.submit(self._load, index)

    # The encoder.

    def _encode(self) -> None:
        states: dict[int, State | Exception] = {}
        place = 0  # in _order: the first picture that has not been encoded
        for number, (index, prompt) in enumerate(self._rows):
            self._await_takers(number)
            while index not in states:
                place = self._encode_group(place, states)
            self._left[index] -= 1
            state = states[index] if self._left[index] else states.pop(index)
            ids = self._ids[prompt]
            if isinstance(state, Exception) or isinstance(ids, Exception):
                self._finish(number, state if isinstance(state, Exception) else ids)
                continue
            item = self._item(number, state, index, prompt, ids)
            with self._changed:
                while len(self._ready) >= self._places and not self._closed:
                    self._changed.wait()
                self._ready.append((number, item))
                self._changed.notify_all()
        with self._changed:
            self._all_encoded = True
            self._changed.notify_all()

    def _await_takers(self, number: int) -> None:
        """Until those who take results are near enough."""
        with self._changed:
            while not self._closed and number >= self._taken + AHEAD * self._places:
                self._is_far_ahead = True
                self._changed.notify_all()
                self._changed.wait()
            self._is_far_ahead = False
            if self._closed:
                raise _Closed

    def _encode_group(self, place: int, states: dict[int, State | Exception]) -> int:
        """Encodes the next picture, and those behind it that are loaded already; returns the next place."""
        self._load_ahead(place)
        pixels: dict[int, F32] = {}
        while place < len(self._order) and len(pixels) < GROUP:
            index = self._order[place]
            picture = self._pictures[index]
            if isinstance(picture, State):
                states[index] = picture
            else:
                if pixels and not self._loading[index].done():
                    break
                try:
                    pixels[index] = self._loading.pop(index).result()
                except ROW_ERRORS as error:
                    states[index] = error
            place += 1
            if states and not pixels:
                break
            if place < len(self._order):
                self._load_ahead(place)
        if pixels:
            encoded = self._prompts.encode(np.concatenate(list(pixels.values())))
            for row, index in enumerate(pixels):
                states[index] = State(self._prompts, encoded[row], picture_name(self._pictures[index], index))
        return place

    def _item(self, number: int, state: State, index: int, prompt: str | None, ids: list[int]) -> tuple[Any, ...]:
        """The row as generate_stream() takes it."""
        prefix = None
        if isinstance(self._pictures[index], State) or index in self._several:
            prefix = state.prefix_of(self._several.get(index, [ids]))
        new, rules = self._prompts.behind(ids, 0 if prefix is None else len(prefix))
        features = self._prompts.features(state.encoded, prompt) if prefix is None else None
        decoder = None if self._plan.decoder is None else self._plan.decoder.ids
        return features, new, rules if decoder is None else decoder, None, prefix, decoder, number

    # The decoder.

    def _decode(self) -> None:
        if self._plan.call.between_steps is not None:
            self._decode_one_by_one()
            return
        lengths = [len(ids) for ids in self._ids.values() if not isinstance(ids, Exception)]
        if not lengths:
            return
        self.counters = self._prompts.model._core.generate_stream(
            self._next,
            self._done,
            self._plan.options,
            self._places,
            self._prompts.queries + max(lengths),
            0 if self._plan.decoder is None else len(self._plan.decoder.ids),
        )

    def _decode_one_by_one(self) -> None:
        """Callables see one prompt at a time: what they do to it does not depend on what stands beside it."""
        while True:
            try:
                item = self._next(True)
            except StopIteration:
                return
            if item is not None:
                features, new, rules, _, prefix, _, number = item
                found = self._prompts.generate(self._plan, features, new, rules, prefix, key=number)
                self._finish(number, self._texts(number, found))

    def _texts(self, number: int, found: dict[str, Any]) -> Any:
        index = self._rows[number][0]
        return self._prompts.texts(self._plan, found, picture_name(self._pictures[index], index))

    def _next(self, wait: bool) -> tuple[Any, ...] | None:
        with self._changed:
            while not self._closed:
                if self._all_encoded and not self._ready:
                    raise StopIteration
                if self._ready:
                    number, item = self._ready.popleft()
                    self._entered.append(number)
                    self._changed.notify_all()
                    return item
                if self._is_far_ahead and not wait:
                    return None
                self._changed.wait()
        raise _Closed

    def _done(self, index: int, result: dict[str, Any]) -> None:
        number = self._entered[index]
        self._finish(number, self._texts(number, result))
