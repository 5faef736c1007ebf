"""Instructions of x86 processors for `gte_rag.few_rows` that numba has no word for, as functions it can compile.

Matrices are given by addresses. Levels are unsigned 8-bit rows, `STRIDE` bytes apart. Weights are signed and lie in panels of
`PANEL` output channels: (inputs / 4, `PANEL`, 4), the inputs filled up with zeros to a multiple of `INPUTS`.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Callable
from typing import Any

import llvmlite.binding
import numba
import numpy as np
from llvmlite import ir
from numba import extending
from numba.core import cgutils
from numpy.typing import NDArray

STRIDE = (
    4160  # 65 lines of a cache, so that rows do not compete for the same places of it; a constant of the compiled code
)
PANEL = 32
INPUTS = 64
_AHEAD = 4096  # bytes from a weight to the one that is fetched meanwhile: a processor's own fetching ends with the page

_config: Any = numba.config
# Numba may be told to compile for less than the processor has.
_FOR_THIS = _config.CPU_NAME is None and _config.CPU_FEATURES is None and _config.ENABLE_AVX
_FEATURES = llvmlite.binding.get_host_cpu_features() if _FOR_THIS else {}
HAS_DOT_PRODUCTS = bool(_FEATURES.get("avx512vnni"))
"""Whether the processor multiplies registers of 512 bits of 8-bit numbers (AVX-512 VNNI)."""
_HAS_TILES = all(_FEATURES.get(name) for name in ("avx512vnni", "amx-tile", "amx-int8"))

_VOID, _I8, _I32, _I64 = ir.VoidType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_INTEGERS, _FLOATS = ir.VectorType(_I32, 16), ir.VectorType(ir.FloatType(), 16)
_ZEROS = ir.Constant(_INTEGERS, [0] * 16)
_FIRST_ONLY = _ZEROS  # of a shuffle: every place takes the first
_REGISTERS = PANEL // 16


class _Code:
    """What the functions below build their code with."""

    def __init__(self, builder: Any) -> None:
        self.builder = builder

    def call(self, name: str, *arguments: Any, result: Any = _VOID) -> Any:
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        function: Any = cgutils.get_or_insert_function  # has no types
        return self.builder.call(function(self.builder.module, kind, name), arguments)

    def at(self, address: Any, offset: Any = 0, kind: Any = _I8) -> Any:
        offset = _I64(offset) if isinstance(offset, int) else offset
        return self.builder.inttoptr(self.builder.add(address, offset), kind.as_pointer())

    def load(self, pointer: Any, align: int = 1) -> Any:
        return self.builder.load(pointer, align=align)

    def fetch(self, address: Any, size: int) -> None:
        """Ask for `size` bytes, `_AHEAD` of an address, to be brought near."""
        to_read, into_all_caches, data = _I32(0), _I32(3), _I32(1)
        for line in range(0, size, 64):
            self.call("llvm.prefetch.p0", self.at(address, _AHEAD + line), to_read, into_all_caches, data)

    def repeat(self, times: Any, *starts: Any) -> _Loop:
        return _Loop(self, times, starts)


class _Loop:
    """A loop of at least one turn, whose values change: `begin` gives the turn and the values, `end` takes the new ones."""

    def __init__(self, code: _Code, times: Any, starts: Any) -> None:
        self._builder, self._times, self._before = code.builder, times, code.builder.block
        self._body, self._after = (code.builder.append_basic_block(name) for name in ("body", "after"))
        self._starts = [_I64(0), *starts]

    def begin(self) -> list[Any]:
        self._builder.branch(self._body)
        self._builder.position_at_end(self._body)
        self._values = [self._builder.phi(start.type) for start in self._starts]
        return self._values

    def end(self, *grown: Any) -> None:
        following = self._builder.add(self._values[0], _I64(1))
        for value, start, new in zip(self._values, self._starts, (following, *grown), strict=True):
            value.add_incoming(start, self._before)
            value.add_incoming(new, self._body)
        self._builder.cbranch(self._builder.icmp_signed("<", following, self._times), self._body, self._after)
        self._builder.position_at_end(self._after)


def _intrinsic(function: Callable[..., Any]) -> Any:
    """Return numba's intrinsic, whose own type says that it takes the context, too."""
    return extending.intrinsic(function)


