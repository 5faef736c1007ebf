"""A slow, plain float64 encoder: the oracle that the fast one is compared with.

It shares no code with the package. One text at a time, one attention head at a time, no batching and no
padding, so that each step can be checked by eye against the description of the network.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_erf = np.vectorize(math.erf, otypes=[np.float64])


class ReferenceEncoder:
    """The encoder of one checkpoint, computed in float64.

    Reads every known layout: legacy keys (packed or separate q, k, v) and native ``transformers`` keys, each
    with or without the prefix of its head class.

    Attributes:
        config: The checkpoint's ``config.json``.
        inverse_frequencies: Rotary frequencies in radians per position, shape (head_dim / 2,).
        classifier_weight: Weight of the token classifier, shape (1, hidden_size), or None without a head.
        classifier_bias: Bias of the token classifier, shape (1,), or None without a head.
    """

    def __init__(self, config: Mapping[str, Any], weights: Mapping[str, NDArray[Any]]) -> None:
        """Takes over the weights as float64.

        Args:
            config: The content of ``config.json``, legacy or native.
            weights: All tensors of the checkpoint, by their key in the file.
        """
        self.config = dict(config)
        self._weights = {_without_prefix(key): np.asarray(w, dtype=np.float64) for key, w in weights.items()}
        self._native = "layers.0.self_attn.q_proj.weight" in self._weights
        self._heads = int(config["num_attention_heads"])
        self._head_dim = int(config["hidden_size"]) // self._heads
        self._eps = float(config["layer_norm_eps"])
        self.inverse_frequencies = inverse_frequencies(config, self._head_dim)
        self.classifier_weight = self._weights.get("classifier.weight")
        self.classifier_bias = self._weights.get("classifier.bias")

    def __call__(self, token_ids: Sequence[int]) -> Array:
        """Runs one text through the network.

        Args:
            token_ids: The n token ids of the text, special tokens included.

        Returns:
            The last hidden states, shape (n, hidden_size).
        """
        hidden = self._weights["embeddings.word_embeddings.weight"][list(token_ids)]
        if self.config["type_vocab_size"] > 0:
            hidden = hidden + self._weights["embeddings.token_type_embeddings.weight"][0]
        hidden = self._layer_norm(hidden, "embeddings.LayerNorm")
        for i in range(self.config["num_hidden_layers"]):
            hidden = self._layer(hidden, i)
        return hidden

    def _layer(self, hidden: Array, i: int) -> Array:
        if self._native:
            layer, attention = f"layers.{i}", f"layers.{i}.self_attn"
            norms = (f"{layer}.post_attention_layernorm", f"{layer}.post_mlp_layernorm")
        else:
            layer, attention = f"encoder.layer.{i}", f"encoder.layer.{i}.attention"
            norms = (f"{layer}.attn_ln", f"{layer}.mlp_ln")

        attended = self._attention(*self._query_key_value(hidden, attention))
        hidden = self._layer_norm(hidden + self._linear(attended, f"{attention}.o_proj"), norms[0])

        up, gate = self._up_and_gate(hidden, f"{layer}.mlp")
        down = self._linear(gelu(gate) * up, f"{layer}.mlp.down_proj")
        return self._layer_norm(hidden + down, norms[1])

    def _query_key_value(self, hidden: Array, attention: str) -> tuple[Array, Array, Array]:
        if f"{attention}.qkv_proj.weight" in self._weights:
            packed = self._linear(hidden, f"{attention}.qkv_proj")
            size = hidden.shape[1]
            return packed[:, :size], packed[:, size : 2 * size], packed[:, 2 * size :]
        query = self._linear(hidden, f"{attention}.q_proj")
        key = self._linear(hidden, f"{attention}.k_proj")
        value = self._linear(hidden, f"{attention}.v_proj")
        return query, key, value

    def _up_and_gate(self, hidden: Array, mlp: str) -> tuple[Array, Array]:
        if self._native:
            return self._linear(hidden, f"{mlp}.up_proj"), self._linear(hidden, f"{mlp}.gate_proj")
        packed = self._linear(hidden, f"{mlp}.up_gate_proj")
        half = packed.shape[1] // 2
        return packed[:, :half], packed[:, half:]

    def _attention(self, query: Array, key: Array, value: Array) -> Array:
        attended = np.empty_like(query)
        for head in range(self._heads):
            columns = slice(head * self._head_dim, (head + 1) * self._head_dim)
            q = rotate(query[:, columns], self.inverse_frequencies)
            k = rotate(key[:, columns], self.inverse_frequencies)
            attended[:, columns] = softmax(q @ k.T / math.sqrt(self._head_dim)) @ value[:, columns]
        return attended

    def _linear(self, x: Array, name: str) -> Array:
        y: Array = x @ self._weights[f"{name}.weight"].T
        if f"{name}.bias" in self._weights:
            y = y + self._weights[f"{name}.bias"]
        return y

    def _layer_norm(self, x: Array, name: str) -> Array:
        centred = x - x.mean(axis=1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(axis=1, keepdims=True) + self._eps)
        y: Array = centred / deviation * self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]
        return y


def _without_prefix(key: str) -> str:
    for prefix in ("new.", "gte."):
        if key.startswith(prefix):
            return key[len(prefix) :]
    return key


def gelu(x: Array) -> Array:
    """Gaussian error linear unit, the exact form with erf; elementwise."""
    y: Array = 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))
    return y


def softmax(scores: Array) -> Array:
    """Softmax over the last axis."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    probabilities: Array = exponentials / exponentials.sum(axis=-1, keepdims=True)
    return probabilities


