"""The student's first layer counts: a token's channel `RARE` becomes what BM25 would weigh it, not only how rare it is.

A token attends to its like and to the first token, whose value is nothing. With a score of s for its like, of a for the first
token and of 0 for others, a token that comes c times among n gets

    c / (c + e^(a - s) + (n - c) e^-s),

which is BM25's saturating count c / (c + k1 (1 - b + b n / mean n)) (Robertson and Zaragoza, 2009) where
e^(a - s) = k1 (1 - b) and e^-s = k1 b / (mean n). Likes are told by a code of signs in the channels that otherwise only
special tokens use (`student.CODED`); heads differ in s, and what to make of them all is a regression. Four neurons multiply
the count with the rarity, others take the code off. All other channels leave the layer as the teacher's embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from batch import Batch
from student import CARRYING, CODED, CONSTANT, GAIN, MARKS, RARE, STANDING, Layer, Student, turns
from torch import Tensor

SATURATION, LENGTHS, MEAN_LENGTH = 1.0, 0.7, 150.0  # BM25's k1 and b, and a usual number of tokens
_CODE = range(6, 13)  # pairs of a head's channels that hardly turn within a text: they tell tokens apart
_MARK = 15  # the pair that brings in the first token, and shuts out the last
_LIKE = (4.0, 5.0, 6.0, 7.0, 8.0, 9.0)  # s of the heads, in turn
_OUT, _SILENT = 30.0, 12.0  # how far down the last token's score is, and neurons that special tokens are not to move
_RIDGE = 0.01


def saturated(count: Tensor, length: Tensor) -> Tensor:
    """Return BM25's factor of a token that comes `count` times in a text of `length` tokens."""
    return count / (count + SATURATION * (1 - LENGTHS + LENGTHS * length / MEAN_LENGTH))


def saturated_counts(batch: Batch) -> Tensor:
    """Return that factor of every token, (tokens,)."""
    occurring = batch.text * (int(batch.ids.max()) + 1) + batch.ids
    _, which, counts = occurring.unique(return_inverse=True, return_counts=True)
    return saturated(counts[which].float(), batch.lengths[batch.text].float())


