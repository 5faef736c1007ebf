"""The arithmetic of the network: which precision to use here, and the fast forms of its products on a CPU.

- float32 and bf16: oneDNN's products with weights packed once and GELU fused into them.
- int8: weights quantised per output channel once, activations per token as they come, products of 8-bit integers
  accumulated in 32 bits. Attention, LayerNorm and GELU stay in floating point.

All products come with torch; nothing is compiled on the user's machine. Where torch lacks them (another processor, another
build) the plain network of `gte_rag.model` runs instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor, nn

from gte_rag.config import GTEConfig
from gte_rag.model import GatedMLP, GTEModel, Layer, Linear

PRECISIONS = ("auto", "float32", "bf16", "int8")

_onednn = torch.ops.onednn
_mkldnn = torch.ops.mkldnn
_LEVELS = 127  # of a sign; -128 is left out so that zero stays zero
_ZERO = 128  # activations are stored unsigned: the form for which processors have an instruction


def resolve(precision: str, device: torch.device) -> str:
    """Return the precision to compute in.

    ``"auto"`` is the fastest that leaves rankings as they are: bf16 on a GPU or CPU with bfloat16 products, float32 elsewhere.
    int8 moves a cosine by up to 0.04 and has to be asked for.

    Raises:
        TypeError: `precision` is not a string.
        ValueError: There is no such precision, or this machine cannot compute in it.
    """
    if not isinstance(precision, str):
        raise TypeError(f"precision is {precision!r}; accepted: {', '.join(map(repr, PRECISIONS))}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; accepted: {', '.join(map(repr, PRECISIONS))}")
    if precision == "auto":
        return "bf16" if _has_bf16(device) else "float32"
    if precision == "int8" and not (device.type == "cpu" and _has_int8()):
        raise ValueError(
            f"precision 'int8' does not work on {device} here: it needs a CPU with 8-bit dot products (AVX-512 VNNI or "
            "AVX-VNNI) and a torch built with oneDNN; use 'auto'"
        )
    return precision


def build(config: GTEConfig, weights: Mapping[str, Tensor], precision: str, device: torch.device) -> GTEModel:
    """Make the network.

    Args:
        config: The architecture.
        weights: Parameters of `GTEModel` by name, as in the checkpoint.
        precision: ``"float32"``, ``"bf16"`` or ``"int8"``.
        device: Where to run.

    Returns:
        The network, ready to run. On a CPU its word embeddings stay in the dtype and the memory of the checkpoint.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    with torch.device("meta"):
        model = GTEModel(config)
    packed = device.type == "cpu" and _has_packed_products() and (precision != "bf16" or _has_bf16(device))
    placed = {}
    for name, weight in weights.items():
        keep = device.type == "cpu" and name == "word_embeddings.weight" and weight.dtype != torch.float64
        placed[name] = weight if keep else weight.to(device, torch.float32 if packed else dtype)
    model.load(placed)
    del placed
    if packed:
        for name, parameter in model.named_parameters():
            if "proj" not in name and name != "word_embeddings.weight":
                parameter.data = parameter.data.to(dtype)
        for layer in model.layers:
            assert isinstance(layer, Layer)
            _replace_products(layer, precision, dtype)
    return model


def _replace_products(layer: Layer, precision: str, dtype: torch.dtype) -> None:
    def fast(linear: nn.Module | None) -> nn.Module | None:
        if not isinstance(linear, Linear):
            return linear
        return Int8Linear(linear) if precision == "int8" else PackedLinear(linear, dtype)

    attention = layer.attention
    for name in ("qkv_proj", "o_proj", "q_proj", "kv_proj"):
        setattr(attention, name, fast(getattr(attention, name)))
    attention.in_bfloat16 = precision != "float32" and _has_bf16(torch.device("cpu"))
    if isinstance(layer.mlp, GatedMLP):
        layer.mlp = Int8GatedMLP(layer.mlp) if precision == "int8" else PackedGatedMLP(layer.mlp, dtype)


