"""What a transplant loses can mostly be solved for: positions and linear maps, layer by layer, without gradients.

The student has fewer pieces, of lower-cased text. Where the teacher reads another piece, or several, word embeddings are solved
for: the mean over the characters that both read shall be the same.

The teacher adds absolute positions to its word embeddings; a GTE network only turns queries and keys. What the teacher's
attention makes of positions is, to nine tenths, a function of the distance between two tokens, one for every head. A head
here has some pairs of channels that turn fast and are given nothing to read: their biases alone, turned against each other,
make a sum of cosines of the distance, which is fitted to the teacher's. The content of queries and keys moves into the other
pairs, the strongest into the slowest: of its products with the keys, 24 of 32 channels keep 98 % or more.

The student's special tokens are a pattern in channels of their own and nothing else, in every layer. Attention is changed to
see the teacher's in them, MLPs to see nothing.

Then the output projection of the attention, and that of the MLP, are solved for (ridge regression) so that the layer's sums
come out as the teacher's do on real text. A layer that the student lacks is made good by the MLP before it in the same way.
Every matrix is rounded to the checkpoint's grid as soon as it is known, so that the next solution makes good for that, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from alignment import Spans, common
from batch import Batch
from grid import STEPS, coarse
from scipy.sparse import csr_array
from student import CARRYING, FIRST, GAIN, MARKS, OWN, RARE, STANDING, Layer, Student, standing, turns
from teacher import Teacher
from tokenizers import Encoding
from torch import Tensor, nn
from torch.nn import functional

SLOTS = 4  # pairs of channels of a head that tell distances: those that turn fastest
_NEAR, _FAR = 64, 384  # distances that are fitted: as measured, and level
_FAR_WEIGHT = 0.5  # of all far distances together, beside the near ones
_FEWEST = 5  # texts that must reach a position for its mean to count
_RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)  # in units of the mean square of what is read
_OCCURRENCES = 3.0  # so often, as it were, has a piece been seen to be what the teacher has for it
_ITERATIONS = 12  # of conjugate gradients
_FLOOR = 0.01  # of variance that every direction is taken to have, in units of the mean square
_LOOK = 14.0  # attention score by which most tokens prefer the closing one where the first one pools
_SLOW = 8  # pairs of channels from this one on hardly turn within a text
_SILENT = -5.0  # what GELU makes nothing of
_SOME = 16  # lessons that are enough to tell which channels of queries and keys matter
_HELD_OUT = 8  # one in so many lessons


class Lesson(NamedTuple):
    """Texts in the tokens of both, which spans they share, and the states of both that go from layer to layer."""

    mine: Batch
    its: Batch
    spans: Spans
    states: dict[str, Tensor]


def heal_words(words: Tensor, its_words: Tensor, mine: Sequence[Encoding], its: Sequence[Encoding]) -> Tensor:
    """Fit word embeddings so that spans of characters come out as the teacher's do.

    Args:
        words: The student's, to begin with, (pieces, C).
        its_words: The teacher's, (its pieces, C).
        mine: Texts in the student's tokens.
        its: The same in the teacher's.

    Returns:
        float32, (pieces, C).
    """
    spans = common(mine, its, [len(encoding.ids) for encoding in mine])
    averages = []
    for encodings, which, size in ((mine, spans.student, len(words)), (its, spans.teacher, len(its_words))):
        ids = np.array([token for encoding in encodings for token in encoding.ids])
        inside = (which >= 0).numpy()
        rows = which.numpy()[inside]
        shares = (1 / np.bincount(rows, minlength=spans.count).astype(np.float32))[rows]
        averages.append(csr_array((shares, (rows, ids[inside])), shape=(spans.count, size)))
    average, target = averages[0], averages[1] @ its_words.numpy()
    change = np.zeros_like(words.numpy())
    left = average.T @ (target - average @ words.numpy())
    direction, error = left, (left * left).sum(0)
    for _ in range(_ITERATIONS):
        product = average.T @ (average @ direction) + _OCCURRENCES * direction
        step = error / np.maximum((direction * product).sum(0), 1e-20)
        change, left = change + step * direction, left - step * product
        previous, error = error, (left * left).sum(0)
        direction = left + error / np.maximum(previous, 1e-20) * direction
    return words + torch.from_numpy(change)


@torch.inference_mode()
def heal(student: Student, teacher: Teacher, layers: Sequence[int], lessons: Sequence[Lesson]) -> list[float]:
    """Fit a transplanted student to its teacher on some texts.

    Args:
        student: Changed in place; its word embeddings are on their grid, and its first layer counts.
        teacher: Prepared in float32.
        layers: The teacher's layers that the student has.
        lessons: The texts, some thousand tokens in each, with empty `states`.

    Returns:
        After each layer, the share of the variance of the teacher's states that the student's miss.
    """
    for mine, its, _, states in lessons:
        words = student.embeddings_ln(student.word_embeddings(mine.ids))
        states["hidden"] = student.layers[0](words, *turns(mine, student.frequencies), mine)
        states["teacher"] = teacher.embedded(its)
    missed = []
    for number, (old, following) in enumerate(zip(layers, [*layers[1:], teacher.num_layers], strict=True)):
        layer = student.layers[FIRST + number]
        assert isinstance(layer, Layer)
        kernels = distance_kernels(teacher, old, lessons)
        read_marks_as_the_teacher(layer.attention["qkv_proj"], lessons)
        some = torch.cat([lesson.states["hidden"] for lesson in lessons[:_SOME]])
        place_positions(layer, kernels, some, student.frequencies)
        round_off(layer.attention["qkv_proj"])
        output, down = layer.attention["o_proj"], layer.mlp["down_proj"]
        fit = Fit(output)
        pattern = standing(layer.attn_ln.bias[GAIN], layer.attn_ln.weight[GAIN], len(output.weight))
        for mine, its, spans, states in lessons:
            states["mixed"] = mix(layer, states["hidden"], mine, student.frequencies)
            before = teacher.attended(states["teacher"], old, its)
            sums = states["hidden"] + output(states["mixed"])
            which, tokens = marked(mine).nonzero().unbind(1)
            fit.add(states["mixed"], sums, before, spans, (tokens, pattern[which]))
            states["teacher"] = teacher.norm(before, f"l{old}.aln")
        fit.solve()
        round_off(output)
        for kind, values in (("w", layer.mlp_ln.weight), ("b", layer.mlp_ln.bias)):
            new = teacher.weights[f"l{following - 1}.oln.{kind}"].clone()
            new[OWN] = values[OWN]
            values.copy_(new)
        for _, _, _, states in lessons:
            states["hidden"] = layer.attn_ln(states["hidden"] + output(states.pop("mixed")))
        silence_marks(layer.mlp["up_gate_proj"], lessons)
        round_off(layer.mlp["up_gate_proj"])
        fit = Fit(down)
        for _, its, spans, states in lessons:
            state = states["teacher"]
            for there in range(old, following):  # the layers that the student lacks come at once
                if there > old:
                    state = teacher.norm(teacher.attended(state, there, its), f"l{there}.aln")
                before = state + teacher.linear(teacher.neurons(state, there), f"l{there}.fo")
                state = teacher.norm(before, f"l{there}.oln")
            read = layer.neurons(states["hidden"])
            sums = states["hidden"] + down(read)
            fit.add(read, sums, before, spans)
            states["teacher"] = state
        fit.solve()
        round_off(down)
        error = total = 0.0
        for _, _, spans, states in lessons:
            states["hidden"] = layer.mlp_ln(states["hidden"] + down(layer.neurons(states["hidden"])))
            wanted = spans.mean(states["teacher"], spans.teacher)
            missing = spans.mean(states["hidden"], spans.student) - wanted
            missing[:, OWN] = 0
            error += float(missing.square().sum())
            total += float((wanted - wanted.mean(0)).square().sum())
        missed.append(error / total)
    return missed


@torch.inference_mode()
def place_pooling(student: Student, lessons: Sequence[Lesson]) -> None:
    """Let the first token look at all tokens alike, and all others only at the closing one.

    That one says nothing: its value is the mean, which the output projection makes zero. So what the sparse head reads of a
    token is not mixed with anything.

    Args:
        student: Changed in place: queries, keys and values of its last layer.
        lessons: After `heal`.
    """
    layer = student.layers[-1]
    assert isinstance(layer, Layer)
    projection = layer.attention["qkv_proj"]
    width = projection.weight.shape[1]
    size = width // layer.num_heads
    marks, instead, others = mark_states(lessons)
    instead[1] = others.mean(0)
    instead[:, STANDING] = 0
    change = functional.linear(instead - marks, projection.weight)
    slow = torch.zeros(2, size // 2)
    slow[:, _SLOW:] = (_LOOK * size**0.5 / (size - 2 * _SLOW)) ** 0.5
    slow = slow.flatten().repeat(layer.num_heads)
    projection.bias[:width] += slow
    change[0, :width] = -slow  # but not the first token's queries
    change[1, width : 2 * width] = slow
    tell_apart(projection, marks, change, others)


@torch.inference_mode()
def heal_pooling(
    student: Student, batches: Sequence[Batch], hidden: Sequence[Tensor], targets: Sequence[Tensor]
) -> None:
    """Fit the output projection of the layer that pools to the vectors that the first tokens should have.

    Args:
        student: Changed in place.
        batches: Some texts each.
        hidden: What the layer reads of each batch, (tokens, C).
        targets: The teacher's vectors of each batch's texts, centred and projected, (texts, C).
    """
    layer = student.layers[-1]
    assert isinstance(layer, Layer)
    output = layer.attention["o_proj"]
    pairs = list(zip(batches, hidden, strict=True))
    mixed = [mix(layer, states, batch, student.frequencies)[batch.first] for batch, states in pairs]
    own = [states[batch.first] for batch, states in pairs]
    output.bias -= torch.cat(own).mean(0) + output(torch.cat(mixed).mean(0))
    output.bias[[RARE, GAIN]] = 0
    fit = Fit(output)
    for read, x, target in zip(mixed, own, targets, strict=True):
        sums = x + output(read)
        error = target * ((sums * target).sum() / target.square().sum()) - sums
        error[:, [RARE, GAIN]] = 0
        fit.add_rows(read, error)
    fit.solve()


def marked(batch: Batch) -> Tensor:
    """Tell which tokens are each of `MARKS`: bool, (2, tokens)."""
    return batch.ids == torch.tensor(MARKS)[:, None]


def mark_states(lessons: Sequence[Lesson]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean states of the tokens `MARKS`, the student's and the teacher's, (2, C) each, and the student's others."""

    def means(batches: Sequence[Batch], name: str) -> Tensor:
        where = torch.cat([marked(batch) for batch in batches], 1)
        states = torch.cat([lesson.states[name] for lesson in lessons])
        return torch.stack([states[chosen].mean(0) for chosen in where])

    others = torch.cat([states["hidden"][~marked(mine).any(0)] for mine, _, _, states in lessons])
    mine, its = (
        means([lesson.mine for lesson in lessons], "hidden"),
        means([lesson.its for lesson in lessons], "teacher"),
    )
    its[:, OWN] = mine[:, OWN]
    return mine, its, others


