"""The student: the GTE network in a form that trains, and the teacher transplanted into it.

`Student` computes what `gte_rag.model` computes, from parameters of the same names, with gradients.

The transplant gives a student that agrees with its teacher before any training (positions apart):

- Attention weights copy as they are. Absolute positions have no place here; their mean goes into the word embeddings.
- The gated MLP has no bias and multiplies two branches; the teacher's plain one has a bias and one branch. One channel of the
  hidden state, the least informative, is held constant (LayerNorm weight 0, bias C), so that its column carries the bias of the
  gate, and a constant 1 in the other branch. That branch stays as it is, so training does not compute it (`Layer.carrying`).
- Another such channel carries how rare a token usually is from its word embedding to the sparse head. Every LayerNorm scales it
  a little differently for every token, so a third channel starts at the same value everywhere and is scaled alike: it tells by
  how much. Four neurons of every MLP multiply with the other branch of the gated MLP, and undo it (`carrying_neurons`).
- The teacher's special tokens are one strong channel and a little that 8 bits for a token cannot hold beside it. Here they are
  a pattern in channels of their own and nothing else, through all the teacher's layers (`standing`; `heal.py` sees to it).
- One layer follows that pools: near-uniform attention, whose output projection subtracts the mean vector and turns to the
  damped principal components of the teacher's vectors (`prepare.target_projection`). So the first token holds the mean-pooled
  vector, leading dimensions first. Other tokens look at nothing of the text there (`heal.place_pooling`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from teacher import Batch, Teacher
from torch import Tensor, nn
from torch.nn import functional
from vocabulary import SPECIALS

from gte_rag.config import GTEConfig, RotaryScaling

CONSTANT = 210  # the channel that is held constant
RARE = 337  # the channel that carries how rare a token is
GAIN = 183  # the channel that tells how LayerNorms have scaled a token's channels
MARKS = [SPECIALS.index("<s>"), SPECIALS.index("</s>")]  # the tokens before and after a text
STANDING = [81, 371, 14, 148, 191, 122, 124, 383, 295, 197, 213, 67, 118, 33, 30, 105]  # the channels that these hold
CODED = STANDING[2:]  # those in which a word's embedding has a code by which the first layer knows its like
CARRIED = [RARE, GAIN, *STANDING]  # channels that keep from layer to layer what the word embedding says
OWN = [CONSTANT, *CARRIED]  # channels that the teacher has no part in
FIRST = 1  # the layer that the teacher's first one becomes
CARRYING = 4  # neurons of every MLP, its last, that undo what `GAIN` tells
RARE_SCALE = 5.0  # of that channel in a word embedding, commonest to rarest, beside the others' deviation
_CODE_SCALE = 0.85  # of the code in a word embedding, beside the others' deviation
_RARE_WEIGHT = 0.5  # of that channel in the LayerNorm that follows: about the others'
_GAIN_SCALE = 2.5  # of its channel in a word embedding, beside the others' deviation
_GAIN = 1.0  # what it is where nothing was scaled
_POOLED = 4.0  # the pooled vector's usual size in the pooling layer, beside that of the teacher's last states


class Layer(nn.Module):
    """One post-LayerNorm layer; parameters named as in `gte_rag.model`."""

    def __init__(self, config: GTEConfig, carrying: bool) -> None:
        """Build a layer; `carrying`: it comes from the teacher, and its channels `OWN` do what they are for."""
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.carrying = carrying
        self.eight_bits = False  # read hidden states as int8 does
        self.num_heads = config.num_heads
        self.attention = nn.ModuleDict({"qkv_proj": nn.Linear(width, 3 * width), "o_proj": nn.Linear(width, width)})
        self.attn_ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.mlp = nn.ModuleDict(
            {"up_gate_proj": nn.Linear(width, 2 * inner, bias=False), "down_proj": nn.Linear(inner, width)}
        )
        self.mlp_ln = nn.LayerNorm(width, eps=config.layer_norm_eps)
        if carrying:
            for parameter in (*self.attn_ln.parameters(), *self.mlp_ln.parameters()):
                parameter.register_hook(_but_own)
            for linear in (self.attention["o_proj"], self.mlp["down_proj"]):
                linear.weight.register_hook(_but_own)
                linear.bias.register_hook(_but_own)
            self.mlp["up_gate_proj"].weight.register_hook(_but_carrying)

    def forward(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """Apply the layer to packed tokens: (tokens, C) -> the same."""
        mixed = self._read(self.mixed(hidden, cos, sin, batch))
        hidden = self.attn_ln(hidden + self.attention["o_proj"](mixed))
        return self.mlp_ln(hidden + self.mlp["down_proj"](self._read(self.neurons(hidden))))

    def mixed(self, hidden: Tensor, cos: Tensor, sin: Tensor, batch: Batch) -> Tensor:
        """Return what the attention's output projection reads: (tokens, C) -> the same."""
        q, k, v = self.attention["qkv_proj"](self._read(hidden)).view(len(hidden), 3, self.num_heads, -1).unbind(1)
        return batch.attend(rotate(q, cos, sin), rotate(k, cos, sin), v)

    def neurons(self, hidden: Tensor) -> Tensor:
        """Return what the MLP's down projection reads: (tokens, C) -> (tokens, F)."""
        hidden = self._read(hidden)
        if self.carrying:  # the up branch is 1 but for the last few neurons
            up, gate = self.mlp["up_gate_proj"].weight.chunk(2)
            plain, carrying = functional.gelu(functional.linear(hidden, gate)).tensor_split([-CARRYING], dim=1)
            return torch.cat([plain, carrying * functional.linear(hidden, up[-CARRYING:])], 1)
        up, gate = self.mlp["up_gate_proj"](hidden).chunk(2, dim=-1)
        return functional.gelu(gate) * up

    def _read(self, x: Tensor) -> Tensor:
        """Return what a matrix reads: the same, or rounded as int8 rounds each token, with the gradient of the same."""
        if not self.eight_bits:
            return x
        with torch.no_grad():
            step = x.abs().amax(-1, keepdim=True).clamp(min=1e-8) / 127
            error = torch.round(x / step) * step - x
        return x + error