class PackedLinear(nn.Module):
    """`Linear` in float32 or bfloat16 on weights in the order oneDNN reads them."""

    def __init__(self, linear: Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach().to(dtype).contiguous()
        self.packed: Tensor = _mkldnn._reorder_linear_weight(weight, 256)  # good for every number of rows
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype).contiguous()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute ``x @ weight.T + bias (+ residual)``: (T, in) -> (T, out)."""
        out = self.product(x)
        # oneDNN can fuse the sum as well, but torch then builds the product anew at every call, for milliseconds.
        return out if residual is None else out.add_(residual)

    def product(self, x: Tensor, then: str = "none") -> Tensor:
        """Compute the product and apply ``"gelu"`` to it or nothing."""
        out: Tensor = _mkldnn._linear_pointwise(x, self.packed, self.bias, then, [], "none")
        return out


class PackedGatedMLP(nn.Module):
    """`GatedMLP` with GELU fused into the product before it."""

    def __init__(self, mlp: GatedMLP, dtype: torch.dtype) -> None:
        super().__init__()
        self.plain, projection = mlp.plain, mlp.up_gate_proj
        width = mlp.down_proj.in_features - self.plain
        self.up = PackedLinear(projection.rows(0, width), dtype) if width else None
        self.gate = PackedLinear(projection.rows(width, projection.out_features), dtype)
        self.down = PackedLinear(mlp.down_proj, dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each token by itself and add the result to it: (T, C) -> (T, C)."""
        gated = self.gate.product(hidden, "gelu")
        if self.up is not None:
            gated[:, self.plain :].mul_(self.up(hidden))
        out: Tensor = self.down(gated, hidden)
        return out


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Round each row to 8 bits around zero, on a scale of its own.

    Args:
        x: float32, shape (T, n).

    Returns:
        Levels, uint8 with `_ZERO` for 0, shape (T, n), and the size of a level in each row, float32, shape (T, 1).
    """
    # Two plain reductions are many times faster here than aminmax or a norm.
    largest = torch.maximum(x.amax(dim=1, keepdim=True), x.amin(dim=1, keepdim=True).neg_())
    size = largest.clamp_(min=1e-30).div_(_LEVELS)
    levels = torch.mul(x, size.reciprocal()).round_().to(torch.int8)  # through int8: the conversion to uint8 is slow
    return levels.view(torch.uint8).bitwise_xor_(_ZERO), size


def level_sizes(weight: Tensor) -> Tensor:
    """Return the size of a level in each row of a matrix: a power of two if the row is then exact, else as small as can be.

    Args:
        weight: float32, shape (out, in).

    Returns:
        float32, shape (out,).
    """
    smallest = weight.abs().amax(dim=1).clamp_(min=1e-30).div_(_LEVELS)
    power = smallest.log2().ceil_().exp2_()
    levels = weight / power[:, None]
    return torch.where((levels == levels.round()).all(dim=1), power, smallest)


class Int8Linear(nn.Module):
    """`Linear` with 8-bit weights, a scale per output channel, and activations quantised per token."""

    def __init__(self, linear: Linear) -> None:
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        weight = linear.weight.detach()
        self.scales = level_sizes(weight)
        levels = (weight / self.scales[:, None]).round_().to(torch.int8)
        self.packed: Tensor = _onednn.qlinear_prepack(levels, None)
        self.zeros = torch.zeros(self.out_features, dtype=torch.int32)
        self.bias = None if linear.bias is None else linear.bias.detach().contiguous()

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """Compute ``x @ weight.T + bias (+ residual)``: (T, in) -> (T, out)."""
        levels, size = quantise(x)
        out = self.product(levels)
        out = out.mul_(size) if residual is None else torch.addcmul(residual, out, size, out=out)
        return out if self.bias is None else out.add_(self.bias)

    def levels(self) -> Tensor:
        """Return the weights that were packed, int8, shape (out, in): read back by a product, as oneDNN's order is private."""
        ones = torch.full((self.in_features, self.in_features), _ZERO, dtype=torch.uint8)
        ones.diagonal().add_(1)
        return self.product(ones).div_(self.scales).round_().to(torch.int8).T.contiguous()

    def product(self, levels: Tensor) -> Tensor:
        """Compute the product in units of the rows' levels, without bias: uint8 (T, in) -> float32 (T, out)."""
        out: Tensor = _onednn.qlinear_pointwise(
            levels, 1.0, _ZERO, self.packed, self.scales, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return out


class Int8GatedMLP(nn.Module):
    """`GatedMLP` in 8 bits: the tokens are quantised once for up and gate, and a scale that all neurons share comes last."""

    def __init__(self, mlp: GatedMLP) -> None:
        super().__init__()
        self.plain = mlp.plain
        self.up_gate = Int8Linear(mlp.up_gate_proj)
        self.down = Int8Linear(mlp.down_proj)

    def forward(self, hidden: Tensor) -> Tensor:
        """Transform each token by itself and add the result to it: (T, C) -> (T, C)."""
        levels, size = quantise(hidden)
        up_gate, with_up = self.up_gate.product(levels), self.down.in_features - self.plain
        up, gate = up_gate[:, :with_up], up_gate[:, with_up:]
        gate.mul_(size)
        gated = torch.ops.aten.gelu.out(gate, out=gate)
        gated[:, self.plain :].mul_(up.mul_(size) if self.plain else up)
        levels, gated_size = quantise(gated)
        out = self.down.product(levels)
        out = torch.addcmul(hidden, out, gated_size if self.plain else gated_size.mul_(size), out=out)
        return out.add_(self.down.bias)


def _has_bf16(device: torch.device) -> bool:
    """Whether bfloat16 products are computed in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    features = _features()
    return device.type == "cpu" and bool(features.get("avx512_bf16") or features.get("amx_bf16"))


@cache
def _has_packed_products() -> bool:
    """Whether this build of torch has the fused products in float32, on a processor of the kind they were measured on."""
    present = hasattr(_mkldnn, "_linear_pointwise") and hasattr(_mkldnn, "_reorder_linear_weight")
    return present and bool(torch.backends.mkldnn.is_available()) and bool(_features().get("avx2"))  # type: ignore[no-untyped-call]


@cache
def _has_int8() -> bool:
    """Whether 8-bit products are fast and exact here; older processors saturate 16-bit intermediate sums."""
    features = _features()
    if not (_has_packed_products() and (features.get("avx512_vnni") or features.get("avx_vnni"))):
        return False
    if not (hasattr(_onednn, "qlinear_pointwise") and hasattr(_onednn, "qlinear_prepack")):
        return False
    largest = Linear(64, 16, bias=False)
    largest.weight = nn.Parameter(torch.ones(16, 64), requires_grad=False)
    product = Int8Linear(largest).product(torch.full((4, 64), 255, dtype=torch.uint8))
    return bool(torch.allclose(product, torch.full((4, 16), 64.0 * (255 - _ZERO))))


@cache
def _features() -> dict[str, object]:
    """Return what this processor can do, by the names torch gives it; nothing if this torch cannot tell."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    found: dict[str, object] = dict(capabilities()) if capabilities is not None else {}
    return found