@torch.inference_mode()
def place_counting(student: Student, batches: Sequence[Batch], usual_rarity: float) -> float:
    """Build the first layer.

    Args:
        student: Changed in place: its embedding's LayerNorm is plain, and what was there goes behind the counting.
        batches: Some texts each.
        usual_rarity: Of a token of a text, which channel `RARE` is told from.

    Returns:
        The share of the factor's variance that the layer tells.
    """
    layer, plain = student.layers[0], student.embeddings_ln
    assert isinstance(layer, Layer)
    width = student.config.hidden_size
    for parameter in layer.parameters():
        parameter.zero_()
    weight, bias = plain.weight.clone(), plain.bias.clone()
    constant = bias[CONSTANT].clone()
    for norm in (plain, layer.attn_ln):
        norm.weight.fill_(1.0)
        norm.bias.zero_()
        norm.weight[CONSTANT], norm.bias[CONSTANT] = 0.0, constant
    hidden = [plain(student.word_embeddings(batch.ids)) for batch in batches]
    everything = torch.cat(hidden)
    ids = torch.cat([batch.ids for batch in batches])
    ordinary = (ids != MARKS[0]) & (ids != MARKS[1])
    _place_heads(layer, everything[ordinary], everything[ids == MARKS[0]][0])

    # What to make of the heads.
    mixed = torch.cat([layer.mixed(x, *turns(b, student.frequencies), b) for x, b in zip(hidden, batches, strict=True)])
    told_by = slice(None, None, width // layer.num_heads)  # a channel of each head
    means = mixed[ordinary][:, told_by].mean(0)
    layer.attention["qkv_proj"].bias[2 * width :][told_by] -= means  # about 0, where numbers are told most exactly
    mixed[:, told_by] -= means
    heads = mixed[ordinary][:, told_by]
    factors = torch.cat([saturated_counts(batch) for batch in batches])[ordinary]
    wanted = factors / factors.mean() - 1
    gram = heads.T @ heads
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    solution = torch.linalg.solve(gram.double(), (heads.T @ wanted).double()).float()
    told = 1 - float((wanted - heads @ solution).var() / wanted.var())
    output = layer.attention["o_proj"]
    output.weight[GAIN, told_by] = solution

    # It multiplies with the rarity, and is taken off where it was.
    gain, pattern = everything[ordinary, GAIN].mean(), everything[ids == MARKS[0]][0, STANDING[1]]
    up, gate = layer.mlp["up_gate_proj"].weight.chunk(2)
    down = layer.mlp["down_proj"].weight
    sums = [x + output(m) for x, m in zip(hidden, mixed.split([len(x) for x in hidden]), strict=True)]
    _keep_level(layer.attn_ln, sums)
    up[-CARRYING:, CONSTANT] = 1 / constant
    up[-CARRYING : -CARRYING + 2, GAIN], up[-CARRYING : -CARRYING + 2, CONSTANT] = 1.0, -gain / constant
    for neuron, sign in ((0, 1.0), (1, -1.0)):
        gate[neuron - CARRYING, RARE], gate[neuron - CARRYING, CONSTANT] = sign, sign * usual_rarity / constant
        down[RARE, neuron - CARRYING] = sign
        gate[neuron - CARRYING + 2, GAIN], gate[neuron - CARRYING + 2, CONSTANT] = sign, -sign * gain / constant
        down[GAIN, neuron - CARRYING + 2] = -sign
    for number, channel in enumerate(CODED):
        up[2 * number : 2 * number + 2, CONSTANT] = 1 / constant
        gate[2 * number, channel], gate[2 * number + 1, channel] = 1.0, -1.0
        down[channel, 2 * number], down[channel, 2 * number + 1] = -1.0, 1.0
    silent = gate[:-2]  # none answers to special tokens, but those that take off the count
    silent[:, STANDING[1]] -= _SILENT / pattern * silent.any(1)
    states = [layer.attn_ln(x) for x in sums]
    layer.mlp_ln.weight.copy_(weight)
    layer.mlp_ln.bias.copy_(bias)
    _keep_level(layer.mlp_ln, [x + layer.mlp["down_proj"](layer.neurons(x)) for x in states])
    return told


def _keep_level(norm: torch.nn.LayerNorm, sums: Sequence[Tensor]) -> None:
    """Undo what a LayerNorm does to states that are normed already, but for a few channels: on average."""
    read = torch.cat(tuple(sums))
    level, deviation = read.mean(1).mean(), read.std(1, unbiased=False).mean()
    constant = norm.bias[CONSTANT].clone()
    norm.bias += norm.weight * level
    norm.weight *= deviation
    norm.bias[CONSTANT] = constant


def _place_heads(layer: Layer, ordinary: Tensor, first: Tensor) -> None:
    """Set queries, keys and values.

    Args:
        layer: Changed in place.
        ordinary: Normed embeddings of the tokens of some texts, (tokens, C).
        first: The first token's, (C,).
    """
    projection = layer.attention["qkv_proj"]
    width, heads = projection.weight.shape[1], layer.num_heads
    size = width // heads
    sign = ordinary[:, CODED].abs().mean()
    places = [place for pair in _CODE for place in (pair, pair + size // 2)]
    with_first, with_last = STANDING[1], STANDING[0]  # the first token has both up, the last one the former
    pattern = first[with_first]
    for head in range(heads):
        like = _LIKE[head % len(_LIKE)]
        sink = like + math.log(SATURATION * (1 - LENGTHS))
        rows = {part: number * width + head * size for number, part in enumerate("qkv")}
        scale = (like * size**0.5 / len(places)) ** 0.5 / sign
        for part in "qk":
            for place, channel in zip(places, CODED, strict=True):
                projection.weight[rows[part] + place, channel] = scale
                # Marks have the same in this channel: so they have no code.
                projection.weight[rows[part] + place, STANDING[STANDING.index(channel) % 2]] = -scale
        score = size**0.5
        projection.bias[rows["q"] + _MARK] = 1.0
        projection.weight[rows["k"] + _MARK, with_first] = 0.5 * (sink - _OUT) * score / pattern
        projection.weight[rows["k"] + _MARK, with_last] = 0.5 * (sink + _OUT) * score / pattern
        projection.bias[rows["v"]] = 1.0
        projection.weight[rows["v"], with_first] = -1.0 / pattern