def _function(count: int, generate: Any, result: Any = numba.types.void) -> Any:
    """Return what an intrinsic has to return: the types of its arguments, all addresses or sizes, and its code."""

    def lowered(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = generate(_Code(builder), *arguments)
        return context.get_dummy_value() if value is None else value

    return result(*[numba.types.intp] * count), lowered


def dot_products(rows: int) -> Any:
    """Return the function that multiplies so many rows of levels by a panel of weights.

    Its arguments: address of the levels and of the panel; inputs / 4; addresses of what the zero of the levels has added to
    each output channel, int32, of the sizes of the channels' levels, float32, and of the results, float32; bytes from one row
    of them to the next.
    """

    @_intrinsic
    def multiply(
        context: Any, levels: Any, panel: Any, steps: Any, offsets: Any, scales: Any, out: Any, apart: Any
    ) -> Any:
        def generate(
            code: Any, levels: Any, panel: Any, steps: Any, offsets: Any, scales: Any, out: Any, apart: Any
        ) -> None:
            build = code.builder
            loop = code.repeat(steps, *[_ZEROS] * (rows * _REGISTERS))
            step, *sums = loop.begin()
            here, first = (build.add(of, build.mul(step, _I64(size))) for of, size in ((panel, 4 * PANEL), (levels, 4)))
            code.fetch(here, 4 * PANEL)
            weights = [code.load(code.at(here, 64 * register, _INTEGERS), 64) for register in range(_REGISTERS)]
            grown: list[Any] = []
            for row in range(rows):
                one = build.insert_element(_ZEROS, code.load(code.at(first, row * STRIDE, _I32)), _I32(0))
                repeated = build.shuffle_vector(one, one, _FIRST_ONLY)
                for weight in weights:
                    arguments = sums[len(grown)], repeated, weight
                    grown.append(code.call("llvm.x86.avx512.vpdpbusd.512", *arguments, result=_INTEGERS))
            loop.end(*grown)
            for place, total in enumerate(grown):
                row, column = divmod(place, _REGISTERS)
                column *= 64
                offset, scale = (
                    code.load(code.at(of, column, kind)) for of, kind in ((offsets, _INTEGERS), (scales, _FLOATS))
                )
                value = build.fmul(build.sitofp(build.sub(total, offset), _FLOATS), scale)
                build.store(value, code.at(out, build.add(build.mul(apart, _I64(row)), _I64(column)), _FLOATS), align=4)

        return _function(7, generate)

    return multiply


@_intrinsic
def add_one(context: Any, address: Any) -> Any:
    """Return the int64 at an address and add one to it, as one operation for all threads."""

    def generate(code: Any, address: Any) -> Any:
        return code.builder.atomic_rmw("add", code.at(address, 0, _I64), _I64(1), "seq_cst")

    return _function(1, generate, numba.types.int64)


@_intrinsic
def look(context: Any, address: Any) -> Any:
    """Return the int64 at an address, which other threads change, after a short pause."""

    def generate(code: Any, address: Any) -> Any:
        code.call("llvm.x86.sse2.pause")
        return code.builder.load_atomic(code.at(address, 0, _I64), "seq_cst", 8)

    return _function(1, generate, numba.types.int64)


@_intrinsic
def give_way(context: Any) -> Any:
    """Let the system run another thread on this core, where it can be asked to."""

    def generate(code: Any) -> None:
        if os.name == "posix":
            code.call("sched_yield", result=_I32)

    return _function(0, generate)


@_intrinsic
def ticks(context: Any) -> Any:
    """Return the processor's clock."""
    return _function(0, lambda code: code.call("llvm.readcyclecounter", result=_I64), numba.types.int64)


# Tiles (AMX): a tile is 16 rows of 64 bytes. 0 and 1 sum up 16 rows by a panel, 2 and 3 the 16 rows behind them; 4 and 5 are
# their levels, 6 and 7 the weights.

TILE_ROWS = 32


def tile_shapes() -> NDArray[np.uint8] | None:
    """Return what `shape_tiles` reads, or None if this process may not use tiles.

    Returns:
        uint8, shape (`TILE_ROWS` + 1, 64): for each number of rows that are multiplied together.
    """
    if not _HAS_TILES or platform.system() != "Linux":
        return None
    arch_prctl, ask_for, data_of_tiles = 158, 0x1023, 18  # which the system does not save for those who have not asked
    if ctypes.CDLL(None).syscall(arch_prctl, ask_for, data_of_tiles):
        return None
    shapes = np.zeros((TILE_ROWS + 1, 64), np.uint8)
    shapes[:, 0] = 1
    for rows, shape in enumerate(shapes):
        first, second = min(16, rows), max(0, rows - 16)
        shape[48:56] = first, first, second, second, first, second, 16, 16
        shape[16:32:2] = np.where(shape[48:56], 64, 0)  # bytes of a row
    return shapes


@_intrinsic
def _shape(context: Any, shape: Any) -> Any:
    """Let this thread use tiles of the shape at an address."""
    return _function(1, lambda code, shape: code.call("llvm.x86.ldtilecfg", code.at(shape)))


@_intrinsic
def _release(context: Any) -> Any:
    """Let this thread use tiles no longer."""
    return _function(0, lambda code: code.call("llvm.x86.tilerelease"))


def _tiles(groups: int) -> Any:
    """Return the function that multiplies one or two groups of 16 rows of levels by a panel of weights.

    Its arguments: address of the levels and of the panel, inputs / `INPUTS`, address of the sums, int32,
    (`TILE_ROWS`, `PANEL`).
    """

    @_intrinsic
    def multiply(context: Any, levels: Any, panel: Any, steps: Any, sums: Any) -> Any:
        def generate(code: Any, levels: Any, panel: Any, steps: Any, sums: Any) -> None:
            build, tile = code.builder, _I8
            size = INPUTS * PANEL
            for group in range(groups):
                for half in range(2):
                    code.call("llvm.x86.tilezero", tile(2 * group + half))
            loop = code.repeat(steps)
            (step,) = loop.begin()
            here, first = (build.add(of, build.mul(step, _I64(by))) for of, by in ((panel, size), (levels, INPUTS)))
            code.fetch(here, size)
            for half in range(2):
                code.call("llvm.x86.tileloadd64", tile(6 + half), code.at(here, 64 * half), _I64(4 * PANEL))
            for group in range(groups):
                code.call("llvm.x86.tileloadd64", tile(4 + group), code.at(first, 16 * group * STRIDE), _I64(STRIDE))
                for half in range(2):
                    code.call("llvm.x86.tdpbusd", tile(2 * group + half), tile(4 + group), tile(6 + half))
            loop.end()
            for group in range(groups):
                for half in range(2):
                    place = code.at(sums, 16 * group * 4 * PANEL + 64 * half)
                    code.call("llvm.x86.tilestored64", tile(2 * group + half), place, _I64(4 * PANEL))

        return _function(4, generate)

    return multiply


def _nothing(*addresses: int) -> None:
    """Stand in where the processor has no tiles: a compiler that meets the instructions there ends the process."""


if _HAS_TILES:
    shape_tiles, release_tiles, one_group, two_groups = _shape, _release, _tiles(1), _tiles(2)
else:
    shape_tiles = release_tiles = one_group = two_groups = numba.njit(_nothing)