def config_from(shape: Mapping[str, Any]) -> GTEConfig:
    """Return the configuration that `prepare.py` wrote down as plain values."""
    return GTEConfig(**{**shape, "rope_scaling": RotaryScaling(**shape["rope_scaling"])})


def _but_own(gradient: Tensor) -> Tensor:
    """Leave out what belongs to channels `OWN`: rows of a matrix that writes hidden states, entries of a bias."""
    gradient = gradient.clone()
    gradient[OWN] = 0
    return gradient


def _but_carrying(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    inner = len(gradient) // 2
    gradient[:inner] = 0
    gradient[-CARRYING:] = 0
    return gradient


def turns(batch: Batch, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles of every token's position, (tokens, 1, pairs of channels) each."""
    angles = batch.positions.float()[:, None, None] * frequencies.to(batch.positions.device)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs of channels by the angles of their positions: (tokens, heads, C / heads)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Student(nn.Module):
    """Word embeddings, layers and the sparse head."""

    def __init__(self, config: GTEConfig) -> None:
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.word_embeddings.weight.register_hook(lambda gradient: _but_own(gradient.T).T)
        self.embeddings_ln = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        last = config.num_layers - 1
        self.layers = nn.ModuleList(Layer(config, carrying=number < last) for number in range(config.num_layers))
        self.layers[0].requires_grad_(False)  # it counts: `counting.py`
        self.classifier = nn.Linear(config.hidden_size, 1)
        self.frequencies = config.inverse_frequencies()

    def forward(self, batch: Batch) -> list[Tensor]:
        """Return the packed hidden states after every layer, each (tokens, C), in the dtype of products under autocast."""
        cos, sin = turns(batch, self.frequencies)
        hidden = self.embeddings_ln(self.word_embeddings(batch.ids))
        if torch.is_autocast_enabled(hidden.device.type):
            hidden, cos, sin = (x.to(torch.get_autocast_dtype(hidden.device.type)) for x in (hidden, cos, sin))
        states = []
        for layer in self.layers:
            hidden = layer(hidden, cos, sin, batch)
            states.append(hidden)
        return states

    def token_weights(self, hidden: Tensor) -> Tensor:
        """Return the sparse weight of every token: (tokens, C) -> (tokens,)."""
        return torch.relu(self.classifier(hidden)).squeeze(-1)


def transplant(
    teacher: Teacher,
    words: Tensor,
    layers: Sequence[int],
    config: GTEConfig,
    constants: Tensor,
    mean: Tensor,
    projection: Tensor,
    neurons: Sequence[Tensor],
    rarity: Tensor,
    norms: Tensor,
) -> Student:
    """Build a student from its teacher.

    Args:
        teacher: The teacher.
        words: Word embeddings of the student's pieces, (pieces, C).
        layers: The teacher's layers to keep.
        config: The student's shape: one layer before `layers`, which counts, and one after them, which pools.
        constants: Mean of channel `CONSTANT` after the embedding's LayerNorm and after both of every teacher's layer,
            shape (2 * layers + 1,).
        mean: Mean of the teacher's vectors in units of its hidden states, shape (C,).
        projection: From the teacher's vectors to those that the student shall have, shape (C, C), in units that give hidden
            states of usual size.
        neurons: For every teacher's layer, the neurons of its MLP to keep, `CARRYING` fewer than the student has.
        rarity: How rare the pieces are, about 0 on average over text, shape (pieces,).
        norms: At the places of `constants`: mean and deviation over channels of what the LayerNorm reads, and what channels
            `CARRIED` are after it, each averaged over tokens; shape (2 * layers + 1, 2 + len(CARRIED)).
    """
    student = Student(config)
    state = student.state_dict()
    w = teacher.weights
    width = teacher.hidden_size
    positions = w["emb.pos"].mean(0) + w["emb.type"][:width]
    words = words + positions
    level, deviation = words.mean(1), words.std(1)
    words[:, RARE] = level + RARE_SCALE * rarity * deviation
    words[:, GAIN] = level + _GAIN_SCALE * deviation
    signs = torch.randint(0, 2, (len(words), len(CODED)), generator=torch.Generator().manual_seed(0)) * 2 - 1
    code = _CODE_SCALE * signs * deviation[:, None]
    words[:, STANDING] = 0
    level = (words.sum(1) + code.sum(1)) / (width - len(STANDING))  # what LayerNorm makes zero
    words[:, STANDING] = level[:, None]
    words[:, CODED] += code
    marks = standing(level[MARKS, None], deviation[MARKS, None], width)
    marks[:, GAIN] = words[MARKS, GAIN]
    words[MARKS] = marks
    state["word_embeddings.weight"] = words
    # C at every place: a power of two, which every precision holds.
    held = torch.where(constants.abs() > 0.2, constants.sign() * constants.abs().log2().round().exp2(), torch.ones(()))

    def norm(name: str, weight: Tensor, bias: Tensor, at: int) -> None:
        state[name + ".weight"], state[name + ".bias"] = weight.clone(), bias.clone()
        state[name + ".weight"][CONSTANT] = 0
        state[name + ".bias"][CONSTANT] = held[at]
        level, deviation = norms[at, :2]
        state[name + ".weight"][[RARE, GAIN]] = deviation if at else torch.tensor([_RARE_WEIGHT, _GAIN / _GAIN_SCALE])
        state[name + ".bias"][[RARE, GAIN]] = level if at else 0.0
        usual = norms[min(at + 1, len(norms) - 1), 1]  # what special tokens' deviation should be at the next place
        state[name + ".weight"][STANDING] = usual
        state[name + ".bias"][STANDING] = level / deviation * usual if at else 0.0

    def reading(weight: Tensor, bias: Tensor, at: int) -> tuple[Tensor, Tensor]:
        weight, bias = weight.clone(), bias + weight[:, CARRIED] @ norms[at, 2:]
        weight[:, CONSTANT] *= constants[at] / held[at]
        weight[:, CARRIED] = 0
        return weight, bias

    def writing(name: str, weight: Tensor, bias: Tensor, step: Tensor) -> None:
        state[name + ".weight"], state[name + ".bias"] = weight.clone(), bias.clone()
        state[name + ".weight"][OWN] = 0
        state[name + ".bias"][OWN] = 0
        state[name + ".bias"][CONSTANT] = step

    norm("embeddings_ln", w["emb.ln.w"], w["emb.ln.b"], 0)
    at = 0
    for number, layer in enumerate(layers):
        old, new = f"l{layer}.", f"layers.{FIRST + number}."
        entry = 2 * layer  # where the teacher's layer reads
        weight, bias = (torch.cat([w[old + f"{part}.{kind}"] for part in "qkv"]) for kind in "wb")
        weight, bias = reading(weight, bias, entry)
        weight[:, CONSTANT] *= held[entry] / held[at]  # a layer left out before this one left another constant
        state[new + "attention.qkv_proj.weight"], state[new + "attention.qkv_proj.bias"] = weight, bias
        writing(new + "attention.o_proj", w[old + "ao.w"], w[old + "ao.b"], held[entry + 1] - held[at])
        norm(new + "attn_ln", w[old + "aln.w"], w[old + "aln.b"], entry + 1)
        keep = neurons[layer]
        gate, bias = reading(w[old + "fi.w"][keep], w[old + "fi.b"][keep], entry + 1)
        gate[:, CONSTANT] += bias / held[entry + 1]
        up = torch.zeros_like(gate)
        up[:, CONSTANT] = 1 / held[entry + 1]
        carrying = carrying_neurons(float(held[entry + 1]), width)
        state[new + "mlp.up_gate_proj.weight"] = torch.cat([up, carrying[0], gate, carrying[1]])
        writing(new + "mlp.down_proj", w[old + "fo.w"][:, keep], w[old + "fo.b"], held[entry + 2] - held[entry + 1])
        down = state[new + "mlp.down_proj.weight"]
        state[new + "mlp.down_proj.weight"] = torch.cat([down, carrying[2]], 1)
        norm(new + "mlp_ln", w[old + "oln.w"], w[old + "oln.b"], entry + 2)
        at = entry + 2
    last = f"layers.{FIRST + len(layers)}."
    qkv = 0.02 * torch.randn(3 * width, width)
    # Values are spread over all channels of a head, so that none stands out where they are rounded.
    spread = torch.block_diag(*[hadamard(width // config.num_heads)] * config.num_heads)
    qkv[2 * width :] = spread / 8
    qkv[2 * width :, CONSTANT] = 0
    state[last + "attention.qkv_proj.weight"] = qkv
    state[last + "attention.qkv_proj.bias"] = torch.zeros(3 * width)
    state[last + "attention.o_proj.weight"] = _POOLED * projection @ spread.T * (8 / (width // config.num_heads))
    state[last + "attention.o_proj.bias"] = -_POOLED * projection @ mean
    state[last + "attention.o_proj.weight"][[RARE, GAIN]] = 0
    state[last + "attention.o_proj.bias"][[RARE, GAIN]] = 0
    state[last + "attn_ln.weight"][GAIN] = 0  # has served
    state[last + "mlp.down_proj.weight"] = torch.zeros_like(state[last + "mlp.down_proj.weight"])
    state[last + "mlp.down_proj.bias"] = torch.zeros(width)
    student.load_state_dict(state)
    return student


def hadamard(size: int) -> Tensor:
    """Return orthogonal rows of +1 and -1, (size, size), for a power of two."""
    return torch.ones(1, 1) if size == 1 else torch.kron(hadamard(size // 2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]))


def standing(level: Tensor, deviation: Tensor, width: int) -> Tensor:
    """Return what LayerNorms read of the tokens `MARKS`, given its mean and deviation over channels: (2, C)."""
    signs = torch.zeros(len(MARKS), width)
    signs[:, STANDING] = 1.0
    signs[1, STANDING[::2]] = -1.0  # orthogonal
    return level + deviation * (width / len(STANDING)) ** 0.5 * signs


def carrying_neurons(constant: float, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return neurons that undo how LayerNorms have scaled a token's channels `RARE` and `GAIN`.

    A channel that is f times what it was becomes f * (1 + (1 - f)): for f between 0.7 and 1.3 that is less than a tenth from
    where it began. 1 - f is read from `GAIN`, and the next such neurons see there what is left. A channel is read through two
    neurons, because GELU(x) - GELU(-x) = x.

    Args:
        constant: What channel `CONSTANT` is where they read.
        width: Channels.

    Returns:
        Rows of the up and of the gate projection, (CARRYING, C) each, and columns of the down projection, (C, CARRYING).
    """
    up, gate, down = torch.zeros(CARRYING, width), torch.zeros(CARRYING, width), torch.zeros(width, CARRYING)
    up[:, CONSTANT], up[:, GAIN] = 1 / constant, -1 / _GAIN  # 1 - f
    for neuron, channel in ((0, RARE), (2, GAIN)):
        gate[neuron, channel], gate[neuron + 1, channel] = 1.0, -1.0
        down[channel, neuron], down[channel, neuron + 1] = 1.0, -1.0
    return up, gate, down
