"""The network on a CPU in few passes over memory: torch's matrix products, and the loops of `gte_rag.kernels` between them.

A layer is two phases: attention, text by text and head by head; then everything that a row does by itself, from the output
projection to the next layer's queries, keys and values, on a few hundred rows at a time that stay near a core. The parts of
a phase are shared out among as many threads as torch would use for one product, each of which computes alone, so that no
operation waits for another's slowest thread. Few rows, such as a query's, are not worth sharing: they run on the calling
thread, and only the products use all cores. In 8 bits `gte_rag.few_rows` takes them, where the processor has its instructions.

Needs numba (extra `fast`); without it the network of `gte_rag.precision` computes the same.
"""

from __future__ import annotations

import importlib
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from gte_rag import precision as products
from gte_rag.config import GTEConfig
from gte_rag.model import GTEModel, Layer
from gte_rag.precision import Int8GatedMLP, Int8Linear, PackedGatedMLP, PackedLinear

Array = NDArray[Any]

_ROWS = (
    256  # rows that pass through a layer together on one core: their widest activation, (256, 2F), stays in its cache
)
_STEP = 16  # row counts are rounded up to multiples of this, because oneDNN prepares a kernel for each; but see _FEW
_FEW = 128  # with fewer rows than this the calling thread computes alone, and no row is wasted on rounding
_SHORT = 32  # texts up to this length attend in one loop, longer ones by matrix products
_SHORT_IN_8_BITS = 64  # the same in 8 bits: as long as in `gte_rag.few_rows`, so that a text gets one vector
_SCORES = 1 << 19  # scores that one product of queries and keys may give, in one core's cache with what belongs to them
_QUERIES = 256  # queries of a long text that are scored together
_KEPT_ROWS = 4096  # buffers up to this size are kept for the next batch; those of longer texts are given back


def build(config: GTEConfig, weights: Mapping[str, Tensor], precision: str, device: torch.device) -> GTEModel:
    """Make the network as `gte_rag.precision.build` does, and let it run fused where that is possible."""
    model = products.build(config, weights, precision, device)
    first = model.layers[0]
    assert isinstance(first, Layer)
    if has_kernels() and isinstance(first.mlp, (Int8GatedMLP, PackedGatedMLP)):
        model.packed_forward = Fused(model, precision)
    return model


def has_kernels() -> bool:
    """Whether the compiled loops are there: the extra `fast`, in a version that fits this NumPy."""
    return _kernels() is not None


@cache
def _few_rows() -> ModuleType | None:
    """Return the module for few rows in 8 bits, where the processor has the instructions."""
    try:
        found = importlib.import_module("gte_rag.few_rows")
    except ImportError:
        return None
    return found if found.is_supported() else None


@cache
def _kernels() -> ModuleType | None:
    try:
        return importlib.import_module("gte_rag.kernels")
    except ImportError:
        return None


class _Product(NamedTuple):
    """A matrix product from rows to an array, and the bias that is still to be added to it."""

    compute: Callable[[Tensor], Tensor]
    bias: Array

    def __call__(self, x: Tensor) -> Array:
        return _array(self.compute(x))

    @classmethod
    def of(cls, linear: nn.Module | None) -> _Product:
        assert isinstance(linear, (Int8Linear, PackedLinear))
        pending = linear.bias if isinstance(linear, Int8Linear) else None
        return cls(linear.product, np.empty(0, np.float32) if pending is None else pending.numpy())


class _Layer:
    """The products and LayerNorms of one layer."""

    def __init__(self, layer: Layer) -> None:
        self.qkv, self.o = _Product.of(layer.attention.qkv_proj), _Product.of(layer.attention.o_proj)
        split = layer.attention.q_proj is not None
        self.q = _Product.of(layer.attention.q_proj) if split else None
        self.kv = _Product.of(layer.attention.kv_proj) if split else None
        mlp = layer.mlp
        if isinstance(mlp, Int8GatedMLP):
            self.up: _Product | None = None  # in the columns before gate's
            self.gate = _Product.of(mlp.up_gate)
        else:
            assert isinstance(mlp, PackedGatedMLP)
            self.up = None if mlp.up is None else _Product.of(mlp.up)
            self.gate = _Product.of(mlp.gate)
        self.width, self.plain, self.down = mlp.down.in_features, mlp.plain, _Product.of(mlp.down)
        self.attention_norm, self.mlp_norm = _norm(layer.attn_ln), _norm(layer.mlp_ln)


