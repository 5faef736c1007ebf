"""The forward pass of a few rows, such as a query's, in 8 bits: all layers as one compiled function.

A dozen rows use every weight a dozen times, so what takes time is to fetch the weights: 113 million in the layers of
gte-multilingual-base. They are therefore kept a second time, in the order in which they are read, and asked for a page before
their use. Between the products the loops are those of `gte_rag.kernels`, so a text gets the vector that it gets among others.

The thread that calls waits for nobody to come. A layer is nine phases of independent parts; whoever is there takes the next
part, a phase ends when its parts are done, and a thread that comes late, or never, leaves its share to the rest.

Numba keeps what it has compiled until this file changes, and looks at none of those whose functions it calls; hence `_CALLED`.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from gte_rag import instructions
from gte_rag.instructions import (
    PANEL,
    add_one,
    give_way,
    look,
    one_group,
    release_tiles,
    shape_tiles,
    ticks,
    two_groups,
)
from gte_rag.kernels import compiled, either, gate, get, inlined, level, mix, normalise, put
from gte_rag.model import Layer
from gte_rag.precision import Int8GatedMLP, Int8Linear

Array = NDArray[Any]

ROWS = 64  # that a pass can have: texts of that length attend in one loop among others, too
_TOGETHER = instructions.TILE_ROWS  # rows that are computed together in tiles
COLUMNS = instructions.STRIDE  # that a product can read
_CALLED = "c6801850d0d0713f"  # digest of kernels.py and instructions.py, which a test compares
_AT_ONCE = 12  # rows that are computed together without tiles: 24 registers of sums
_INPUTS = instructions.INPUTS
_PART = 98304  # bytes of weights that a thread takes at a time, or one panel
_THREADS = 4  # that share a pass at most: more have to be woken and fetch no faster
_PATIENCE = 5_000_000  # ticks of the processor's clock, some two milliseconds; torch's threads wait as long

_four_rows, _eight_rows, _twelve_rows = (instructions.dot_products(rows) for rows in (4, 8, _AT_ONCE))


def is_supported() -> bool:
    """Whether this processor has the instructions."""
    return instructions.HAS_DOT_PRODUCTS


# Parts

_PHASES = 9  # of a layer
# Of each phase so many int64: the number of parts that are taken, and in another line of the cache of those that are done.
_APART, _DONE = 16, 8
_TURNS = 4096  # of waiting, before others may have the core


@inlined
def _first(state: Any, phase: Any, parts: Any) -> Any:
    """Take a part of a phase; if none is left, wait until all are done and return -1."""
    at = state.ctypes.data + 8 * _APART * phase
    part = add_one(at)
    if part < parts:
        return part
    turns = 0
    while look(at + 8 * _DONE) < parts:
        turns += 1
        if turns % _TURNS == 0:
            give_way()
    return np.int64(-1)


@inlined
def _next(state: Any, phase: Any, parts: Any) -> Any:
    """Say that a part is done, and take another."""
    add_one(state.ctypes.data + 8 * (_APART * phase + _DONE))
    return _first(state, phase, parts)


@either
def _padded(size: int, multiple: int) -> int:
    return (size + multiple - 1) // multiple * multiple


@inlined
def _multiply(
    levels: Any,
    weights: Any,
    place: Any,
    inner: Any,
    channels: Any,
    offsets: Any,
    scales: Any,
    out: Any,
    rows: Any,
    part: Any,
    sums: Any,
) -> None:
    """Compute one part of a product: rows of levels by some panels of weights, which begin at `place`.

    In tiles if there is room for their `sums`; they have been given their shape. Of the levels, rows and columns behind those
    asked for are read, up to a multiple of 16 and of `_INPUTS`; of `out` written, up to a multiple of 4 and of `PANEL`.
    """
    panels, together, size = _panels(inner, channels)
    for panel in range(part * together, min(panels, (part + 1) * together)):
        of, start = weights.ctypes.data + place + panel * size, panel * PANEL
        if sums.shape[0]:
            steps = size // (_INPUTS * PANEL)
            for first in range(0, rows, _TOGETHER):
                above, left = levels.ctypes.data + first * COLUMNS, min(_TOGETHER, rows - first)
                if left > 16:
                    two_groups(above, of, steps, sums.ctypes.data)
                else:
                    one_group(above, of, steps, sums.ctypes.data)
                for row in range(left):
                    for i in range(PANEL):
                        value = np.float32(np.int32(sums[row, i] - offsets[start + i]))
                        out[first + row, start + i] = value * scales[start + i]
            continue
        offset, scale = offsets.ctypes.data + 4 * start, scales.ctypes.data + 4 * start
        steps, apart = (inner + 3) // 4, 4 * out.shape[1]
        for row in range(0, rows, _AT_ONCE):
            above, to = levels.ctypes.data + row * COLUMNS, out.ctypes.data + row * apart + 4 * start
            if rows - row > 8:
                _twelve_rows(above, of, steps, offset, scale, to, apart)
            elif rows - row > 4:
                _eight_rows(above, of, steps, offset, scale, to, apart)
            else:
                _four_rows(above, of, steps, offset, scale, to, apart)


@inlined
def _panels(inner: Any, channels: Any) -> Any:
    """Return the number of panels of a product, how many are one part, and the bytes of one."""
    size = _padded(inner, _INPUTS) * PANEL
    return _padded(channels, PANEL) // PANEL, max(1, _PART // size), size


@inlined
def _parts(inner: Any, channels: Any) -> Any:
    panels, together, _ = _panels(inner, channels)
    return (panels + together - 1) // together


@inlined
def _share_product(
    state: Any,
    phase: Any,
    levels: Any,
    weights: Any,
    place: Any,
    inner: Any,
    channels: Any,
    offsets: Any,
    scales: Any,
    out: Any,
    rows: Any,
    sums: Any,
) -> None:
    """Take part in a product, which is one phase."""
    parts = _parts(inner, channels)
    part = _first(state, phase, parts)
    while part >= 0:
        _multiply(levels, weights, place, inner, channels, offsets, scales, out, rows, part, sums)
        part = _next(state, phase, parts)


@inlined
def _share_norm(
    state: Any, phase: Any, product: Any, product_size: Any, values: Any, eps: Any, hidden: Any, levels: Any, size: Any
) -> None:
    """Take part in adding a product to the hidden state and LayerNorm; `values`: bias, weight and offset, (3, C)."""
    rows = hidden.shape[0]
    part = _first(state, phase, rows)
    while part >= 0:
        at = slice(part, part + 1)
        normalise(product[at], product_size[at], values[0], hidden[at], values[1], values[2], eps, levels[at], size[at])
        part = _next(state, phase, rows)


@inlined
def _attend(
    product: Any,
    size: Any,
    bias: Any,
    turns: Any,
    start: Any,
    length: Any,
    head: Any,
    depth: Any,
    scale: Any,
    out: Any,
    exact: Any,
) -> None:
    """Attend within one head of one text: rows of queries, keys and values of all heads -> columns of `out`.

    Queries are rounded as in `kernels.turn`, or not at all if they are to be exact, as in `kernels.attend_firsts`.
    """
    width = out.shape[1]
    stored = np.empty(depth, out.dtype)
    parts = np.empty((3, length, depth), np.float32)
    row, turned = np.empty(depth, np.float32), np.empty(depth, np.float32)
    for t in range(length):
        for part in range(3):
            at = part * width + head * depth
            for i in range(depth):
                row[i] = get(product[start + t], at + i) * size[start + t] + bias[at + i]
            if part < 2:
                for i in range(depth // 2):
                    a, b = row[2 * i], row[2 * i + 1]
                    turned[2 * i] = a * turns[t, i, 0] - b * turns[t, i, 1]
                    turned[2 * i + 1] = a * turns[t, i, 1] + b * turns[t, i, 0]
                for i in range(depth):
                    row[i] = turned[i]
            for i in range(depth):
                put(stored, i, row[i])
                parts[part, t, i] = row[i] if exact and part == 0 else get(stored, i)
    mixed, scores = np.empty(depth, np.float32), np.empty(length, np.float32)
    for t in range(length):
        mix(parts[0, t], parts[1], parts[2], scale, scores, mixed)
        place = out[start + t, head * depth : (head + 1) * depth]
        for i in range(depth):
            put(place, i, mixed[i])


@either
def _channels(width: int) -> tuple[int, int, int, int]:
    """Return where the channels of the four products of a layer begin in `offsets` and `scales`."""
    return 0, 3 * width, 5 * width, 4 * width


@compiled
def _run(
    weights: Any,
    places: Any,
    widths: Any,
    plains: Any,
    offsets: Any,
    scales: Any,
    vectors: Any,
    eps: Any,
    heads: Any,
    scale: Any,
    turns: Any,
    starts: Any,
    lengths: Any,
    hidden: Any,
    levels: Any,
    size: Any,
    middle: Any,
    middle_size: Any,
    mixed: Any,
    product: Any,
    tiles: Any,
    firsts: Any,
    state: Any,
    calls: Any,
) -> None:
    """Take part in a pass through all layers, and return when it is over.

    Args:
        weights: Of all products, int8, as `_panelled` lays them out.
        places: Where the four products of each layer begin.
        widths: Neurons of each layer.
        plains: How many of them have no row of up.
        offsets: What the zero of the levels adds to each channel of the products, int32, (layers, channels).
        scales: Size of a weight's level of each channel.
        vectors: Biases and LayerNorms, (layers, 9, C).
        eps: Of LayerNorm.
        heads: Number of heads.
        scale: Of the scores.
        turns: Rotary turn of each position.
        starts: First row of each text.
        lengths: Rows of each text.
        hidden: Hidden state, float32, (T, C), read and written.
        levels: The same in levels, uint8, (`ROWS`, `COLUMNS`).
        size: Size of a level of each row.
        middle: Levels of the neurons, and of what attention gives, uint8, (`ROWS`, `COLUMNS`).
        middle_size: Size of a level of each row.
        mixed: What attention gives, (T, C).
        product: What a product gives, float32.
        tiles: Shape of the tiles for these rows, or nothing.
        firsts: Whether only the first row of each text is wanted in the end.
        state: Counters, zeros in the beginning.
        calls: Number of passes so far, of the thread that begins one; empty for those that join.
    """
    rows, width = hidden.shape
    depth = width // heads
    texts = starts.shape[0]
    phase = 0
    sums = np.empty((_TOGETHER if tiles.shape[0] else 0, PANEL), np.int32)
    if tiles.shape[0]:
        shape_tiles(tiles.ctypes.data)
    if calls.shape[0]:
        add_one(calls.ctypes.data)
    for layer in range(widths.shape[0]):
        own, plain, place = widths[layer], plains[layer], places[layer]
        values = vectors[layer]
        qkv, o, up, down = _channels(width)
        shift, step = offsets[layer], scales[layer]

        _share_product(
            state, phase, levels, weights, place[0], width, 3 * width, shift[qkv:], step[qkv:], product, rows, sums
        )
        part = _first(state, phase + 1, heads * texts)
        while part >= 0:
            text = part // heads
            bias = values[:3].reshape(3 * width)
            exact = firsts and layer == widths.shape[0] - 1
            _attend(product, size, bias, turns, starts[text], lengths[text], part % heads, depth, scale, mixed, exact)
            part = _next(state, phase + 1, heads * texts)
        part = _first(state, phase + 2, rows)
        while part >= 0:
            at = slice(part, part + 1)
            level(mixed[at], middle[at], middle_size[at])
            part = _next(state, phase + 2, rows)

        _share_product(
            state, phase + 3, middle, weights, place[1], width, width, shift[o:], step[o:], product, rows, sums
        )
        _share_norm(state, phase + 4, product, middle_size, values[3:6], eps, hidden, levels, size)

        channels = 2 * own - plain
        _share_product(
            state, phase + 5, levels, weights, place[2], width, channels, shift[up:], step[up:], product, rows, sums
        )
        part = _first(state, phase + 6, rows)
        while part >= 0:
            at = slice(part, part + 1)
            of = product[at]
            gate(of, of, own - plain, own, plain, size[at], middle[at], middle_size[at])
            part = _next(state, phase + 6, rows)

        _share_product(
            state, phase + 7, middle, weights, place[3], own, width, shift[down:], step[down:], product, rows, sums
        )
        _share_norm(state, phase + 8, product, middle_size, values[6:9], eps, hidden, levels, size)
        phase += _PHASES
    if tiles.shape[0]:
        release_tiles()


# Passes


class EightBitLayer(NamedTuple):
    """What a layer computes with.

    Attributes:
        products: From the hidden state to queries, keys and values; from what attention gives; to up and gate; to the hidden
            state.
        vectors: float32, (9, C): bias of the first product, three rows; bias of the second, weight and bias of the LayerNorm
            after it; bias of the last, weight and bias of the LayerNorm after that.
        width: Number of neurons.
        plain: How many of them, the first, have no row of up.
    """

    products: tuple[Int8Linear, Int8Linear, Int8Linear, Int8Linear]
    vectors: Array
    width: int
    plain: int

    @classmethod
    def of(cls, layer: Layer) -> EightBitLayer:
        """Take over a layer whose products are in 8 bits."""
        mlp, norms = layer.mlp, (layer.attn_ln, layer.mlp_ln)
        assert isinstance(mlp, Int8GatedMLP)
        qkv, o = layer.attention.qkv_proj, layer.attention.o_proj
        assert isinstance(qkv, Int8Linear)
        assert isinstance(o, Int8Linear)
        assert mlp.up_gate.bias is None
        biases = [
            torch.zeros(product.out_features) if product.bias is None else product.bias
            for product in (qkv, o, mlp.down)
        ]
        after = [torch.cat([norm.weight, norm.bias]).float() for norm in norms]
        vectors = torch.cat([biases[0], biases[1], after[0], biases[2], after[1]]).view(9, -1).numpy()
        return cls((qkv, o, mlp.up_gate, mlp.down), vectors, mlp.down.in_features, mlp.plain)


class _Buffers:
    """What a pass needs beside its weights."""

    def __init__(self, width: int, channels: int, attention: torch.dtype) -> None:
        self.levels, self.middle = (np.zeros((ROWS, COLUMNS), np.uint8) for _ in range(2))
        self.size, self.middle_size = (np.zeros(ROWS, np.float32) for _ in range(2))
        self.mixed = np.zeros((ROWS, width), np.uint16 if attention == torch.bfloat16 else np.float32)
        self.product = np.zeros((ROWS, channels), np.float32)


class FewRows:
    """All layers of a network in 8 bits, for batches of at most `ROWS` rows."""

    def __init__(
        self,
        layers: Sequence[EightBitLayer],
        norm: tuple[Array, Array, np.float32],
        turns: Array,
        heads: int,
        attention: torch.dtype,
    ) -> None:
        """Lay the weights out a second time.

        Args:
            layers: From the first to the last.
            norm: Weight, bias and eps of the LayerNorm before them; all have this eps.
            turns: Cosine and sine of each position and pair of channels, float32, shape (`ROWS`, D / 2, 2).
            heads: Number of heads.
            attention: What queries, keys and values are rounded to, float32 or bfloat16.
        """
        width = layers[0].vectors.shape[1]
        self._norm, self._turns, self._heads, self._attention = norm, turns, heads, attention
        self._scale = np.float32((width // heads) ** -0.5)
        self._widths, self._plains = (
            np.array(values, np.int64) for values in zip(*((layer.width, layer.plain) for layer in layers), strict=True)
        )
        self._vectors = np.stack([layer.vectors for layer in layers])
        widest = max(layer.products[2].out_features for layer in layers)
        self._columns = _padded(max(3 * width, widest), PANEL)
        self._offsets = np.zeros((len(layers), _padded(5 * width + widest, PANEL) + PANEL), np.int32)
        self._scales = np.zeros(self._offsets.shape, np.float32)
        products = [product for layer in layers for product in layer.products]
        sizes = [_padded(product.out_features, PANEL) * _padded(product.in_features, _INPUTS) for product in products]
        self._places = np.cumsum([0, *sizes[:-1]], dtype=np.int64).reshape(len(layers), 4)
        self._weights = _aligned(sum(sizes))
        for number, layer in enumerate(layers):
            for product, place, first in zip(layer.products, self._places[number], _channels(width), strict=True):
                levels = product.levels().numpy()
                channels = slice(first, first + len(levels))
                self._offsets[number, channels] = 128 * levels.sum(axis=1, dtype=np.int32)
                self._scales[number, channels] = product.scales.numpy()
                panels = _panelled(levels).reshape(-1)
                self._weights[place : place + len(panels)] = panels
        shapes = instructions.tile_shapes()
        self._tiles = np.empty((_TOGETHER + 1, 0), np.uint8) if shapes is None else shapes
        self._spare: list[_Buffers] = []

    def __call__(self, hidden: Array, cu_seqlens: Array, firsts: bool) -> None:
        """Apply all layers.

        Args:
            hidden: Sum of the embeddings, float32, shape (T, C), T at most `ROWS`; overwritten by the state after the last
                layer.
            cu_seqlens: int64, shape (texts + 1,): text j lies at ``cu_seqlens[j]:cu_seqlens[j + 1]``.
            firsts: Whether only the first row of each text is wanted, whose query is then not rounded in the last layer.
        """
        rows = len(hidden)
        try:
            buffers = self._spare.pop()
        except IndexError:
            buffers = _Buffers(hidden.shape[1], self._columns, self._attention)
        no_product, nothing = np.empty((0, 0), np.float32), np.empty(0, np.float32)
        weight, bias, eps = self._norm
        levels, size = buffers.levels, buffers.size
        normalise(no_product, nothing, nothing, hidden, weight, bias, eps, levels, size)
        tiles = self._tiles[min(rows, _TOGETHER)]
        state = np.zeros(_APART * _PHASES * len(self._widths), np.int64)
        arguments = (
            self._weights, self._places, self._widths, self._plains, self._offsets, self._scales, self._vectors, eps,
            self._heads, self._scale, self._turns, cu_seqlens[:-1], np.diff(cu_seqlens), hidden, levels, size,
            buffers.middle, buffers.middle_size, buffers.mixed[:rows], buffers.product, tiles, firsts, state,
        )  # fmt: skip
        _HELPERS.ask(partial(_run, *arguments, _JOINED), min(torch.get_num_threads(), _THREADS) - 1)
        _run(*arguments, _CALLS)
        self._spare.append(buffers)  # who comes later finds no part left, and touches nothing


def _aligned(size: int) -> Array:
    room = np.empty(size + 64, np.int8)  # not zeros: NumPy asks for large pages of memory only for these
    begin = -room.ctypes.data % 64
    return room[begin : begin + size]


def _panelled(levels: Array) -> Array:
    """Return a matrix (out, in) as panels of steps of output channels of four input channels: (panels, steps, `PANEL`, 4)."""
    outer, inner = levels.shape
    filled = np.zeros((_padded(outer, PANEL), _padded(inner, _INPUTS)), np.int8)
    filled[:outer, :inner] = levels
    return np.ascontiguousarray(filled.reshape(-1, PANEL, filled.shape[1] // 4, 4).transpose(0, 2, 1, 3))


@compiled
def _wait(calls: Any, seen: Any) -> bool:
    """Wait until a thread begins a pass, but not long, and return whether one has."""
    begun = ticks()
    while look(calls.ctypes.data) == seen:
        if ticks() - begun > _PATIENCE:
            return False
    return True


_Jobs: TypeAlias = "queue.SimpleQueue[Callable[[], None] | None]"


def _help(jobs: _Jobs) -> None:
    """Take part in whatever is asked for, until there is None to do."""
    while (job := _another(jobs)) is not None:
        with suppress(Exception):  # the thread that calls meets it, too
            job()
        del job  # which holds a network's weights


def _another(jobs: _Jobs) -> Callable[[], None] | None:
    """Wait for another job, at first awake: a thread that sleeps takes milliseconds to wake on some machines."""
    while True:
        calls = _CALLS[0]
        try:
            return jobs.get_nowait()
        except queue.Empty:
            if not _wait(_CALLS, calls):
                return jobs.get()


class _Helpers:
    """Threads that take part in what another has begun."""

    def __init__(self) -> None:
        self._forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._forget)  # no thread survives a fork
        atexit.register(self._stop)

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._jobs: _Jobs = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._kept_off: tuple[int, set[int]] | None = None
        self._stopped = False

    def ask(self, work: Callable[[], None], count: int) -> None:
        """Let so many threads do the same work, if there are cores for them, and do not wait for them."""
        cores = _cores()
        count = min(count, len(cores) - 1)
        if count < 1:
            return
        with self._lock:
            self._start(count)
            self._keep_off(cores)
            for _ in self._threads[:count]:
                self._jobs.put(work)

    def _start(self, count: int) -> None:
        while len(self._threads) < count and not self._stopped:
            thread = threading.Thread(target=_help, args=(self._jobs,), name="gte-rag-few-rows", daemon=True)
            try:
                thread.start()
            except RuntimeError:  # there may be no more, and the one that calls can do all by itself
                return
            self._threads.append(thread)
            self._kept_off = None

    def _stop(self) -> None:
        """End the threads, which must not be in compiled code when the interpreter goes."""
        with self._lock:
            for _ in self._threads:
                self._jobs.put(None)
            for thread in self._threads:
                thread.join(1.0)
            self._threads, self._stopped = [], True

    def _keep_off(self, cores: set[int]) -> None:
        """Keep the threads off the core of the calling one: waking them, a kernel may put them there, where both would wait."""
        if _core is None or self._kept_off == (now := (_core(), cores)):
            return
        for thread in self._threads:
            if thread.native_id is not None:
                with suppress(OSError):  # a thread is slower on the wrong core, and no worse
                    os.sched_setaffinity(thread.native_id, cores - {now[0]})
        self._kept_off = now


def _cores() -> set[int]:
    """Return the cores that the calling thread may use."""
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # another system, or not allowed to ask
        return set(range(os.cpu_count() or 1))


def _find_core() -> Callable[[], int] | None:
    """Return the function that tells the core of the calling thread, where threads can be kept off it."""
    try:
        found = ctypes.PyDLL(None).sched_getcpu  # keeps Python's lock, for which helpers wait
    except (AttributeError, OSError, TypeError):  # another system
        return None
    return found if hasattr(os, "sched_setaffinity") else None


_core = _find_core()
_CALLS, _JOINED = np.zeros(8, np.int64), np.empty(0, np.int64)
_HELPERS = _Helpers()
