"""Continuous batching: answers to many requests at once, which come and go while others are being answered."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tinysft_jax.sampling.decode import PIECES, STREAM_CHUNK, Decoder
from tinysft_jax.sampling.filters import Knobs, SamplingOptions
from tinysft_jax.sampling.kept_cache import lengthen, n_shared
from tinysft_jax.sampling.steps import Ranked, feed, ranked

# Decode steps are run for about this long, then requests join and leave.
SECONDS_OF_RUN = 0.1


class Refused(Exception):
    """The engine takes no more requests for now, because too many are waiting."""


class Closed(Exception):
    """The engine takes no more requests."""


class News(NamedTuple):
    """What is new of an answer."""

    ids: list[int]  # without the stop id
    ranked: Ranked | None  # of these ids (and the stop id), NumPy arrays; None if the request does not ask for it
    finish: Literal["stop", "length", "cancelled"] | None  # why the answer has ended


@dataclasses.dataclass(eq=False)
class Request:
    """A prompt to be continued.

    `receive` is called in the engine's thread with each piece of the answer, and says whether it wants more; the last
    piece has a `finish`, unless no more was wanted.
    """

    prompt: list[int]
    options: SamplingOptions  # their stop and forbidden ids are the engine's
    receive: Callable[[News], bool]
    row: int = 0  # chooses, with the seed, the random numbers
    ranks: bool = False  # whether the answer's tokens are ranked
    ranks_prompt: bool = False
    prompt_ranked: list[Ranked] = dataclasses.field(default_factory=list)  # of all prompt tokens but the first
    is_cancelled: bool = False


@dataclasses.dataclass
class _Slot:
    """A row of the cache."""

    ids: list[int] = dataclasses.field(default_factory=list)  # whose keys and values it holds
    request: Request | None = None
    last_used: int = 0

    @property
    def rest(self) -> list[int]:
        """What is left of the prompt."""
        return self.request.prompt[len(self.ids) :]


class Engine:
    """Answers requests over a fixed number of slots of one cache on the device, in a thread of its own.

    Requests join and leave between short runs of decode steps. Prompts are fed in pieces, one of each joining request
    before a run, so a long prompt delays the others by a piece at a time. A free slot keeps its keys and values, and a
    request whose prompt begins like that text takes the slot over. Every shape is fixed: what is computed for a request
    does not depend on who else is served.

    `options` holds what is common to all requests: stop ids, forbidden ids and `max_length`. `failure` is the error
    that the thread has ended with, or None.
    """

    def __init__(self, decoder: Decoder, options: SamplingOptions, n_slots: int = 16, queue: int = 64):
        self._decoder, self._options, self._room = decoder, options, n_slots + queue
        self._forbidden = jnp.asarray(decoder.forbidden(options))
        # With room for a piece that begins in the last place.
        self._length = decoder.cache_slots(decoder.max_length(options)) + PIECES[-1]
        self._pieces = [size for size in PIECES if size <= self._length]
        self._slots = [_Slot() for _ in range(n_slots)]
        self._waiting: collections.deque[Request] = collections.deque()
        self._changed = threading.Condition()
        self._n_unfinished = 0  # waiting or in a slot
        self._is_closing = False
        self._end: float | None = None  # of all answers
        self._clock, self._seconds_of_step = 0, SECONDS_OF_RUN
        self.is_ready = threading.Event()
        self.failure: Exception | None = None

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, of all slots."""
        config, size = self._decoder.config, self._decoder.dtype.itemsize
        return 2 * config.n_layers * config.n_kv_heads * config.head_dim * size * self._length * len(self._slots)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_active(self) -> int:
        """Slots that are in use."""
        return sum(slot.request is not None for slot in self._slots)

    def start(self, on_ready: Callable[[], None] = lambda: None, on_end: Callable[[], None] = lambda: None) -> None:
        """Starts the thread, which compiles, and then calls `on_ready`; when it ends, it calls `on_end`."""
        self._thread = threading.Thread(target=self._run, args=(on_ready, on_end), name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request]) -> None:
        """Queues all of them, or none. Raises: Refused, Closed."""
        with self._changed:
            if self._is_closing or self._end is not None:
                raise Closed("the server is shutting down")
            if self._n_unfinished + len(requests) > self._room:
                raise Refused("too many requests are waiting; try again later")
            self._n_unfinished += len(requests)
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Ends a request soon, if it has not ended. Its slot is free before the next run."""
        request.is_cancelled = True

    def finish_within(self, seconds: float) -> None:
        """Takes no more requests; answers that have not ended by then are cut off, as by a lack of room."""
        with self._changed:
            self._end = time.monotonic() + seconds

    def close(self, seconds: float | None = None) -> bool:
        """Ends all requests and the thread; whether it has ended within that time."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, on_ready: Callable[[], None], on_end: Callable[[], None]) -> None:
        try:
            self._compile()
            self.is_ready.set()
            on_ready()
            while self._wait():
                self._end_some()
                self._fill_slots()
                self._decode(first=self._feed())
        except Exception as error:
            self.failure = error
        finally:
            with self._changed:
                self._is_closing = True
            on_end()
            self._end_some()

    def _wait(self) -> bool:
        """Waits until there is work; whether there is."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._n_unfinished)
            return not self._is_closing

    def _end_some(self) -> None:
        """Ends requests that are cancelled; all, if the engine closes or their time is over."""
        is_over = self._end is not None and time.monotonic() >= self._end
        why = "length" if is_over else "cancelled"
        for slot in self._slots:
            if slot.request and (slot.request.is_cancelled or self._is_closing or is_over):
                self._deliver(slot, News([], None, why))
        with self._changed:
            ended = [each for each in self._waiting if each.is_cancelled or self._is_closing or is_over]
            self._n_unfinished -= len(ended)
            self._waiting = collections.deque(each for each in self._waiting if each not in ended)
        for request in ended:
            request.receive(News([], None, why))

    def _fill_slots(self) -> None:
        free = [slot for slot in self._slots if slot.request is None]
        while free and self._waiting:
            with self._changed:
                request = self._waiting.popleft()
            # The slot that holds the most of the prompt. But a text of which little is of use is not given up for that:
            # all chats begin with the same system message.
            slot = max(free, key=lambda slot: (_n_shared(slot.ids, request), -slot.last_used))
            free.remove(slot)
            slot.request, slot.ids = request, request.prompt[: _n_shared(slot.ids, request)]

    def _feed(self) -> bool:
        """Feeds a piece to each request that joins; whether a prompt is now complete.

        A long piece may be padded by half; what is shorter than that are short pieces, one after another.
        """
        is_complete, (long, *_), short = False, self._pieces, self._pieces[-1]
        for row, slot in enumerate(self._slots):
            if slot.request is None or not slot.rest:
                continue
            if len(slot.rest) > long // 2 and len(slot.ids) + long <= self._length:
                self._feed_piece(row, slot, slot.rest[:long], long)
            else:
                while slot.rest:
                    self._feed_piece(row, slot, slot.rest[:short], short)
            if not slot.rest:
                is_complete = True
                if self._limit(slot) == len(slot.ids):  # the prompt's own log-probabilities are all that is wanted
                    self._deliver(slot, News([], None, "length"))
        return is_complete

    def _feed_piece(self, row: int, slot: _Slot, piece: list[int], size: int) -> None:
        request, start = slot.request, len(slot.ids)
        following = request.prompt[start + 1 : start + 1 + len(piece)]
        where = np.array((row, start, len(piece)), np.int32)
        ids = [np.pad(np.array(each, np.int32), (0, size - len(each))) for each in (piece, following)]
        wanted, (seen,) = np.bool(request.ranks_prompt), self._decoder.seen([request.prompt], self._options)
        self._state, found = feed(self._decoder.params, self._state, *where, *ids, wanted, seen, self._decoder.config)
        slot.ids = slot.ids + piece
        if request.ranks_prompt:
            request.prompt_ranked.append(jax.tree.map(lambda each: each[: len(following)], jax.device_get(found)))

    def _decode(self, first: bool) -> None:
        """Runs decode steps, one if a prompt is `first` to be continued, and delivers what was drawn."""
        active = {row: slot for row, slot in enumerate(self._slots) if slot.request and not slot.rest}
        if not active:
            jax.block_until_ready(self._state.hidden)
            return
        requests, positions = [slot.request for slot in self._slots], [len(slot.ids) for slot in self._slots]
        limits = [self._limit(slot) if row in active else positions[row] for row, slot in enumerate(self._slots)]
        numbers = positions, limits, [request.row if request else 0 for request in requests]
        positions, limits, rows = np.array(numbers, np.int32)
        state = self._state._replace(positions=positions, limits=limits, rows=rows)
        options = [request.options if request else self._options for request in requests]
        ranks = [bool(request and request.ranks) for request in requests]
        knobs = Knobs.of(options, self._options.stop_ids, self._forbidden, ranks)
        n_steps = 1 if first else int(np.clip(SECONDS_OF_RUN / self._seconds_of_step, 1, STREAM_CHUNK))
        start = time.perf_counter()
        self._state, drawn, is_unfinished = self._decoder.advance(state, knobs, 0, n_steps, ranked)
        self._seconds_of_step = (time.perf_counter() - start) / max(*(len(ids) for ids, _ in drawn), 1)
        for row, slot in active.items():
            (ids, found), finish = drawn[row], None
            if not is_unfinished[row]:
                finish = "stop" if ids and ids[-1] in self._options.stop_ids else "length"
            new = ids[:-1] if finish == "stop" else ids
            slot.ids = slot.ids + new
            self._deliver(slot, News(new, found if slot.request.ranks else None, finish))

    def _deliver(self, slot: _Slot, news: News) -> None:
        wants_more = slot.request.receive(news)
        if news.finish or not wants_more:
            self._clock += 1
            slot.request, slot.last_used = None, self._clock
            with self._changed:
                self._n_unfinished -= 1

    def _limit(self, slot: _Slot) -> int:
        return self._decoder.limit(len(slot.request.prompt), slot.request.options)

    def _compile(self) -> None:
        """Creates the cache, and calls each program once."""
        state = self._decoder.begin(len(self._slots) * [[0]], len(self._slots) * [0], self._options)
        self._state = state._replace(cache=lengthen(state.cache, self._length))
        for size in self._pieces:
            self._n_unfinished += 1
            self._slots[0].request = Request(size * [0], self._options, lambda news: False)
            self._decode(first=self._feed())
            self._slots[0].ids = []


def _n_shared(kept: list[int], request: Request) -> int:
    """How many of the prompt's first tokens a slot has. The last is computed again, to predict the next."""
    n = 0 if request.ranks_prompt else n_shared(kept, request.prompt[:-1])
    return n if 2 * n >= min(len(kept), len(request.prompt)) else 0
