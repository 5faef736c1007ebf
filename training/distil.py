"""The training run: dense vectors and token states from the teacher, sparse weights by contrast, passages and long documents.

Every step is one of three kinds:

- **texts**: the first token learns the teacher's mean-pooled vector of the same text in the teacher's own pieces. Its vectors
  are centred, damped and rotated to their principal components, so that leading dimensions come first, and every prefix also
  learns the similarities of the whole vector within the batch (Matryoshka, arXiv:2205.13147). Every other token learns the
  teacher's states over the same characters, after several layers.
- **pairs**: a question and its passage or a sentence and its translation, among others that share words: the same, and both
  the vectors and the sparse weights must find the other half.
- **long**: the target of a document of 600 to 4,096 tokens is the mean over its parts.

The sparse weight of a token starts as its rarity in its language, then contrast takes over.

In the last part of the run the layers compute with weights on the grid of `export.py`, and read hidden states as int8 does.

    python training/distil.py --corpus corpus.pt --start start.pt --out run/ --minutes 9 --device cuda
    torchrun --standalone --nproc-per-node 2 training/distil.py ...      # one process a core: other programs disturb it less

Resumes from `--out` by itself; the learning rate falls to zero at the end of the time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from alignment import Spans
from batch import Batch
from counting import saturated_counts
from grid import rounded, rounded_words
from mixture import RARITY_POWER, seeded
from packed import Drawn, Mixture
from student import FIRST, OWN, Student, config_from
from teacher import Teacher
from torch import Tensor, distributed
from torch.nn import functional
from vocabulary import SPECIALS

from gte_rag.precision import resolve

DIMENSIONS = {96: 1.0, 192: 1.0, 384: 1.0}  # prefix: weight in the loss
_PAIRS, _LONG = 0.4, 0.03  # shares of steps
_TEMPERATURE = 0.05
_SIMILARITY = 0.3  # weight of the divergence of similarities
_CONTRAST, _SPARSE = 0.1, 0.15
RARITY = 0.5  # weight of what keeps sparse weights near rarities
_STATES = 1.0  # weight of the token states
_EVERY = 4  # states are compared after every fourth layer
_USUAL_FACTOR = 0.6  # of BM25's saturated counts: so sparse weights stay about as large as rarities
_CLIP = 1.0
_NOTED, _SAVED = 20, 240  # seconds
_WARM = 100  # steps until the learning rates are reached
ROUNDED_FROM = 0.8  # share of the run from which on the layers are rounded as `export.py` will
_BETAS = (0.9, 0.99)


class Run:
    """Models, data and the loss of each kind of step."""

    def __init__(self, start: dict[str, Any], corpus: dict[str, Any], device: torch.device, seed: int) -> None:
        """Build the models from what `prepare.py` wrote, and draw from what `packed.py` did."""
        self.device, self.tokens = device, 0
        self.mean, self.projection = start["mean"].to(device), start["projection"].to(device)
        self.dtype = torch.bfloat16 if resolve("auto", device) == "bf16" else torch.float32
        self.teacher = Teacher()
        self.teacher.prepare(self.dtype, device)
        self.student = Student(config_from(start["shape"])).to(device)
        self.student.load_state_dict(start["weights"])
        layers = [*start["layers"], self.teacher.num_layers]
        # The student's layers whose states are compared, and the teacher's that they stand for.
        self.compared = [(FIRST + n, layers[n + 1] - 1) for n in range(len(layers) - 2, -1, -_EVERY)]
        self.scale = torch.nn.Parameter(
            torch.tensor(1.0, device=device)
        )  # log of a sparse score's worth in the contrast
        self.mixture = Mixture(corpus, device, seed)
        self.rare = torch.stack([start["rarities"][language] for language in self.mixture.languages]).to(device)

    def encode(self, batch: Batch) -> list[Tensor]:
        """Return the student's states after every layer."""
        self.tokens += len(batch.ids)
        with self.autocast():
            states = self.student(batch)
        return [*states[:-1], states[-1].float()]

    def autocast(self) -> torch.autocast:
        """Return a context in which products are computed in `dtype`."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def taught(self, drawn: Drawn) -> Targets:
        """Return what the teacher makes of texts."""
        states = self.teacher.states(drawn.its)
        means = [drawn.spans.mean(states[layer], drawn.spans.teacher) for _, layer in self.compared]
        return Targets(self.centred(drawn.its.mean(states[-1])), drawn.spans, means)

    def centred(self, pooled: Tensor) -> Tensor:
        """Return the teacher's vectors of length 1, centred and projected as `prepare.py` chose."""
        return (functional.normalize(pooled, dim=1) - self.mean) @ self.projection.T

    def missed(self, states: Sequence[Tensor], targets: Targets) -> Tensor:
        """Return the share of the variance of the teacher's states that the student's miss, mean over the compared layers."""
        total = torch.zeros((), device=self.device)
        for (layer, _), wanted in zip(self.compared, targets.states, strict=True):
            error = targets.spans.mean(states[layer].float(), targets.spans.student) - wanted
            error[:, OWN] = 0
            total = total + error.square().mean() / (wanted - wanted.mean(0)).square().mean()
        return total / len(self.compared)

    def rarity(self, hidden: Tensor, batch: Batch, language: Tensor) -> Tensor:
        """Return how far the sparse weights are from the rarity of their tokens."""
        states, rare = self._ordinary(hidden, batch, language)
        return functional.mse_loss(self.student.classifier(states).squeeze(-1), rare)

    @torch.inference_mode()
    def start_classifier(self, tokens: int = 20_000) -> None:
        """Let the sparse head begin where it tells best how rare a token is, on some texts."""
        few = [self.mixture.texts(tokens // 10) for _ in range(10)]
        self.solve_classifier([(self.encode(drawn.mine)[-1], drawn.mine, drawn.language) for drawn in few])

    def solve_classifier(self, parts: Sequence[tuple[Tensor, Batch, Tensor]]) -> None:
        """Let the sparse head tell as well as it can how rare a token is, given last states, batches and languages."""
        found = [self._ordinary(*part) for part in parts]
        inputs = functional.pad(torch.cat([states for states, _ in found]), (0, 1), value=1.0).double()
        gram = inputs.T @ inputs
        gram.diagonal().add_(1e-3 * gram.diagonal().mean())
        solution = torch.linalg.solve(gram, inputs.T @ torch.cat([rare for _, rare in found]).double()).float()
        self.student.classifier.weight.copy_(solution[None, :-1])
        self.student.classifier.bias.copy_(solution[-1:])

    def _ordinary(self, hidden: Tensor, batch: Batch, language: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states of the tokens that are not special, and what BM25 would weigh each in its text's language."""
        ordinary = (batch.ids >= len(SPECIALS)).nonzero().squeeze(1)
        rare = self.rare[language[batch.text[ordinary]], batch.ids[ordinary]].float() ** RARITY_POWER
        return hidden[ordinary], rare * saturated_counts(batch)[ordinary] / _USUAL_FACTOR

    def sparse(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return sparse vectors over the vocabulary; of repeated tokens the largest weight counts."""
        weights = self.student.token_weights(hidden) * (batch.ids >= len(SPECIALS))
        size = self.student.config.vocab_size
        out = torch.zeros(len(batch.lengths) * size, device=self.device)
        return out.scatter_reduce(0, batch.text * size + batch.ids, weights, "amax").view(-1, size)

    def text_loss(self, tokens: int, hold: float) -> tuple[Tensor, Tensor]:
        """Return the loss of single texts; cosines to the teacher in `DIMENSIONS`, and the share of the states missed."""
        return self._learn(self.mixture.texts(tokens), hold)[:2]

    def pair_loss(self, tokens: int, hold: float) -> tuple[Tensor, Tensor]:
        """Return the loss of pairs; the shares of them that the dense and the sparse vectors find."""
        value = torch.zeros((), device=self.device)
        sides, languages = [], []
        for drawn in self.mixture.pairs(tokens):
            loss, _, states, targets = self._learn(drawn, hold)
            value = value + 0.5 * loss
            sides.append(Side(states[drawn.mine.first], self.sparse(states, drawn.mine), targets.vectors))
            languages.append(drawn.language)
        scores, lexical = self.scores(*sides)
        same = torch.equal(*languages)
        value = value + self.contrast(scores, lexical if same else None, sides[0].target, sides[1].target)
        return value, shares_found(scores, lexical)

    def dense_scores(self, questions: Tensor, passages: Tensor) -> list[Tensor]:
        """Return how well every question's vector fits every passage's, in each of `DIMENSIONS`."""
        return [unit(questions, size) @ unit(passages, size).T / _TEMPERATURE for size in DIMENSIONS]

    def scores(self, questions: Side, passages: Side) -> tuple[list[Tensor], Tensor]:
        """Return how well every question fits every passage: by the vectors in each of `DIMENSIONS`, and by the weights."""
        dense = self.dense_scores(questions.vectors, passages.vectors)
        return dense, self.scale.exp() * questions.weights @ passages.weights.T

    def contrast(self, dense: Sequence[Tensor], lexical: Tensor | None, questions: Tensor, passages: Tensor) -> Tensor:
        """Return the loss of scores, given the targets of the questions and of their passages.

        `lexical` may be None. It is for translations: the few tokens that both languages share would be taken for the important
        ones.
        """
        wanted = torch.arange(len(questions), device=self.device)
        whole = questions.shape[1]
        teacher = unit(questions, whole) @ unit(passages, whole).T / _TEMPERATURE
        value = torch.zeros((), device=self.device)
        if lexical is not None:
            found = functional.cross_entropy(lexical, wanted) + functional.cross_entropy(lexical.T, wanted)
            value = 0.5 * _SPARSE * found
        for scores, weight in zip(dense, DIMENSIONS.values(), strict=True):
            value = value + weight * _CONTRAST * functional.cross_entropy(scores, wanted)
            value = value + weight * _SIMILARITY * divergence(scores, teacher)
        return value

    def long_loss(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Return the loss of a few long documents; their cosine to the mean of their parts in each of `DIMENSIONS`."""
        drawn = self.mixture.long(tokens)
        target = self.long_target(drawn)
        vectors = self.encode(drawn.mine)[-1][drawn.mine.first]
        return distillation(vectors, target), cosines(vectors, target)

    def long_target(self, drawn: Drawn) -> Tensor:
        """Return the mean of the targets of the parts of each document, as much of each as it has tokens."""
        parts = self.centred(drawn.its.mean(self.teacher.states(drawn.its)[-1]))
        sums = torch.zeros(len(drawn.mine.lengths), parts.shape[1] + 1, device=self.device)
        sizes = drawn.its.lengths[:, None]
        sums = sums.index_add(0, drawn.part_of, functional.pad(parts, (0, 1), value=1.0) * sizes)
        return sums[:, :-1] / sums[:, -1:]

    def _learn(self, drawn: Drawn, hold: float) -> tuple[Tensor, Tensor, Tensor, Targets]:
        """Return the loss of texts, some figures, the last states and the targets."""
        targets, states = self.taught(drawn), self.encode(drawn.mine)
        vectors, missed = states[-1][drawn.mine.first], self.missed(states, targets)
        rarity = self.rarity(states[-1], drawn.mine, drawn.language)
        value = distillation(vectors, targets.vectors) + hold * (_STATES * missed + RARITY * rarity)
        return value, torch.cat([cosines(vectors, targets.vectors), missed.detach()[None]]), states[-1], targets


class Side(NamedTuple):
    """Questions, or passages: dense vectors, sparse weights over the vocabulary, and what the teacher's vectors are."""

    vectors: Tensor
    weights: Tensor
    target: Tensor


class Targets(NamedTuple):
    """What the teacher makes of some texts: their vectors, and the states of the spans after the compared layers."""

    vectors: Tensor
    spans: Spans
    states: list[Tensor]


def holding(share: float) -> float:
    """Return how much to hold on to the teacher's states and to rarities when so much of a run is over: less and less."""
    return 1 - 0.8 * share


def unit(vectors: Tensor, dimension: int) -> Tensor:
    """Return leading dimensions, at length 1."""
    return functional.normalize(vectors[:, :dimension], dim=1)


def cosines(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cosine in each of `DIMENSIONS`."""
    vectors = vectors.detach()
    return torch.stack([functional.cosine_similarity(vectors[:, :n], targets[:, :n]).mean() for n in DIMENSIONS])


def shares_found(dense: Sequence[Tensor], lexical: Tensor) -> Tensor:
    """Return the shares of questions whose passage scores best, by vectors in each of `DIMENSIONS` and by weights."""
    wanted = torch.arange(len(lexical), device=lexical.device)
    return torch.stack([(scores.argmax(1) == wanted).float().mean() for scores in (*dense, lexical)])


def divergence(scores: Tensor, teacher: Tensor) -> Tensor:
    """Return how far the student's similarities are from the teacher's, row by row."""
    return functional.kl_div(scores.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def distillation(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return cosine distance to the targets' prefixes plus divergence from the whole targets' similarities."""
    total = torch.zeros((), device=vectors.device)
    whole = unit(targets, targets.shape[1])
    teacher = (whole @ whole.T / _TEMPERATURE).fill_diagonal_(-1e4)
    for dimension, weight in DIMENSIONS.items():
        v = unit(vectors, dimension)
        total = total + weight * (1 - (v * unit(targets, dimension)).sum(1)).mean()
        if len(v) > 2:
            total = total + weight * _SIMILARITY * divergence((v @ v.T / _TEMPERATURE).fill_diagonal_(-1e4), teacher)
    return total / sum(DIMENSIONS.values())


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="what packed.py wrote")
    parser.add_argument("--start", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--state", type=Path, help="what finish.py wrote: weights to start from instead")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=90, help="length of the whole run, resumed parts together")
    parser.add_argument("--batch-tokens", type=int, default=6144, help="tokens of a step, of each process")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--embedding-lr", type=float, default=1e-4, help="0 keeps the teacher's word embeddings")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if ranks > 1:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "state.pt"
    saved_state = torch.load(state_file, weights_only=True, map_location=device) if state_file.exists() else None
    spent, step = (saved_state["spent"], saved_state["step"]) if saved_state else (0.0, 0)
    start, corpus = (torch.load(path, weights_only=True) for path in (args.start, args.corpus))
    run = Run(start, corpus, device, args.seed + step + 1000 * rank)
    student, grid_words = run.student, start["weights"]["word_embeddings.weight"].to(device)
    body = [*student.layers.parameters(), *student.embeddings_ln.parameters()]
    words = [student.word_embeddings.weight] if args.embedding_lr else []
    student.word_embeddings.weight.requires_grad_(bool(words))
    optimizer = torch.optim.AdamW(
        [
            {"params": words, "lr": args.embedding_lr},
            {"params": body, "lr": args.lr},
            {"params": [*student.classifier.parameters(), run.scale], "lr": 1e-3},
        ],
        betas=_BETAS,
        weight_decay=0.0,
        fused=True,
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    base = [group["lr"] for group in optimizer.param_groups]
    if saved_state:
        student.load_state_dict(saved_state["weights"])
        optimizer.load_state_dict(saved_state["optimizer"])
        run.scale.data = saved_state["scale"]
    elif args.state:
        student.load_state_dict(torch.load(args.state, weights_only=True, map_location=device)["weights"])
    else:
        run.start_classifier()
    if rank == 0:
        print(f"{len(run.mixture.languages)} languages, {run.dtype}, from step {step}", flush=True)
    kinds = seeded(args.seed + step)
    notes: dict[str, list[Tensor]] = {"texts": [], "pairs": [], "long": []}
    began = time.monotonic() - spent
    saved = noted = time.monotonic()
    while spent < 60 * args.minutes:
        share = spent / (60 * args.minutes)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / _WARM) * (1 - share)
        hold = holding(share)
        draw = kinds.random()
        kind = "pairs" if draw < _PAIRS else "long" if draw < _PAIRS + _LONG else "texts"
        last_part = share >= ROUNDED_FROM
        with (
            rounded(student.layers[FIRST:], last_part, eight_bits=True),
            rounded_words(student.word_embeddings, grid_words, last_part and bool(words)),
        ):
            if kind == "texts":
                value, figures = run.text_loss(args.batch_tokens, hold)
            elif kind == "pairs":
                value, figures = run.pair_loss(args.batch_tokens, hold)
            else:
                value, figures = run.long_loss(args.batch_tokens)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
        if ranks > 1:
            share_gradients(parameters, ranks)
        torch.nn.utils.clip_grad_norm_(parameters, _CLIP)
        optimizer.step()
        step += 1
        notes[kind].append(torch.cat([value.detach()[None], figures]))
        del value, figures  # else this step's states live on beside the next one's
        clock = torch.tensor(time.monotonic() - began)
        if ranks > 1:
            distributed.broadcast(clock, 0)
        spent = float(clock)
        if rank == 0 and time.monotonic() - noted > _NOTED:
            noted = time.monotonic()
            means = [
                f"{k} " + " ".join(f"{x:.3f}" for x in torch.stack(v).mean(0).tolist()) for k, v in notes.items() if v
            ]
            print(f"{spent / 60:6.2f} min  step {step}  {run.tokens * ranks} tokens  " + "  ".join(means), flush=True)
            notes = {kind: [] for kind in notes}
        if rank == 0 and time.monotonic() - saved > _SAVED:
            _save(state_file, run, optimizer, spent, step)
            saved = time.monotonic()
    if rank == 0:
        _save(state_file, run, optimizer, spent, step)
    if ranks > 1:
        distributed.destroy_process_group()


def share_gradients(parameters: Sequence[Tensor], ranks: int) -> None:
    """Replace every gradient by its mean over the processes."""
    for parameter in parameters:
        if parameter.grad is None:  # the same kind of step everywhere, yet a batch may leave a parameter out
            parameter.grad = torch.zeros_like(parameter)
        distributed.all_reduce(parameter.grad)
        parameter.grad /= ranks


def _save(path: Path, run: Run, optimizer: torch.optim.Optimizer, spent: float, step: int) -> None:
    draft = path.with_suffix(".draft")
    state = {"weights": run.student.state_dict(), "optimizer": optimizer.state_dict(), "scale": run.scale.data}
    torch.save(state | {"spent": spent, "step": step}, draft)
    draft.rename(path)


if __name__ == "__main__":
    main()