def read_marks_as_the_teacher(linear: nn.Linear, lessons: Sequence[Lesson]) -> None:
    """Let a projection see in the student's special tokens what it would see in the teacher's."""
    marks, instead, others = mark_states(lessons)
    tell_apart(linear, marks, functional.linear(instead - marks, linear.weight), others)


def silence_marks(up_gate: nn.Linear, lessons: Sequence[Lesson]) -> None:
    """Let the neurons of an MLP not answer to special tokens, those aside that carry rarity.

    The teacher's answer with a few huge ones, which 8 bits for a token cannot hold together with the others.
    """
    marks, _, others = mark_states(lessons)
    gate = slice(len(up_gate.weight) // 2, -CARRYING)
    change = torch.zeros(len(marks), len(up_gate.weight))
    change[:, gate] = _SILENT - functional.linear(marks, up_gate.weight[gate])
    tell_apart(up_gate, marks, change, others)


def tell_apart(linear: nn.Linear, marks: Tensor, change: Tensor, others: Tensor) -> None:
    """Change what a projection makes of a few states, and as little as can be what it makes of all others.

    Args:
        linear: Changed in place.
        marks: The states, (few, C).
        change: What is added to what the projection makes of each, (few, F).
        others: All others, (tokens, C).
    """
    moments = others.T @ others / len(others)
    moments += _FLOOR * moments.diagonal().mean() * torch.eye(len(moments))
    reading = torch.linalg.solve(moments, marks.T)  # what tells them from others best
    linear.weight += torch.linalg.solve(marks @ reading, change).T @ reading.T


def round_off(linear: nn.Linear) -> None:
    """Bring a projection onto the grid of the checkpoint."""
    linear.weight.copy_(coarse(linear.weight, STEPS))


def mix(layer: Layer, hidden: Tensor, batch: Batch, frequencies: Tensor) -> Tensor:
    """Return what a layer's output projection reads, (tokens, C)."""
    return layer.mixed(hidden, *turns(batch, frequencies), batch)


def distance_kernels(teacher: Teacher, layer: int, lessons: Sequence[Lesson]) -> Tensor:
    """Return what distance adds to the attention scores of each head, measured on what the layer reads.

    The mean state at a position is its share of the state. Means of two halves of the texts are multiplied, so that their
    noise is not.

    Returns:
        float32, (heads, 2 * _NEAR + 1): distances from -_NEAR (key before query) to _NEAR.
    """
    heads, halves = teacher.num_heads, []
    for half in (0, 1):
        count, sums = torch.zeros(teacher.max_positions), torch.zeros(teacher.max_positions, teacher.hidden_size)
        for _, its, _, states in lessons:
            chosen = its.text % 2 == half
            position = its.positions[chosen]
            count.index_add_(0, position, torch.ones(len(position)))
            sums.index_add_(0, position, states["teacher"][chosen])
        halves.append(sums[count >= _FEWEST] / count[count >= _FEWEST, None])
    longest, products = min(map(len, halves)), []
    for half_means in halves:
        mean = half_means[:longest] - half_means[1:longest].mean(0)
        w = teacher.weights
        products.append(
            [functional.linear(mean, w[f"l{layer}.{part}.w"]).view(longest, heads, -1) for part in ("q", "k")]
        )
    (q, k), (other_q, other_k) = products
    scores = torch.einsum("ihd,jhd->hij", q, other_k) + torch.einsum("ihd,jhd->hij", other_q, k)
    scores *= 0.5 * q.shape[-1] ** -0.5
    distances = range(-_NEAR, _NEAR + 1)
    # Distances that no text has say nothing.
    return torch.stack([scores.diagonal(distance, 1, 2)[:, 1:].mean(1) for distance in distances], 1).nan_to_num()


def place_positions(layer: Layer, kernels: Tensor, hidden: Tensor, frequencies: Tensor) -> None:
    """Give the fast pairs of channels of every head to positions, and the others to the content.

    Args:
        layer: Changed in place.
        kernels: From `distance_kernels`.
        hidden: What the layer reads, (tokens, C).
        frequencies: Angle per position of each pair of channels.
    """
    projection = layer.attention["qkv_proj"]
    width = projection.weight.shape[1]
    size = width // layer.num_heads
    whole = torch.cat([projection.weight, projection.bias[:, None]], 1)  # the bias as a last column
    q, k, _ = projection(hidden).double().view(len(hidden), 3, layer.num_heads, size).unbind(1)
    content = size - 2 * SLOTS
    order = [channel for pair in range(size // 2 - 1, SLOTS - 1, -1) for channel in (pair, pair + size // 2)]
    for head, kernel in enumerate(kernels):
        rows = [slice(part * width + head * size, part * width + (head + 1) * size) for part in (0, 1)]
        keys = k[:, head] - k[:, head].mean(0)  # what all keys share changes no softmax
        roots = [
            torch.linalg.cholesky(x.T @ x / len(x) + 1e-6 * torch.eye(size, dtype=x.dtype)).T
            for x in (q[:, head], keys)
        ]
        u, strengths, v = torch.linalg.svd(roots[0] @ roots[1].T)
        amplitude = fit_cosines(kernel, frequencies[:SLOTS]) * size**0.5  # what attention divides by
        for row, basis, root, part in zip(rows, (u.T, v), roots, (0, 1), strict=True):
            turn = (strengths.sqrt()[:, None] * basis @ torch.linalg.inv(root).T)[:content]
            new = torch.zeros(size, width + 1)
            new[order] = turn.float() @ whole[row]
            if part == 1:
                new[order, -1] -= turn.float() @ k[:, head].mean(0).float()  # and 8 bits would hold it in vain
            strength = amplitude.abs().clamp(min=1e-6).sqrt()
            if part == 0:
                new[:SLOTS, -1] = strength
            else:
                new[:SLOTS, -1] = amplitude.real / strength
                new[size // 2 : size // 2 + SLOTS, -1] = -amplitude.imag / strength
            projection.weight[row], projection.bias[row] = new[:, :-1], new[:, -1]


def fit_cosines(kernel: Tensor, frequencies: Tensor) -> Tensor:
    """Fit ``sum over f of re(a_f) cos(f d) + im(a_f) sin(f d)`` to a function of the distance d, up to a constant.

    Distances with more weight in a softmax count more. Beyond those measured the function is taken to stay level.
    """
    distances = torch.arange(-_FAR, _FAR + 1)
    values = torch.full((len(distances),), 0.0)
    middle = slice(_FAR - _NEAR, _FAR + _NEAR + 1)
    level = _NEAR // 4
    values[: middle.start], values[middle.stop :] = kernel[:level].mean(), kernel[-level:].mean()
    values[middle] = kernel
    weights = (values - values.max()).clamp(min=-4).exp()
    far = distances.abs() > _NEAR
    weights[far] *= _FAR_WEIGHT * weights[~far].sum() / weights[far].sum()
    angles = distances[:, None] * frequencies
    basis = torch.cat([torch.ones(len(distances), 1), angles.cos(), angles.sin()], 1)
    penalty = 1e-3 * weights.sum() * torch.eye(basis.shape[1])
    penalty[0, 0] = 0
    solution = torch.linalg.solve(basis.T @ (weights[:, None] * basis) + penalty, basis.T @ (weights * values))
    return torch.complex(solution[1 : 1 + SLOTS], solution[1 + SLOTS :])


class Fit:
    """Ridge regression of what a projection should add, from sums over many tokens.

    How far the projection may go from where it is (the ridge) is chosen by the error on texts that were not solved for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        size = linear.weight.shape[1] + 1
        self.grams = torch.zeros(2, size, size)  # of what is fitted and of what is held out
        self.moments = torch.zeros(2, size, len(linear.weight))
        self.calls = 0

    def add(
        self,
        read: Tensor,
        sums: Tensor,
        before: Tensor,
        spans: Spans,
        more: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take tokens in.

        Args:
            read: What the projection reads, (tokens, F).
            sums: Its output and what that is added to, (tokens, C).
            before: The teacher's sums, (the teacher's tokens, C).
            spans: Which tokens belong together.
            more: Some of the tokens that are in no span, and the sums that they should have, (few,) and (few, C).
        """
        inputs = spans.mean(read, spans.student)
        error = spans.mean(before, spans.teacher) - spans.mean(sums, spans.student)
        if more is not None:
            tokens, wanted = more
            inputs = torch.cat([inputs, read[tokens]])
            error = torch.cat([error, wanted - sums[tokens]])
        error[:, OWN] = 0
        self.add_rows(inputs, error)

    def add_rows(self, read: Tensor, error: Tensor) -> None:
        """Take rows in: what is read, and what is missing from the output."""
        inputs = functional.pad(read, (0, 1), value=1.0)
        held = int(self.calls % _HELD_OUT == _HELD_OUT - 1)
        self.grams[held] += inputs.T @ inputs
        self.moments[held] += inputs.T @ error
        self.calls += 1

    def solve(self) -> None:
        """Change the projection."""
        values, vectors = torch.linalg.eigh(self.grams[0])
        turned, unseen = vectors.T @ self.moments[0], vectors.T @ self.grams[1] @ vectors
        unseen_moments = vectors.T @ self.moments[1]
        best, change = 0.0, torch.zeros_like(turned)
        for ridge in _RIDGES:
            solution = turned / (values.clamp(min=0) + ridge * values.mean())[:, None]
            left = float((solution * (unseen @ solution - 2 * unseen_moments)).sum())  # squared error, less a constant
            if left < best:
                best, change = left, vectors @ solution
        self.linear.weight += change[:-1].T
        self.linear.bias += change[-1]
