"""Loops over activations that torch has no single operation for, compiled by numba (extra `fast`).

Each reads its input once and writes what the next matrix product reads, so a layer passes over its activations a few times
instead of some thirty. All run on the calling thread without Python's lock; `gte_rag.fused` spreads them over threads.

Arrays are C-contiguous. A "product" is what a matrix product returned: float32, or bfloat16 as uint16. With 8-bit products a
row's value is ``product * size[row] + bias``; without them `size` is empty and nothing is scaled, and an empty `bias` adds
nothing. Outputs take the form that their dtype says: float32, uint16 (bfloat16, rounded to even), or uint8 (levels around 128
on a scale of the row's own, which goes to `out_size`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from numba.extending import overload, register_jitable

F = TypeVar("F", bound=Callable[..., Any])

# Contraction and reordering of sums, so that loops become vector instructions; NaN and infinity keep their meaning.
_FAST = {"contract", "reassoc", "nsz", "arcp"}


def compiled(function: F) -> F:
    """Compile a function at its first call and keep the code on disk."""
    try:
        return cast(F, numba.njit(nogil=True, cache=True, fastmath=_FAST)(function))
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return cast(F, numba.njit(nogil=True, fastmath=_FAST)(function))


def inlined(function: F) -> F:
    """Compile a function as part of those that call it."""
    return cast(F, numba.njit(nogil=True, fastmath=_FAST, inline="never")(function))


def either(function: F) -> F:
    """Let compiled code call a plain function, too."""
    registered: F = register_jitable(function)
    return registered


def get(array: Any, place: Any) -> Any:
    """Return an element as float32; compiled code only."""


def put(array: Any, place: Any, value: Any) -> None:
    """Write an element in the form of the array; compiled code only."""


@overload(get, inline="never", jit_options={"fastmath": _FAST})
def _get_typed(array: Any, place: Any) -> Any:
    if array.dtype == numba.uint16:

        def widened(array: Any, place: Any) -> Any:
            return np.uint32(np.uint32(array[place]) << np.uint32(16)).view(np.float32)

        return widened

    def plain(array: Any, place: Any) -> Any:
        return np.float32(array[place])

    return plain


@overload(put, inline="never", jit_options={"fastmath": _FAST})
def _put_typed(array: Any, place: Any, value: Any) -> Any:
    if array.dtype == numba.uint16:

        def rounded(array: Any, place: Any, value: Any) -> None:
            bits = np.float32(value).view(np.uint32)
            array[place] = np.uint16(
                (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            )

        return rounded

    def plain(array: Any, place: Any, value: Any) -> None:
        array[place] = value

    return plain


def _write(row: Any, out: Any, out_size: Any, at: Any) -> None: ...


@overload(_write, inline="never", jit_options={"fastmath": _FAST})
def _write_typed(row: Any, out: Any, out_size: Any, at: Any) -> Any:
    if out.dtype == numba.uint8:

        def levels(row: Any, out: Any, out_size: Any, at: Any) -> None:
            # Without their sign, floats are ordered as their bits are, and a maximum of integers is a vector instruction.
            most = np.float32(1e-30).view(np.int32)
            for i in range(row.shape[0]):
                most = max(most, np.int32(np.float32(row[i]).view(np.int32) & np.int32(0x7FFFFFFF)))
            largest = np.int32(most).view(np.float32)
            out_size[at] = largest / np.float32(127)
            scale = np.float32(127) / largest
            for i in range(row.shape[0]):
                # Adding 1.5 * 2^23 rounds to the nearest whole number and leaves it in the low bits.
                bits = np.float32(row[i] * scale + np.float32(12583040.0)).view(np.uint32)
                out[at, i] = np.uint8(bits & np.uint32(255))

        return levels

    def values(row: Any, out: Any, out_size: Any, at: Any) -> None:
        for i in range(row.shape[0]):
            put(out[at], i, row[i])

    return values


@compiled
def level(x: Any, out: Any, out_size: Any) -> None:
    """Copy the rows of a matrix to the form of `out`."""
    row = np.empty(x.shape[1], np.float32)
    for t in range(x.shape[0]):
        for i in range(x.shape[1]):
            row[i] = get(x[t], i)
        _write(row, out, out_size, t)


@compiled
def normalise(
    product: Any,
    size: Any,
    bias: Any,
    hidden: Any,
    weight: Any,
    offset: Any,
    eps: Any,
    out: Any,
    out_size: Any,
) -> None:
    """Add a product to the hidden state and apply LayerNorm, in place, and write the form that the next product reads."""
    width = hidden.shape[1]
    row = np.empty(width, np.float32)
    for t in range(hidden.shape[0]):
        scale = size[t] if size.shape[0] else np.float32(1)
        total = np.float32(0)
        if product.shape[0] == 0:
            for i in range(width):
                row[i] = hidden[t, i]
                total += row[i]
        elif bias.shape[0]:
            for i in range(width):
                row[i] = hidden[t, i] + (get(product[t], i) * scale + bias[i])
                total += row[i]
        else:
            for i in range(width):
                row[i] = hidden[t, i] + get(product[t], i) * scale
                total += row[i]
        mean = total / np.float32(width)
        squares = np.float32(0)
        for i in range(width):
            squares += (row[i] - mean) * (row[i] - mean)
        inverse = np.float32(1) / np.float32(math.sqrt(squares / np.float32(width) + np.float32(eps)))
        for i in range(width):
            row[i] = (row[i] - mean) * inverse * weight[i] + offset[i]
            hidden[t, i] = row[i]
        if out.shape[0]:
            _write(row, out, out_size, t)


@compiled
def gate(up: Any, gate: Any, skipped: Any, width: Any, plain: Any, size: Any, out: Any, out_size: Any) -> None:
    """Compute ``gelu(gate) * up`` of two products, or of one given twice whose first `skipped` columns are up.

    Gate is `width` columns, of which the first `plain` have none of up.
    """
    row = np.empty(width, np.float32)
    for t in range(out.shape[0]):
        scale = size[t] if size.shape[0] else np.float32(1)
        values, asked = up[t, : width - plain], gate[t, skipped : skipped + width]
        for i in range(plain):
            x = get(asked, i) * scale
            row[i] = x * _normal(x)
        for i in range(width - plain):
            x = get(asked, plain + i) * scale
            row[plain + i] = x * _normal(x) * (get(values, i) * scale)
        _write(row, out, out_size, t)


@inlined
def _normal(x: Any) -> Any:
    """Return the normal distribution function within 3e-7: an odd polynomial, least squares weighted towards minimax."""
    near = min(max(x, np.float32(-5)), np.float32(5))
    t = near * near * np.float32(0.08) - np.float32(1)
    p = np.float32(0.0006086911307647824)
    p = p * t + np.float32(-0.0016132508171722293)
    p = p * t + np.float32(0.0017229007789865136)
    p = p * t + np.float32(-0.0026856111362576485)
    p = p * t + np.float32(0.006410404108464718)
    p = p * t + np.float32(-0.011164306662976742)
    p = p * t + np.float32(0.0164022259414196)
    p = p * t + np.float32(-0.023268666118383408)
    p = p * t + np.float32(0.03144216164946556)
    p = p * t + np.float32(-0.04044260457158089)
    p = p * t + np.float32(0.05152052268385887)
    p = p * t + np.float32(-0.0702962800860405)
    p = p * t + np.float32(0.14136378467082977)
    return np.float32(0.5) + near * p


@inlined
def _ordered(x: Any) -> Any:
    """Return the integer that stands for a float32 in their order: a maximum of integers is a vector instruction."""
    bits = np.float32(x).view(np.int32)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@inlined
def _unordered(bits: Any) -> Any:
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@inlined
def _exp(x: Any) -> Any:
    """Return e^x for x <= 0, relative error below 3e-7; below -87 it is 0 or nearly."""
    scaled = max(x, np.float32(-87)) * np.float32(1.4426950408889634)
    whole = np.int32(scaled - np.float32(0.5))
    f = (scaled - np.float32(whole)) * np.float32(0.6931471805599453)
    p = np.float32(1 / 720)
    p = p * f + np.float32(1 / 120)
    p = p * f + np.float32(1 / 24)
    p = p * f + np.float32(1 / 6)
    p = p * f + np.float32(0.5)
    p = p * f + np.float32(1)
    p = p * f + np.float32(1)
    return p * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@compiled
def turn(
    product: Any,
    size: Any,
    bias: Any,
    turns: Any,
    first: Any,
    starts: Any,
    lengths: Any,
    parts: Any,
    heads: Any,
    out: Any,
) -> None:
    """Turn queries and keys by their positions and lay them and the values out by text and head.

    Args:
        product: Rows `first` … of q, k, v (`parts` 3) or k, v (2) of all heads.
        size: Sizes of the rows' levels.
        bias: Bias of the product.
        turns: Cosine and sine of each position and pair of channels, (positions, D / 2, 2).
        first: Row of the batch at which the product begins.
        starts: First row of the text that each row of the batch belongs to.
        lengths: Length of the text that each row of the batch belongs to.
        parts: 3 or 2.
        heads: Number of heads.
        out: (3, T * C): each text is a block of (heads, length, D) in each of q, k, v.
    """
    width = product.shape[1] // parts
    depth = width // heads
    row, turned = np.empty(width, np.float32), np.empty(depth, np.float32)
    for t in range(product.shape[0]):
        scale = size[t] if size.shape[0] else np.float32(1)
        start, length = starts[first + t], lengths[first + t]
        position = first + t - start
        angles = turns[position]
        for part in range(parts):
            values = product[t, part * width : (part + 1) * width]
            if bias.shape[0]:
                for i in range(width):
                    row[i] = get(values, i) * scale + bias[part * width + i]
            else:
                for i in range(width):
                    row[i] = get(values, i) * scale
            target = out[part + 3 - parts, start * width : (start + length) * width]
            for head in range(heads):
                place = target[(head * length + position) * depth : (head * length + position + 1) * depth]
                of = row[head * depth : (head + 1) * depth]
                if part + 3 - parts < 2:
                    for i in range(depth // 2):
                        a, b = of[2 * i], of[2 * i + 1]
                        turned[2 * i] = a * angles[i, 0] - b * angles[i, 1]
                        turned[2 * i + 1] = a * angles[i, 1] + b * angles[i, 0]
                    for i in range(depth):
                        put(place, i, turned[i])
                else:
                    for i in range(depth):
                        put(place, i, of[i])


@compiled
def softmax(scores: Any, scale: Any) -> None:
    """Apply softmax to ``scores * scale``, row by row, in place."""
    length = scores.shape[1]
    row = np.empty(length, np.float32)
    for t in range(scores.shape[0]):
        of = scores[t]
        most = np.int32(-2147483648)
        for i in range(length):
            row[i] = get(of, i) * scale
            most = max(most, _ordered(row[i]))
        largest = _unordered(most)
        total = np.float32(0)
        for i in range(length):
            row[i] = _exp(row[i] - largest)
            total += row[i]
        inverse = np.float32(1) / total
        for i in range(length):
            put(of, i, row[i] * inverse)


@compiled
def collect(mixed: Any, first: Any, head: Any, out: Any) -> None:
    """Copy blocks of (heads, queries, D) to the rows `first` … of (T, C), beginning at column ``head * D``."""
    heads, queries, depth = mixed.shape
    for h in range(heads):
        for t in range(queries):
            place = out[first + t, (head + h) * depth : (head + h + 1) * depth]
            for i in range(depth):
                place[i] = mixed[h, t, i]


@compiled
def attend(blocks: Any, start: Any, length: Any, heads: Any, scale: Any, out: Any) -> None:
    """Attend within one short text: `blocks` as `turn` leaves them, `out` (T, C)."""
    width = out.shape[1]
    depth = width // heads
    keys = np.empty((length, depth), np.float32)
    values = np.empty((length, depth), np.float32)
    query = np.empty(depth, np.float32)
    mixed = np.empty(depth, np.float32)
    scores = np.empty(length, np.float32)
    for head in range(heads):
        base = start * width + head * length * depth
        for j in range(length):
            for i in range(depth):
                keys[j, i] = get(blocks[1], base + j * depth + i)
                values[j, i] = get(blocks[2], base + j * depth + i)
        for t in range(length):
            for i in range(depth):
                query[i] = get(blocks[0], base + t * depth + i)
            mix(query, keys, values, scale, scores, mixed)
            place = out[start + t, head * depth : (head + 1) * depth]
            for i in range(depth):
                put(place, i, mixed[i])


@compiled
def attend_firsts(
    product: Any,
    size: Any,
    bias: Any,
    blocks: Any,
    starts: Any,
    lengths: Any,
    heads: Any,
    scale: Any,
    out: Any,
) -> None:
    """Attend from the first token of each text, whose query is a row of `product`, and write a row of `out` for each."""
    width = out.shape[1]
    depth = width // heads
    query = np.empty(depth, np.float32)
    mixed = np.empty(depth, np.float32)
    for text in range(out.shape[0]):
        length = lengths[text]
        keys = np.empty((length, depth), np.float32)
        values = np.empty((length, depth), np.float32)
        scores = np.empty(length, np.float32)
        factor = size[text] if size.shape[0] else np.float32(1)
        for head in range(heads):
            base = starts[text] * width + head * length * depth
            for j in range(length):
                for i in range(depth):
                    keys[j, i] = get(blocks[1], base + j * depth + i)
                    values[j, i] = get(blocks[2], base + j * depth + i)
            for i in range(depth):
                query[i] = get(product[text], head * depth + i) * factor
            if bias.shape[0]:
                for i in range(depth):
                    query[i] += bias[head * depth + i]
            mix(query, keys, values, scale, scores, mixed)
            place = out[text, head * depth : (head + 1) * depth]
            for i in range(depth):
                put(place, i, mixed[i])


@inlined
def mix(query: Any, keys: Any, values: Any, scale: Any, scores: Any, mixed: Any) -> None:
    """Attend from one query, (D,), to keys and values, (length, D), all float32; `scores` is room for (length,)."""
    length, depth = keys.shape
    most = np.int32(-2147483648)
    for j in range(length):
        total = np.float32(0)
        for i in range(depth):
            total += query[i] * keys[j, i]
        scores[j] = total * scale
        most = max(most, _ordered(scores[j]))
    largest = _unordered(most)
    total = np.float32(0)
    for j in range(length):
        scores[j] = _exp(scores[j] - largest)
        total += scores[j]
    inverse = np.float32(1) / total
    for i in range(depth):
        mixed[i] = np.float32(0)
    for j in range(length):
        share = scores[j] * inverse
        for i in range(depth):
            mixed[i] += share * values[j, i]
