"""The architecture of a checkpoint, read from its ``config.json``.

Two dialects describe the same network: the original repositories' (``model_type: "new"``) and that of `transformers`
(``model_type: "gte"``). Both become one frozen `GTEConfig`; anything the network here cannot run is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gte_rag.errors import CheckpointError

# The paper trained every multiple of 32 as an elastic dimension (arXiv:2407.19669, section 3.3).
_SMALLEST_DIMENSION = 32
_LARGEST = float(torch.finfo(torch.float32).max)
# The largest sizes that are believed: far above every model of the family, and small enough to be refused by the weights'
# shapes instead of running out of memory or time before anything was compared.
_LARGEST_SIZES = {
    "vocab_size": 2**24,
    "hidden_size": 2**16,
    "num_attention_heads": 2**16,
    "num_hidden_layers": 256,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**20,
    "type_vocab_size": 2**16,
    "pad_token_id": 2**24,
}


@dataclass(frozen=True)
class RotaryScaling:
    """How the rotary frequencies are stretched for long texts.

    Attributes:
        kind: ``"none"``, ``"linear"`` (every frequency divided by `factor`) or ``"ntk"`` (the reference's fixed or mixed
            scaling, https://kexue.fm/archives/9706).
        factor: The stretch, at least 1.
        mixed_b: Exponent of the mixed variant of ``"ntk"``; None for the fixed one.
    """

    kind: str = "none"
    factor: float = 1.0
    mixed_b: float | None = None


@dataclass(frozen=True)
class GTEConfig:
    """Shape and constants of a GTE encoder.

    Attributes:
        vocab_size: Number of rows of the word embedding table.
        hidden_size: Width of the hidden states, the largest dense dimension.
        num_layers: Number of transformer layers.
        num_heads: Attention heads per layer; the head dimension is ``hidden_size / num_heads``.
        intermediate_size: Width of the gated MLP.
        max_position_embeddings: The longest text in tokens, special tokens included.
        type_vocab_size: Rows of the token-type table; row 0 is always added. 0: there is no such table.
        layer_norm_eps: Added to the variance inside LayerNorm.
        pad_token_id: Id of the padding token; it never carries sparse weight.
        rope_theta: Base of the rotary frequencies, before scaling.
        rope_scaling: How the frequencies are stretched.
        matryoshka_dimensions: Dense dimensions the checkpoint says it was trained for; empty when it does not say.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_position_embeddings: int = 8192
    type_vocab_size: int = 1
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 1
    rope_theta: float = 160_000.0
    rope_scaling: RotaryScaling = field(default_factory=RotaryScaling)
    matryoshka_dimensions: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def min_dimension(self) -> int:
        """The smallest dense dimension worth cutting to."""
        return min(self.matryoshka_dimensions, default=min(_SMALLEST_DIMENSION, self.hidden_size))

    def inverse_frequencies(self) -> Tensor:
        """Return the rotary angle per position of each pair of channels: float32, shape (head_dim / 2,).

        ``"ntk"`` follows the reference, which is neither plain theta * factor nor the usual NTK-aware formula: with d the
        head dimension, ``1 / (theta * factor) ** (2i / d) / factor ** (2 / d)``; with `mixed_b`,
        ``1 / theta ** (2i / d) / exp(a * m ** mixed_b)``, ``a = ln(factor) / (d / 2) ** mixed_b``, m = 1 … d / 2. It applies
        at every position, not only beyond a trained length.

        The order of the float32 operations is the reference's. It matters: one unit in the last place here turns the
        position 8,000 by 5e-4, and the weights were trained with the rounded angles.
        """
        dim, scaling = self.head_dim, self.rope_scaling
        theta, factor = self.rope_theta, scaling.factor
        exponents = torch.arange(0, dim, 2, device="cpu").float() / dim
        if scaling.kind == "ntk" and scaling.mixed_b is None:
            theta *= factor
        frequencies: Tensor = 1.0 / theta**exponents
        if scaling.kind == "linear":
            frequencies /= factor
        elif scaling.kind == "ntk" and scaling.mixed_b is None:
            frequencies /= factor ** (2 / dim)
        elif scaling.kind == "ntk" and scaling.mixed_b is not None:
            a = math.log(factor) / (dim / 2) ** scaling.mixed_b
            frequencies /= (a * torch.arange(1, dim // 2 + 1, device="cpu").float() ** scaling.mixed_b).exp()
        return frequencies

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> GTEConfig:
        """Read either dialect of ``config.json``.

        Raises:
            CheckpointError: The model is of another type, sets an option this network does not have, or lacks a key.
        """
        model_type = raw.get("model_type")
        if model_type not in ("new", "gte"):
            raise CheckpointError(
                f"config.json says model_type {model_type!r}; this package runs the GTE architecture only "
                "('new' in the original repositories, 'gte' in transformers)"
            )
        _refuse_unsupported(raw)
        hidden_size, num_heads = _positive(raw, "hidden_size"), _positive(raw, "num_attention_heads")
        if hidden_size % num_heads or (hidden_size // num_heads) % 2:
            raise CheckpointError(
                f"config.json: hidden_size {hidden_size} does not split into {num_heads} heads of an even width"
            )
        if raw.get("head_dim") not in (None, hidden_size // num_heads):
            raise CheckpointError(
                f"config.json sets head_dim {raw['head_dim']!r}; it must be hidden_size / num_attention_heads"
            )
        theta, scaling = _rotary(raw, native=model_type == "gte")
        return cls(
            vocab_size=_positive(raw, "vocab_size"),
            hidden_size=hidden_size,
            num_layers=_positive(raw, "num_hidden_layers"),
            num_heads=num_heads,
            intermediate_size=_positive(raw, "intermediate_size"),
            max_position_embeddings=_positive(raw, "max_position_embeddings", 8192),
            type_vocab_size=_positive(raw, "type_vocab_size", 1, least=0),
            layer_norm_eps=_number(raw.get("layer_norm_eps", 1e-12), "layer_norm_eps"),
            pad_token_id=_positive(raw, "pad_token_id", 1 if model_type == "gte" else 0, least=0),
            rope_theta=theta,
            rope_scaling=scaling,
            matryoshka_dimensions=_dimensions(raw.get("matryoshka_dimensions") or (), hidden_size),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the native (`transformers`) ``config.json`` of this architecture.

        Raises:
            ValueError: The rotary scaling is the mixed one, which the native configuration cannot express.
        """
        scaling = self.rope_scaling
        if scaling.mixed_b is not None:
            raise ValueError("the native 'gte' configuration cannot express rope_scaling with mixed_b")
        theta, factor = self.rope_theta, scaling.factor
        if scaling.kind == "ntk":  # the same frequencies, written as linear scaling of a larger theta
            theta, factor = theta * factor, factor ** (2 / self.head_dim)
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
        if scaling.kind != "none":
            rope = {"rope_type": "linear", "rope_theta": theta, "factor": factor}
        raw: dict[str, Any] = {
            "model_type": "gte",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "intermediate_size": self.intermediate_size,
            "max_position_embeddings": self.max_position_embeddings,
            "type_vocab_size": self.type_vocab_size,
            "layer_norm_eps": self.layer_norm_eps,
            "pad_token_id": self.pad_token_id,
            "hidden_act": "gelu",
            "rope_parameters": rope,
            "attention_probs_dropout_prob": 0.0,
            "hidden_dropout_prob": 0.0,
            "classifier_dropout": 0.0,
            "tie_word_embeddings": False,
        }
        if self.matryoshka_dimensions:
            raw["matryoshka_dimensions"] = list(self.matryoshka_dimensions)
        return raw


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Refuse every option that would change the result and that this network does not implement."""
    accepted: dict[str, tuple[Any, ...]] = {
        "hidden_act": ("gelu",),
        "layer_norm_type": ("layer_norm",),
        "position_embedding_type": ("rope",),
        "logn_attention_scale": (False, "false"),
        "logn_attention_clip1": (False, "false"),
        "is_decoder": (False,),
    }
    for key, values in accepted.items():
        given = raw.get(key)
        if given is not None and given not in values:
            raise CheckpointError(f"config.json sets {key} to {given!r}; this network supports {values[0]!r} only")


def _rotary(raw: Mapping[str, Any], *, native: bool) -> tuple[float, RotaryScaling]:
    """Return theta and scaling from either dialect."""
    if native:
        given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        fallback = 160_000.0
    else:
        given = raw.get("rope_scaling") or {}
        fallback = 10_000.0
    if not isinstance(given, Mapping):
        raise CheckpointError(f"config.json: rotary scaling is {given!r}; it must be an object or null")
    theta = _number(given.get("rope_theta", raw.get("rope_theta", fallback)), "rope_theta")
    kind = given.get("rope_type", given.get("type"))
    if kind in (None, "default"):
        return theta, RotaryScaling()
    if kind not in ("linear", "ntk"):
        raise CheckpointError(f"config.json: rotary scaling {kind!r} is not supported; 'linear', 'ntk' and none are")
    factor = _number(given.get("factor"), "the factor of the rotary scaling")
    mixed_b = given.get("mixed_b")
    return theta, RotaryScaling(kind, factor, None if mixed_b is None else _number(mixed_b, "mixed_b"))


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= _LARGEST:
        raise CheckpointError(f"config.json: {name} is {value!r}; it must be a number greater than 0")
    return float(value)


def _positive(raw: Mapping[str, Any], key: str, default: int | None = None, *, least: int = 1) -> int:
    value = raw.get(key)
    if value is None:
        value = default
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise CheckpointError(f"config.json: {key} is {value!r:.80}; it must be a whole number of at least {least}")
    if value > _LARGEST_SIZES[key]:
        raise CheckpointError(f"config.json: {key} is {value!r:.40}; it must be at most {_LARGEST_SIZES[key]:,}")
    return value


def _dimensions(given: object, hidden_size: int) -> tuple[int, ...]:
    if not isinstance(given, (list, tuple)) or not all(
        isinstance(dim, int) and not isinstance(dim, bool) and 1 <= dim <= hidden_size for dim in given
    ):
        raise CheckpointError(
            f"config.json: matryoshka_dimensions is {given!r}; it must list whole numbers from 1 to {hidden_size}"
        )
    return tuple(sorted(given))