def _norm(norm: nn.LayerNorm) -> tuple[Array, Array, np.float32]:
    return norm.weight.float().numpy(), norm.bias.float().numpy(), np.float32(norm.eps)


def _array(tensor: Tensor) -> Array:
    array: Array = (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return array


class _Buffer:
    """A tensor and the array that shares its memory; bfloat16 is uint16 in the array."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.array = tensor, _array(tensor)

    @classmethod
    def of(cls, *shape: int, dtype: torch.dtype) -> _Buffer:
        """Make one of this shape."""
        return cls(torch.zeros(shape, dtype=dtype))  # rows that only fill up are computed too, and must be numbers

    def rows(self, rows: int, columns: int) -> _Buffer:
        """Return its beginning as a matrix of this shape; what the rows have held with another one are numbers, too."""
        return _Buffer(self.tensor.view(-1)[: rows * columns].view(rows, columns))


class _Workspace:
    """What a batch needs beside its weights; the same memory serves one batch after the other.

    Attributes:
        hidden: Hidden state, float32, (rows, C).
        low: What products read of it, (rows, C): levels, bfloat16, or the hidden state itself.
        size: Sizes of the levels, (rows,).
        blocks: Queries, keys and values by text and head, (3, rows * C).
        mixed: What attention gives, (rows, C).
        scratch: For each thread, what products read of the MLP's middle and of `mixed`, with sizes.
    """

    def __init__(
        self, rows: int, width: int, middle: int, low: torch.dtype, attention: torch.dtype, threads: int
    ) -> None:
        self.rows, self.threads = rows, threads
        self.hidden = _Buffer.of(rows, width, dtype=torch.float32)
        self.low = self.hidden if low == torch.float32 else _Buffer.of(rows, width, dtype=low)
        self.size = np.empty(rows, np.float32)
        self.blocks = _Buffer.of(3, rows * width, dtype=attention)
        self.mixed = _Buffer.of(rows, width, dtype=attention)
        at_once = min(rows, max(_ROWS, _FEW))
        self.scratch = [
            (
                _Buffer.of(at_once, middle, dtype=low),
                _Buffer.of(at_once, width, dtype=low),
                np.empty(at_once, np.float32),
            )
            for _ in range(threads)
        ]


class _Phase(NamedTuple):
    """Independent parts of work: `do` is called with each part and the number of the thread."""

    parts: Sequence[Any]
    do: Callable[[Any, int], None]


class _Team:
    """Threads that work through phases together; within a phase each takes the next part that is left."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._threads, self._process = 0, 0
        self._pool: ThreadPoolExecutor | None = None

    def run(self, phases: Sequence[_Phase], threads: int) -> None:
        """Run the phases one after the other and return when all is done."""
        with self._lock:
            pool = self._start(threads)
            shares = [itertools.count() for _ in phases]
            barrier = threading.Barrier(threads)
            working = [pool.submit(_work, phases, shares, barrier, number) for number in range(threads)]
            errors = [error for future in working if (error := future.exception()) is not None]
        # The others only report that one has left them.
        for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
            raise error

    def _start(self, threads: int) -> ThreadPoolExecutor:
        if self._pool is None or (self._threads, self._process) != (
            threads,
            os.getpid(),
        ):  # threads do not survive a fork
            if self._pool is not None and self._process == os.getpid():
                self._pool.shutdown()
            self._pool = ThreadPoolExecutor(threads, thread_name_prefix="gte-rag")
            self._threads, self._process = threads, os.getpid()
            ready = threading.Barrier(threads)
            for future in [self._pool.submit(_compute_alone, ready) for _ in range(threads)]:
                future.result()
            torch.set_num_threads(threads)  # torch passes on to new threads what any thread has set last
        return self._pool


def _compute_alone(ready: threading.Barrier) -> None:
    torch.set_num_threads(1)  # of this thread
    torch.get_num_threads()  # torch sets up a thread at its first question, and would then take what another has set last
    ready.wait()


def _work(phases: Sequence[_Phase], shares: Sequence[Iterator[int]], barrier: threading.Barrier, number: int) -> None:
    try:
        with torch.inference_mode():
            for (parts, do), share in zip(phases, shares, strict=True):
                while (place := next(share)) < len(parts):
                    do(parts[place], number)
                barrier.wait()
    except threading.BrokenBarrierError:
        raise
    except BaseException:
        barrier.abort()
        raise


_TEAM = _Team()


class _Scores(NamedTuple):
    """Attention of some queries of some heads of one text."""

    start: int
    length: int
    heads: slice
    queries: slice


class Fused:
    """The forward pass of a `GTEModel` whose products are packed."""

    def __init__(self, model: GTEModel, precision: str) -> None:
        """Take over the products of a network.

        Args:
            model: The network, its products replaced by `gte_rag.precision.build`.
            precision: What they compute in.
        """
        config = model.config
        self._width, self._heads, self._rotary = config.hidden_size, config.num_heads, model.rotary
        self._scale = np.float32(config.head_dim**-0.5)
        self._words = model.word_embeddings.weight
        self._types = None if model.token_type_embeddings is None else model.token_type_embeddings.weight.float()
        self._first_norm = _norm(model.embeddings_ln)
        self._layers = [_Layer(layer) for layer in model.layers if isinstance(layer, Layer)]
        self._eight = precision == "int8"
        self.short = _SHORT_IN_8_BITS if self._eight else _SHORT
        self._low = {"int8": torch.uint8, "bf16": torch.bfloat16}.get(precision, torch.float32)
        attention = model.layers[0].attention
        in_bfloat16 = precision == "bf16" or bool(getattr(attention, "in_bfloat16", False))
        self._attention = torch.bfloat16 if in_bfloat16 else torch.float32
        given = torch.bfloat16 if precision == "bf16" else torch.float32
        self._nothing = _array(torch.empty(0, 0, dtype=given))
        self._no_size = np.empty(0, np.float32)
        self._spare: list[_Workspace] = []
        self._whole_layers = list(model.layers)  # not the network itself, which holds this pass
        self._inner = [self._width, *(layer.width for layer in self._layers)]
        self._making = threading.Lock()
        self._few: Any = None

    def __call__(self, token_ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None, firsts: bool) -> Tensor:
        """Compute what `GTEModel.forward` does."""
        few = self._for_few_rows(len(token_ids))
        if few is None:
            return _Pass(self, token_ids, cu_seqlens, token_types, firsts).run()
        # Indexing would be shared out by OpenMP, whose threads then keep the cores from those of this pass.
        hidden = functional.embedding(token_ids, self._words).float()
        self.add_types(hidden, token_types)
        few(hidden.numpy(), cu_seqlens.numpy(), firsts)
        return hidden.index_select(0, cu_seqlens[:-1]) if firsts else hidden

    def _for_few_rows(self, rows: int) -> Any:  # noqa: ANN401
        """Return the pass for so few rows in 8 bits, or None. It is made when it is first wanted: not all encode queries."""
        module = _few_rows() if self._eight else None
        if (
            module is None
            or not 0 < rows <= module.ROWS
            or max(self._inner) > module.COLUMNS
            or not self._first_norm[2]
        ):
            return None
        if self._few is None:
            with self._making:
                if self._few is None:
                    layers = [module.EightBitLayer.of(layer) for layer in self._whole_layers]
                    turns = self.turns(module.ROWS)
                    self._few = module.FewRows(layers, self._first_norm, turns, self._heads, self._attention)
        return self._few

    def add_types(self, hidden: Tensor, token_types: Tensor | None) -> None:
        """Add the rows of the token-type table, those of row 0 if no others are given."""
        if self._types is not None:
            hidden += self._types[0] if token_types is None else functional.embedding(token_types, self._types)

    def turns(self, length: int) -> Array:
        """Return cosine and sine of the first positions and pairs of channels: float32, (length, D / 2, 2)."""
        return torch.view_as_real(self._rotary.table(length, self._words.device)).numpy()

    def workspace(self, rows: int, threads: int) -> _Workspace:
        """Return buffers for this many rows, used ones if there are any; give them back with `release`."""
        try:
            found = self._spare.pop()
        except IndexError:
            found = None
        if found is None or found.rows < rows or found.threads < threads:
            middle = max(layer.width for layer in self._layers)
            found = _Workspace(max(rows, _FEW), self._width, middle, self._low, self._attention, threads)
        return found

    def release(self, workspace: _Workspace) -> None:
        """Keep buffers for the next batch, unless they are larger than batches usually are."""
        if workspace.rows <= _KEPT_ROWS:
            self._spare.append(workspace)


class _Pass:
    """One batch on its way through the network."""

    def __init__(
        self, network: Fused, token_ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None, firsts: bool
    ) -> None:
        self._n, self._token_ids, self._token_types = network, token_ids, token_types
        self._k: Any = _kernels()
        total = len(token_ids)
        bounds = cu_seqlens.numpy()
        self._text_starts, self._text_lengths = bounds[:-1], np.diff(bounds)
        self._starts = np.repeat(self._text_starts, self._text_lengths)
        self._lengths = np.repeat(self._text_lengths, self._text_lengths)
        self._turns = network.turns(int(self._text_lengths.max()))
        threads = torch.get_num_threads()
        self._threads = 1 if total < _FEW else threads
        self._parts = _row_parts(total, self._threads)
        self._firsts = firsts
        texts = len(self._text_starts)
        self._out = torch.empty(texts if firsts else total, network._width)
        self._w = network.workspace(self._parts[-1].stop if self._parts else 0, self._threads)

    def run(self) -> Tensor:
        """Return the hidden states of the last layer."""
        phases = [_Phase(self._parts, self._embed)]
        attention = self._attention_parts()
        last = len(self._n._layers) - 1
        for number in range(last + 1):
            if number == last and self._firsts:
                texts = _row_parts(len(self._text_starts), self._threads, rounded=False)
                phases.append(_Phase(texts, self._last_of_firsts))
            else:
                phases.append(_Phase(attention, self._attend))
                phases.append(_Phase(self._parts, self._rows_of(number)))
        if self._threads == 1:
            for parts, do in phases:
                for part in parts:
                    do(part, 0)
        else:
            _TEAM.run(phases, self._threads)
        if not self._firsts:
            self._out.copy_(self._w.hidden.tensor[: len(self._out)])
        self._n.release(self._w)  # not after an error: a thread may still be writing
        return self._out

    # Rows

    def _embed(self, rows: slice, thread: int) -> None:
        n, w = self._n, self._w
        real = slice(rows.start, min(rows.stop, len(self._token_ids)))
        hidden = w.hidden.tensor[real]
        hidden.copy_(n._words[self._token_ids[real]])
        n.add_types(hidden, None if self._token_types is None else self._token_types[real])
        self._normalise(n._nothing, n._no_size, n._no_size, n._first_norm, real)
        self._project(0, rows, real)

    def _rows_of(self, number: int) -> Callable[[slice, int], None]:
        def rows_after_attention(rows: slice, thread: int) -> None:
            w = self._w
            real = slice(rows.start, min(rows.stop, len(self._token_ids)))
            self._transform(number, w.mixed.tensor[rows], w.mixed.array[rows], w, rows, real, thread)
            if number + 1 < len(self._n._layers):
                self._project(number + 1, rows, real)

        return rows_after_attention

    def _transform(
        self, number: int, mixed: Tensor, mixed_array: Array, w: _Workspace, rows: slice, real: slice, thread: int
    ) -> None:
        """Apply what comes after a layer's attention to rows; those behind `real` only fill up."""
        n, layer = self._n, self._n._layers[number]
        count, used = rows.stop - rows.start, real.stop - real.start
        middle, low, size = w.scratch[thread]
        if n._eight:
            self._k.level(mixed_array[:used], low.array[:used], size[:used])
            product = layer.o(low.tensor[:count])
            self._normalise(product, size, layer.o.bias, layer.attention_norm, real, w)
        else:
            product = layer.o(mixed)
            self._normalise(product, n._no_size, layer.o.bias, layer.attention_norm, real, w)
        gate = layer.gate(w.low.tensor[rows])
        up = gate if layer.up is None else layer.up(w.low.tensor[rows])
        skipped = layer.width - layer.plain if n._eight else 0
        sizes = w.size[real] if n._eight else n._no_size
        gated = middle.rows(count, layer.width)
        self._k.gate(up, gate, skipped, layer.width, layer.plain, sizes, gated.array[:used], size)
        product = layer.down(gated.tensor)
        self._normalise(product, size if n._eight else n._no_size, layer.down.bias, layer.mlp_norm, real, w)

    def _normalise(
        self,
        product: Array,
        size: Array,
        bias: Array,
        norm: tuple[Array, Array, np.float32],
        real: slice,
        w: Any = None,  # noqa: ANN401
    ) -> None:
        w = self._w if w is None else w
        out = w.low.array[real] if w.low is not w.hidden else self._n._nothing
        self._k.normalise(product, size, bias, w.hidden.array[real], *norm, out, w.size[real])

    def _project(self, number: int, rows: slice, real: slice) -> None:
        """Make queries, keys and values of rows for a layer."""
        n, w = self._n, self._w
        layer = n._layers[number]
        projection, parts = layer.qkv, 3
        if self._firsts and number == len(n._layers) - 1 and layer.kv is not None:
            projection, parts = layer.kv, 2
        product = projection(w.low.tensor[rows])[: real.stop - real.start]
        size = w.size[real] if n._eight else n._no_size
        self._k.turn(
            product, size, projection.bias, self._turns, real.start, self._starts, self._lengths, parts, n._heads,
            w.blocks.array,
        )  # fmt: skip

    # Attention

    def _attention_parts(self) -> list[list[_Scores]]:
        """Cut the attention of a layer into parts of about equal cost."""
        heads, calls, costs = self._n._heads, [], []
        for start, length in zip(self._text_starts.tolist(), self._text_lengths.tolist(), strict=True):
            queries = length if length <= self._n.short else min(length, _QUERIES)
            together = heads if length <= self._n.short else max(1, min(heads, _SCORES // (queries * length)))
            for head in range(0, heads, together):
                for query in range(0, length, queries):
                    call = _Scores(
                        start,
                        length,
                        slice(head, min(head + together, heads)),
                        slice(query, min(query + queries, length)),
                    )
                    calls.append(call)
                    costs.append((call.heads.stop - head) * (call.queries.stop - query) * (length + 32))
        fair = sum(costs) / (8 * self._threads)
        parts: list[list[_Scores]] = [[]]
        cost = 0
        for call, its in zip(calls, costs, strict=True):
            if cost >= fair:
                parts.append([])
                cost = 0
            parts[-1].append(call)
            cost += its
        return parts

    def _attend(self, calls: list[_Scores], thread: int) -> None:
        n, w = self._n, self._w
        depth = n._width // n._heads
        for start, length, heads, queries in calls:
            if length <= n.short:
                self._k.attend(w.blocks.array, start, length, n._heads, n._scale, w.mixed.array)
                continue
            q, k, v = (
                part[start * n._width : (start + length) * n._width].view(n._heads, length, depth)[heads]
                for part in w.blocks.tensor
            )
            scores = torch.bmm(q[:, queries], k.transpose(1, 2))
            self._k.softmax(_array(scores).reshape(-1, length), n._scale)
            mixed = torch.bmm(scores, v)
            self._k.collect(_array(mixed), start + queries.start, heads.start, w.mixed.array)

    def _last_of_firsts(self, texts: slice, thread: int) -> None:
        """Apply the last layer to the first tokens of some texts."""
        n, w = self._n, self._w
        layer = n._layers[-1]
        assert layer.q is not None
        starts = self._text_starts[texts]
        places = torch.from_numpy(starts)
        count = texts.stop - texts.start
        own = _Workspace(count, n._width, layer.width, n._low, n._attention, 1)
        own.hidden.tensor.copy_(w.hidden.tensor[places])
        low = w.low.tensor[places]
        size = w.size[starts] if n._eight else n._no_size
        self._k.attend_firsts(
            layer.q(low), size, layer.q.bias, w.blocks.array, starts, self._text_lengths[texts], n._heads, n._scale,
            own.mixed.array,
        )  # fmt: skip
        rows = slice(0, count)
        self._transform(len(n._layers) - 1, own.mixed.tensor, own.mixed.array, own, rows, rows, 0)
        self._out[texts] = own.hidden.tensor


def _row_parts(rows: int, threads: int, rounded: bool = True) -> list[slice]:
    """Cut rows into parts of at most `_ROWS`, as many for each thread, rounded up so that the last may end behind the rows."""
    if threads == 1 and rows <= max(_ROWS, _FEW):
        return [slice(0, rows)] if rows else []
    count = -(-rows // (_ROWS * threads)) * threads
    step = -(-rows // count)
    if rounded:
        step = -(-step // _STEP) * _STEP
    return [slice(start, start + step if rounded else min(start + step, rows)) for start in range(0, rows, step)]
