"""The GTE network on packed tokens, top to bottom.

A post-LayerNorm encoder with rotary positions and a gated MLP (mGTE, arXiv:2407.19669, section 3.1). All tokens of a
batch lie in one long sequence of T rows; only attention needs to know where a text begins and ends. So nothing is ever
padded, and a text's result does not depend on what else is in the batch.

Axes: T tokens, C hidden_size, H heads, D head_dim, F intermediate_size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from gte_rag.config import GTEConfig


class Rotary(nn.Module):
    """Rotary positions: cosines and sines for the first positions, grown on demand."""

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.inverse_frequencies = config.inverse_frequencies()
        self._table = torch.empty(2, 0, config.head_dim)

    def table(self, length: int, like: Tensor) -> Tensor:
        """Return cosines and sines of positions 0 … length - 1 on the device and in the dtype of `like`: (2, length, D).

        Angles are rounded to float32 as in the reference; see `GTEConfig.inverse_frequencies`.
        """
        table = self._table  # one read: another thread may replace it by a longer one
        if table.shape[1] < length or table.device != like.device or table.dtype != like.dtype:
            grown = max(length, min(2 * table.shape[1], 8192), 512)
            angles = torch.arange(grown, dtype=torch.float32)[:, None] * self.inverse_frequencies
            angles = torch.cat([angles, angles], dim=-1)
            table = torch.stack([angles.cos(), angles.sin()]).to(like)
            self._table = table
        return table[:, :length]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys (T, H, D) by their positions; channel i is paired with channel i + D / 2."""
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-right, left], dim=-1) * sin


class Attention(nn.Module):
    """Multi-head self-attention within each text of a packed batch."""

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.num_heads, self.head_dim = config.num_heads, config.head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        """Mix the tokens of each text: (T, C) -> (T, C).

        Memory is linear in the length of a text: the attention kernels never form the full matrix of scores.
        """
        qkv = self.qkv_proj(hidden).view(len(hidden), 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(1)  # each (T, H, D)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        mixed = torch.empty_like(query)
        start = 0
        for length, texts in _runs(lengths):
            part = slice(start, start + length * texts)
            start = part.stop
            q, k, v = (
                x[part].view(texts, length, self.num_heads, self.head_dim).transpose(1, 2) for x in (query, key, value)
            )
            out = functional.scaled_dot_product_attention(q, k, v)  # (texts, H, length, D)
            mixed[part] = out.transpose(1, 2).reshape(-1, self.num_heads, self.head_dim)
        projected: Tensor = self.o_proj(mixed.view(hidden.shape))
        return projected


def _runs(lengths: list[int]) -> list[tuple[int, int]]:
    """Group neighbouring texts of equal length: [7, 7, 3] -> [(7, 2), (3, 1)]."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][0] == length:
            runs[-1] = (length, runs[-1][1] + 1)
        else:
            runs.append((length, 1))
    return runs


class GatedMLP(nn.Module):
    """``down(gelu(gate) * up)``; the packed projection holds the rows of up first, then those of gate."""

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.up_gate_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each token by itself: (T, C) -> (T, C)."""
        up, gate = self.up_gate_proj(hidden).chunk(2, dim=-1)  # each (T, F)
        transformed: Tensor = self.down_proj(functional.gelu(gate) * up)
        return transformed


class Layer(nn.Module):
    """Attention and MLP, each followed by the residual sum and then LayerNorm."""

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.attn_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = GatedMLP(config)
        self.mlp_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, lengths: list[int]) -> Tensor:
        """Apply the layer: (T, C) -> (T, C)."""
        hidden = self.attn_ln(hidden + self.attention(hidden, cos, sin, lengths))
        normed: Tensor = self.mlp_ln(hidden + self.mlp(hidden))
        return normed


class GTEModel(nn.Module):
    """Word embeddings, LayerNorm, layers. Parameter names are the original repositories' without prefix."""

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

    def forward(self, token_ids: Tensor, cu_seqlens: Tensor, token_types: Tensor | None = None) -> Tensor:
        """Compute the hidden state of every token of a packed batch.

        Args:
            token_ids: int64, shape (T,), on the device of the weights.
            cu_seqlens: int64, shape (texts + 1,), on the CPU: text j lies at ``cu_seqlens[j]:cu_seqlens[j + 1]``.
            token_types: Rows of the token-type table, int64, shape (T,); None is row 0 everywhere.

        Returns:
            Hidden states of the last layer, shape (T, C), in the dtype of the weights.
        """
        lengths: list[int] = cu_seqlens.diff().tolist()
        hidden = self.word_embeddings(token_ids)  # (T, C)
        if self.token_type_embeddings is not None:
            table = self.token_type_embeddings
            hidden = hidden + (table.weight[0] if token_types is None else table(token_types))
        hidden = self.embeddings_ln(hidden)
        positions = torch.cat([torch.arange(length) for length in lengths]).to(token_ids.device)
        cos, sin = self.rotary.table(max(lengths), hidden)[:, positions].unsqueeze(2)  # each (T, 1, D)
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, lengths)
        last: Tensor = hidden
        return last
