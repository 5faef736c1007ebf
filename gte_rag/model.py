"""The GTE network on packed tokens, top to bottom.

A post-LayerNorm encoder with rotary positions and a gated MLP (mGTE, arXiv:2407.19669, section 3.1). All tokens of a
batch lie in one long sequence of T rows; only attention needs to know where a text begins and ends. So nothing is ever
padded, and a text's result does not depend on what else is in the batch.

This is the plain form, which runs on every device. `gte_rag.precision` replaces `Linear` and `GatedMLP` by forms that are
faster on a CPU; everything else is shared. Where numba is installed, `gte_rag.fused` takes the place of the whole forward pass.

Axes: T tokens, C hidden_size, H heads, D head_dim, F intermediate_size.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from gte_rag.config import GTEConfig

# Rows that pass through the layers' products together. Their widest activation, (512, 2F), stays near the cores, and
# memory that is small enough for the allocator to keep is not handed back to the system and zeroed again at every layer.
_ROWS = 512
# Attention in bfloat16 on a CPU: queries of two heads that are scored together, and the shortest text for which forming
# the scores by two matrix products is faster than the fused kernel in float32.
_QUERIES, _HEADS, _LONG = 256, 2, 128


class Rotary(nn.Module):
    """Rotary positions as complex numbers of length 1, for the first positions, grown on demand."""

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.inverse_frequencies = config.inverse_frequencies()
        self._table = torch.empty(0, config.head_dim // 2, dtype=torch.complex64)

    def table(self, length: int, device: torch.device) -> Tensor:
        """Return the turns of positions 0 … length - 1: complex64, (length, D / 2).

        Angles are rounded to float32 as in the reference; see `GTEConfig.inverse_frequencies`.
        """
        table = self._table  # one read: another thread may replace it by a longer one
        if len(table) < length or table.device != device:
            grown = max(length, min(2 * len(table), 8192), 512)
            angles = torch.arange(grown, dtype=torch.float32)[:, None] * self.inverse_frequencies
            table = torch.complex(angles.cos(), angles.sin()).to(device)
            self._table = table
        return table[:length]


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn queries or keys (T, H, D) by their positions, in float32 and in place if they are float32.

    Channels 2i and 2i + 1 are a pair. The checkpoints pair i with i + D / 2; `pair_channels` reorders their weights once,
    so that a turn is one complex product, which takes a fifth of the time.
    """
    turned = x.float()
    torch.view_as_complex(turned.view(*x.shape[:-1], -1, 2)).mul_(turns)
    return turned.to(x.dtype)