def rotate(x: Array, frequencies: Array) -> Array:
    """Turns the queries or keys of one head by the angle of their position.

    Component i is paired with component i + head_dim / 2.

    Args:
        x: One row per position, shape (n, head_dim).
        frequencies: Radians per position, shape (head_dim / 2,).

    Returns:
        The rotated rows, shape (n, head_dim).
    """
    rotated = np.empty_like(x)
    half = x.shape[1] // 2
    for i, frequency in enumerate(frequencies):
        angle = np.arange(len(x)) * frequency
        rotated[:, i] = x[:, i] * np.cos(angle) - x[:, i + half] * np.sin(angle)
        rotated[:, i + half] = x[:, i + half] * np.cos(angle) + x[:, i] * np.sin(angle)
    return rotated


def inverse_frequencies(config: Mapping[str, Any], head_dim: int) -> Array:
    """Rotary frequencies that a configuration asks for.

    Args:
        config: The content of ``config.json``: native with ``rope_parameters``, else legacy with
            ``rope_theta`` and ``rope_scaling``.
        head_dim: Size of one attention head, even.

    Returns:
        Radians per position, shape (head_dim / 2,), highest first.

    Raises:
        ValueError: The scaling is none of those of the model family.
    """
    if config.get("rope_parameters"):
        scaling = config["rope_parameters"]
        theta, kind = float(scaling["rope_theta"]), scaling["rope_type"]
    else:
        scaling = config.get("rope_scaling") or {}
        theta, kind = float(config["rope_theta"]), scaling.get("type", "default")

    if kind == "default":
        return _plain_frequencies(theta, head_dim)
    factor = float(scaling["factor"])
    frequencies: Array
    if kind == "linear":
        frequencies = _plain_frequencies(theta, head_dim) / factor
    elif kind == "ntk" and scaling.get("mixed_b") is None:
        frequencies = _plain_frequencies(theta * factor, head_dim) / factor ** (2 / head_dim)
    elif kind == "ntk":
        b = float(scaling["mixed_b"])
        a = math.log(factor) / (head_dim / 2) ** b
        stretch = [math.exp(a * m**b) for m in range(1, head_dim // 2 + 1)]
        frequencies = _plain_frequencies(theta, head_dim) / np.array(stretch)
    else:
        raise ValueError(f"rotary scaling is {kind!r}; the reference knows 'default', 'linear' and 'ntk'")
    return frequencies


def _plain_frequencies(theta: float, head_dim: int) -> Array:
    return np.array([theta ** (-2 * i / head_dim) for i in range(head_dim // 2)])


def dense(hidden: Array, dimension: int) -> Array:
    """Dense vector of a text: the first token's state, cut first and normalised then.

    Args:
        hidden: Last hidden states, shape (n, hidden_size).
        dimension: Components to keep.

    Returns:
        A vector of unit length, shape (dimension,).
    """
    first = hidden[0, :dimension]
    unit: Array = first / np.sqrt((first**2).sum())
    return unit


def token_weights(hidden: Array, classifier_weight: ArrayLike, classifier_bias: ArrayLike) -> Array:
    """Weight of each token of a text, repeated and special tokens included.

    Args:
        hidden: Last hidden states, shape (n, hidden_size).
        classifier_weight: Shape (1, hidden_size).
        classifier_bias: Shape (1,).

    Returns:
        Weights of at least 0, shape (n,).
    """
    weight = np.asarray(classifier_weight, dtype=np.float64)
    bias = np.asarray(classifier_bias, dtype=np.float64)
    weights: Array = np.maximum(hidden @ weight[0] + bias[0], 0.0)
    return weights


def sparse(
    hidden: Array,
    token_ids: Sequence[int],
    classifier_weight: ArrayLike,
    classifier_bias: ArrayLike,
    special_ids: Collection[int],
) -> dict[int, float]:
    """Sparse vector of a text.

    Args:
        hidden: Last hidden states, shape (n, hidden_size).
        token_ids: The n token ids.
        classifier_weight: Shape (1, hidden_size).
        classifier_bias: Shape (1,).
        special_ids: Ids that never enter the vector.

    Returns:
        The largest weight of each token id whose weight is above 0.
    """
    weights = token_weights(hidden, classifier_weight, classifier_bias)
    vector: dict[int, float] = {}
    for token, weight in zip(token_ids, weights, strict=True):
        if token not in special_ids and weight > vector.get(token, 0.0):
            vector[token] = float(weight)
    return vector


def sparse_dot(a: Mapping[int, float], b: Mapping[int, float]) -> float:
    """Sparse score: the sum over shared tokens of the products of their weights."""
    return sum(weight * b[token] for token, weight in a.items() if token in b)