def pair_channels(packed: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a packed q, k, v weight (3C, …) or bias (3C,): in q and k, channel i + D / 2 goes beside i."""
    rows = packed.reshape(3, num_heads, 2, -1, *packed.shape[1:])  # (3, H, 2, D / 2, …)
    paired = rows.transpose(2, 3).flatten(0, 3)
    return torch.cat([paired[: 2 * len(packed) // 3], packed[2 * len(packed) // 3 :]])


class Packing:
    """Where the texts of a batch lie, and the buffers its layers share.

    Attributes:
        lengths: Tokens of each text.
        starts: Row of each text's first token, int64, shape (texts,), on the device of the weights.
        runs: Neighbouring texts of equal length: (first row, length, number of texts).
        turns: Rotary turn of each row, complex64, shape (T, 1, D / 2).
    """

    def __init__(self, cu_seqlens: Tensor, rotary: Rotary, device: torch.device) -> None:
        self.lengths: list[int] = cu_seqlens.diff().tolist()
        self.starts = cu_seqlens[:-1].to(device)
        self.cu_seqlens = cu_seqlens.to(device, torch.int32)
        self.runs = runs(self.lengths)
        table = rotary.table(max(self.lengths), device)
        pieces = [table[:length] for length in self.lengths]
        self.turns = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).unsqueeze(1)
        self._buffers: dict[tuple[int, torch.dtype], Tensor] = {}

    def buffer(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Return a matrix with arbitrary content, the same one at every layer."""
        key = (columns, like.dtype)
        if key not in self._buffers or len(self._buffers[key]) < rows:
            self._buffers[key] = like.new_empty(rows, columns)
        return self._buffers[key][:rows]


def runs(lengths: list[int]) -> list[tuple[int, int, int]]:
    """Group neighbouring texts of equal length: [7, 7, 3] -> [(0, 7, 2), (14, 3, 1)], each (first row, length, texts)."""
    grouped: list[tuple[int, int, int]] = []
    row = 0
    for length in lengths:
        if grouped and grouped[-1][1] == length:
            grouped[-1] = (grouped[-1][0], length, grouped[-1][2] + 1)
        else:
            grouped.append((row, length, 1))
        row += length
    return grouped


def _chunks(rows: int, device: torch.device) -> Iterator[slice]:
    step = _ROWS if device.type == "cpu" else rows
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


class Linear(nn.Linear):
    """A linear map of rows that can add its result to a residual."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute ``x @ weight.T + bias (+ residual)``: (T, in) -> (T, out)."""
        out = functional.linear(x, self.weight, self.bias)
        return out if residual is None else out.add_(residual)

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Linear:
        """Return the map with these weights, (out, in) and (out,), which it shares."""
        made = cls(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        made.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=False)
        return made

    def rows(self, start: int, stop: int) -> Linear:
        """Return the part that computes the output channels start … stop - 1; it shares this one's weights."""
        return Linear.of(self.weight[start:stop], None if self.bias is None else self.bias[start:stop])


class Attention(nn.Module):
    """Multi-head self-attention within each text of a packed batch, before the output projection."""

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv_proj: nn.Module = Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj: nn.Module = Linear(config.hidden_size, config.hidden_size)
        # The last layer's alone: the parts of qkv_proj, for when only the first tokens ask.
        self.q_proj: nn.Module | None = None
        self.kv_proj: nn.Module | None = None
        self.in_bfloat16 = False  # whether a CPU scores long texts in bfloat16

    def forward(self, hidden: Tensor, packing: Packing, firsts: bool = False) -> Tensor:
        """Mix the tokens of each text: (T, C) -> (T, C), or (texts, C) if only the first tokens ask.

        Memory is linear in the length of a text: the full matrix of scores is never formed.
        """
        heads = (self.num_heads, self.head_dim)
        if firsts and self.q_proj is not None and self.kv_proj is not None:
            query = self.q_proj(hidden[packing.starts]).view(-1, *heads)  # position 0 is not turned
            key, value = self._project(self.kv_proj, hidden, packing, 2)
            key = rotate(key, packing.turns)
        else:
            query, key, value = self._project(self.qkv_proj, hidden, packing, 3)
            query, key = rotate(query, packing.turns), rotate(key, packing.turns)
            if firsts:
                query = query[packing.starts]
        mixed = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if query.device.type == "cuda" and (varlen := _varlen()) and query.dtype != torch.float32:
            cu_queries = torch.arange(len(query) + 1, dtype=torch.int32, device=query.device) if firsts else None
            most = max(packing.lengths)
            out: Tensor = varlen(
                query,
                key,
                value,
                packing.cu_seqlens if cu_queries is None else cu_queries,
                packing.cu_seqlens,
                1 if firsts else most,
                most,
            )
            return out.reshape(len(query), -1)
        text = 0
        for start, length, texts in packing.runs:
            asked, per_text = (
                (slice(text, text + texts), 1) if firsts else (slice(start, start + length * texts), length)
            )
            rows = slice(start, start + length * texts)
            text += texts
            q = query[asked].view(texts, per_text, *heads).transpose(1, 2)  # (texts, H, length or 1, D)
            k, v = (x[rows].view(texts, length, *heads).transpose(1, 2) for x in (key, value))
            target = mixed[asked].view(texts, per_text, *heads).transpose(1, 2)
            if self.in_bfloat16 and length >= _LONG and not firsts:
                _attend_in_bfloat16(q, k, v, target)
            else:
                target.copy_(functional.scaled_dot_product_attention(q, k, v))
        return mixed.flatten(1)

    def split(self) -> None:
        """Make the parts of the packed projection available on their own."""
        packed = self.qkv_proj
        assert isinstance(packed, Linear)
        self.q_proj = packed.rows(0, packed.in_features)
        self.kv_proj = packed.rows(packed.in_features, packed.out_features)

    def _project(self, projection: nn.Module, hidden: Tensor, packing: Packing, parts: int) -> tuple[Tensor, ...]:
        """Return the parts of a packed projection, each (T, H, D)."""
        if len(hidden) <= _ROWS or hidden.device.type != "cpu":
            packed = projection(hidden)
        else:
            packed = packing.buffer(len(hidden), parts * hidden.shape[1], hidden)
            for rows in _chunks(len(hidden), hidden.device):
                packed[rows] = projection(hidden[rows])
        views: tuple[Tensor, ...] = packed.view(len(hidden), parts, self.num_heads, self.head_dim).unbind(1)
        return views


def _attend_in_bfloat16(query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> None:
    """Attend by plain products of blocks of scores; all (texts, H, length, D)."""
    texts, heads, length, width = query.shape
    scale = width**-0.5
    q, k, v = (
        torch.empty(query.shape, dtype=torch.bfloat16).copy_(x).view(texts * heads, length, width)
        for x in (query, key, value)
    )
    mixed = torch.empty_like(q)
    k = k.transpose(1, 2)
    together = max(_HEADS, texts * heads if length <= _QUERIES else 0)
    for head in range(0, texts * heads, together):
        of = slice(head, head + together)
        for start in range(0, length, _QUERIES):
            part = slice(start, start + _QUERIES)
            scores = torch.bmm(q[of, part], k[of]).mul_(scale)
            torch.bmm(torch.softmax(scores, dim=-1), v[of], out=mixed[of, part])
    out.copy_(mixed.view(texts, heads, length, width))


@cache
def _varlen() -> Callable[..., Any] | None:
    """Return torch's attention over texts of different lengths on CUDA, if this build has it."""
    try:
        found: Callable[..., Any] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except (ImportError, AttributeError):
        return None
    return found if torch.backends.cuda.is_flash_attention_available() else None


class GatedMLP(nn.Module):
    """``down(gelu(gate) * up)``; the packed projection holds the rows of up first, then those of gate.

    Attributes:
        plain: The first so many neurons have no row of up: it is 1 for every token.
    """

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.up_gate_proj = Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.plain = 0

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each token by itself and add the result to it: (T, C) -> (T, C)."""
        neurons = self.down_proj.in_features
        up, gate = self.up_gate_proj(hidden).split([neurons - self.plain, neurons], dim=-1)
        gated = functional.gelu(gate)
        gated[:, self.plain :].mul_(up)
        transformed: Tensor = self.down_proj(gated, hidden)
        return transformed

    def leave_out_constants(self, norm: nn.LayerNorm) -> None:
        """Spare what is the same for every token: rows of up that read only channels which the LayerNorm before holds constant.

        A network whose MLP had one branch before it was brought into this form has many (gte-mini, for one); others have none
        and stay as they are. Where up is 0 the neuron goes as well.
        """
        held = norm.weight == 0
        if not bool(held.any()):
            return
        up, gate = self.up_gate_proj.weight.chunk(2)
        fixed = ~up[:, ~held].any(dim=1)
        if not bool(fixed.any()):
            return
        value = up[:, held] @ norm.bias[held]  # (F,), where fixed
        plain = (fixed & (value != 0)).nonzero().squeeze(1)
        kept = torch.cat([plain, (~fixed).nonzero().squeeze(1)])
        if not len(kept):
            kept = kept.new_zeros(1)  # a product needs a column
        down = self.down_proj.weight[:, kept]
        down[:, : len(plain)] *= value[plain]
        self.plain = len(plain)
        self.up_gate_proj = Linear.of(torch.cat([up[kept[self.plain :]], gate[kept]]))
        self.down_proj = Linear.of(down, self.down_proj.bias)


class Layer(nn.Module):
    """Attention and MLP, each followed by the residual sum and then LayerNorm."""

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attn_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp: nn.Module = GatedMLP(config)
        self.mlp_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, packing: Packing, firsts: bool = False) -> Tensor:
        """Apply the layer: (T, C) -> (T, C), overwriting it; with `firsts` only to the first tokens: (texts, C)."""
        mixed = self.attention(hidden, packing, firsts)
        if firsts:
            hidden = hidden[packing.starts]
        if len(hidden) <= _ROWS:
            return self._after_attention(mixed, hidden)
        for rows in _chunks(len(hidden), hidden.device):
            hidden[rows] = self._after_attention(mixed[rows], hidden[rows])
        return hidden

    def _after_attention(self, mixed: Tensor, hidden: Tensor) -> Tensor:
        hidden = self.attn_ln(self.attention.o_proj(mixed, hidden))
        normed: Tensor = self.mlp_ln(self.mlp(hidden))
        return normed


class GTEModel(nn.Module):
    """Word embeddings, LayerNorm, layers. Parameter names are the original repositories' without prefix.

    Load the weights with `load`, which brings them into the order this network computes in.
    """

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.token_type_embeddings = (
            nn.Embedding(config.type_vocab_size, config.hidden_size) if config.type_vocab_size else None
        )
        self.embeddings_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.rotary = Rotary(config)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.packed_forward: Callable[[Tensor, Tensor, Tensor | None, bool], Tensor] | None = None

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take over the parameters of a checkpoint, all of them, by name; and let the last layer serve first tokens alone."""
        for name in weights:
            if ".qkv_proj." in name:
                weights[name] = pair_channels(weights[name], self.config.num_heads)
        self.load_state_dict(weights, assign=True)
        self.eval().requires_grad_(False)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            assert isinstance(layer.mlp, GatedMLP)
            layer.mlp.leave_out_constants(layer.attn_ln)
        last = self.layers[-1]
        assert isinstance(last, Layer)
        last.attention.split()

    def forward(
        self, token_ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None = None, *, firsts: bool = False
    ) -> Tensor:
        """Compute the hidden state of every token of a packed batch, or of the first token of every text.

        Args:
            token_ids: int64, shape (T,), on the device of the weights.
            cu_seqlens: int64, shape (texts + 1,), on the CPU: text j lies at ``cu_seqlens[j]:cu_seqlens[j + 1]``.
            token_types: Rows of the token-type table, int64, shape (T,); None is row 0 everywhere.
            firsts: Return first tokens only, for which the last layer computes nothing else.

        Returns:
            Hidden states of the last layer, float32, shape (T, C), or (texts, C) with `firsts`.
        """
        if self.packed_forward is not None:
            return self.packed_forward(token_ids, cu_seqlens, token_types, firsts)
        packing = Packing(cu_seqlens, self.rotary, token_ids.device)
        dtype = self.embeddings_ln.weight.dtype
        hidden = self.word_embeddings(token_ids).to(dtype)  # (T, C); the table may be kept in a smaller dtype
        if self.token_type_embeddings is not None:
            table = self.token_type_embeddings.weight
            hidden = hidden.add_(table[0] if token_types is None else table[token_types])
        hidden = self.embeddings_ln(hidden)
        for layer in self.layers[:-1]:
            hidden = layer(hidden, packing)
        last: Tensor = self.layers[-1](hidden, packing, firsts)
        return last.float()
