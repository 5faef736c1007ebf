"""The training run: dense vectors from the teacher, sparse weights by contrast, passages and long documents.

Every step is one of three kinds:

- **texts**: the first token learns the teacher's mean-pooled vector of the same text in the teacher's own pieces. Its vectors
  are centred and rotated to their principal components, so that leading dimensions come first, and every prefix also learns the
  similarities of the whole vector within the batch (Matryoshka, arXiv:2205.13147).
- **pairs**: a question and its passage or a sentence and its translation, among others that share words: the same, and both
  the vectors and the sparse weights must find the other half.
- **long**: the target of a document of 600 to 4,096 tokens is the mean over its parts.

The sparse weight of a token starts as its rarity in its language, then contrast takes over.

    python training/distil.py --data FOLDER --start start.pt --out run/ --minutes 90

Resumes from `--out` by itself; the learning rate falls to zero at the end of the time.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from grid import rounded_layers
from mixture import Pairs, Text, Texts, long_document, round_length, seeded, text_batches
from student import Student, config_from
from teacher import Teacher, tokenize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from vocabulary import SPECIALS

DIMENSIONS = {96: 0.5, 192: 0.5, 384: 1.0}  # prefix: weight in the loss
_PAIRS, _LONG = 0.22, 0.03  # shares of steps
_PAIR_BATCH = 40
_TEMPERATURE = 0.05
_SIMILARITY = 0.15  # weight of the divergence of similarities
_CONTRAST, _SPARSE, _RARITY = 0.1, 0.3, 1.0
_CLIP = 1.0
_ROUNDED_FROM = 0.7  # share of the run from which on the layers are rounded as `export.py` will
_BETAS = (0.9, 0.98)


class Run:
    """Models, data and the loss of each kind of step."""

    def __init__(self, start: dict[str, Tensor], folder: Path, longest: int) -> None:
        """Read the data and build the models from what `prepare.py` wrote."""
        self.start, self.longest = start, longest
        self.tokenizer = Tokenizer.from_str(start["tokenizer"])
        self.teacher_tokenizer = Tokenizer.from_str(start["teacher_tokenizer"])
        self.teacher = Teacher()
        self.teacher.prepare(torch.bfloat16)
        self.student = Student(config_from(start["shape"]))
        self.student.load_state_dict(start["weights"])
        self.scale = torch.nn.Parameter(torch.tensor(1.0))  # log of what a sparse score is worth in the contrast
        self.texts = Texts(folder)
        self.pairs = Pairs(folder, self.tokenizer)
        rare = self.texts.inverse_frequencies(self.tokenizer)
        self.rare = {language: torch.from_numpy(values) for language, values in rare.items()}

    def targets(self, texts: Sequence[str]) -> Tensor:
        """Return the teacher's vectors of texts, centred and rotated: float32 (texts, C)."""
        return self._turned(self.teacher.embed(tokenize(self.teacher_tokenizer, texts, 512)))

    def _turned(self, raw: np.ndarray) -> Tensor:
        unit = functional.normalize(torch.from_numpy(raw.astype(np.float32)), dim=1)
        return (unit - self.start["mean"]) @ self.start["rotation"].T

    def encode(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Return last hidden states, padded ids and which are real."""
        width = max(map(len, ids))
        padded = torch.tensor([[*row, *[1] * (width - len(row))] for row in ids])
        real = padded != 1
        with torch.autocast("cpu", torch.bfloat16):
            return self.student(padded, None if bool(real.all()) else real), padded, real

    def rarity(self, hidden: Tensor, ids: Tensor, real: Tensor, languages: Sequence[str]) -> Tensor:
        """Return how far the sparse weights are from the rarity of their tokens."""
        target = torch.stack([self.rare[language][row] for language, row in zip(languages, ids, strict=True)])
        ordinary = real & (ids >= len(SPECIALS))
        raw = self.student.classifier(hidden).squeeze(-1)
        return functional.mse_loss(raw[ordinary], target[ordinary])

    def sparse(self, hidden: Tensor, ids: Tensor, real: Tensor) -> Tensor:
        """Return sparse vectors over the vocabulary; of repeated tokens the largest weight counts."""
        weights = self.student.token_weights(hidden) * (real & (ids >= len(SPECIALS)))
        out = torch.zeros(len(ids), self.student.config.vocab_size)
        return out.scatter_reduce(1, ids, weights, "amax")

    def text_loss(self, texts: Sequence[Text], ids: Sequence[Sequence[int]], anchor: float) -> tuple[Tensor, float]:
        """Return the loss of single texts and their cosine to the teacher."""
        targets = self.targets([text.text for text in texts])
        hidden, padded, real = self.encode(ids)
        value = distillation(hidden[:, 0], targets)
        value = value + anchor * self.rarity(hidden, padded, real, [text.language for text in texts])
        return value, cosine(hidden[:, 0], targets)

    def pair_loss(self, rng: random.Random, anchor: float) -> tuple[Tensor, float]:
        """Return the loss of pairs, and the share of them that the sparse vectors find."""
        pairs = self.pairs.draw(_PAIR_BATCH, rng)
        first, second = [pair.first[:1600] for pair in pairs], [pair.second[:1600] for pair in pairs]
        q_targets, p_targets = self.targets(first), self.targets(second)
        q = self.encode(tokenize(self.tokenizer, first, 96))
        p = self.encode(tokenize(self.tokenizer, second, self.longest))
        value = 0.5 * (distillation(q[0][:, 0], q_targets) + distillation(p[0][:, 0], p_targets))
        wanted = torch.arange(len(pairs))
        teacher = functional.normalize(q_targets, dim=1) @ functional.normalize(p_targets, dim=1).T / _TEMPERATURE
        for dimension, weight in DIMENSIONS.items():
            scores = unit(q[0][:, 0], dimension) @ unit(p[0][:, 0], dimension).T / _TEMPERATURE
            value = value + weight * _CONTRAST * functional.cross_entropy(scores, wanted)
            value = value + weight * _SIMILARITY * divergence(scores, teacher)
        scores = self.scale.exp() * self.sparse(*q) @ self.sparse(*p).T
        loss = functional.cross_entropy(scores, wanted) + functional.cross_entropy(scores.T, wanted)
        value = value + 0.5 * _SPARSE * loss
        value = value + 0.5 * anchor * self.rarity(*q, [pair.first_language for pair in pairs])
        value = value + 0.5 * anchor * self.rarity(*p, [pair.second_language for pair in pairs])
        return value, float((scores.argmax(1) == wanted).float().mean())

    def long_loss(self, rng: random.Random, tokens: int) -> tuple[Tensor, float]:
        """Return the loss of a few long documents and their cosine to the mean of their parts."""
        length = int(2 ** rng.uniform(9.3, 12))
        documents = [long_document(self.texts, length, rng) for _ in range(max(2, tokens // length))]
        ids = tokenize(self.tokenizer, [" ".join(parts) for parts in documents], length)
        shortest = round_length(min(map(len, ids)))
        ids = [row[: shortest - 1] + row[-1:] for row in ids]
        targets = []
        for parts, row in zip(documents, ids, strict=True):
            pieces = tokenize(self.teacher_tokenizer, [" ".join(parts)], 1 << 20)[0]
            pieces = pieces[: max(8, len(pieces) * len(row) // len(self.tokenizer.encode(" ".join(parts)).ids))]
            raw = self.teacher.embed([pieces[i : i + 400] for i in range(0, max(1, len(pieces) - 100), 400)])
            turned = functional.normalize(torch.from_numpy(raw.astype(np.float32)), dim=1).mean(0, keepdim=True)
            targets.append((turned - self.start["mean"]) @ self.start["rotation"].T)
        target = torch.cat(targets)
        hidden, _, _ = self.encode(ids)
        return distillation(hidden[:, 0], target), cosine(hidden[:, 0], target)


def unit(vectors: Tensor, dimension: int) -> Tensor:
    """Return leading dimensions, at length 1."""
    return functional.normalize(vectors[:, :dimension], dim=1)


def cosine(vectors: Tensor, targets: Tensor) -> float:
    """Return the mean cosine."""
    return float((functional.normalize(vectors.detach(), dim=1) * functional.normalize(targets, dim=1)).sum(1).mean())


def divergence(scores: Tensor, teacher: Tensor) -> Tensor:
    """Return how far the student's similarities are from the teacher's, row by row."""
    return functional.kl_div(scores.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean")


def distillation(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return cosine distance to the targets' prefixes plus divergence from the whole targets' similarities."""
    total = torch.zeros(())
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
    parser.add_argument("--data", type=Path, required=True, help="the training folder")
    parser.add_argument("--start", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=90, help="length of the whole run, resumed parts together")
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--longest", type=int, default=320, help="tokens of the longest text")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--embedding-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    run = Run(torch.load(args.start, weights_only=True), args.data, args.longest)
    student = run.student
    body = [p for n, p in student.named_parameters() if n.startswith(("layers", "embeddings_ln"))]
    optimizer = torch.optim.AdamW(
        [
            {"params": [student.word_embeddings.weight], "lr": args.embedding_lr},
            {"params": body, "lr": args.lr},
            {"params": [*student.classifier.parameters(), run.scale], "lr": 1e-3},
        ],
        betas=_BETAS,
        weight_decay=0.0,
        fused=True,
    )
    base = [group["lr"] for group in optimizer.param_groups]
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "state.pt"
    spent, step, seen = 0.0, 0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        student.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        run.scale.data = state["scale"]
        spent, step, seen = state["spent"], state["step"], state["seen"]
    print(f"{len(run.texts.languages)} languages, resuming at step {step}", flush=True)
    rng = seeded(args.seed + step)
    stream = text_batches(run.texts, run.tokenizer, args.batch_tokens, args.longest, rng)
    saved, notes = time.monotonic(), {"texts": [], "pairs": [], "long": []}  # type: ignore[var-annotated]
    while spent < 60 * args.minutes:
        began = time.monotonic()
        share = spent / (60 * args.minutes)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / 30) * (1 - share)
        anchor = _RARITY * (1 - 0.8 * share)
        draw = rng.random()
        kind = "pairs" if draw < _PAIRS else "long" if draw < _PAIRS + _LONG else "texts"
        with rounded_layers(student, share >= _ROUNDED_FROM):
            if kind == "texts":
                texts, ids = next(stream)
                value, figure = run.text_loss(texts, ids, anchor)
                seen += len(texts)
            elif kind == "pairs":
                value, figure = run.pair_loss(rng, anchor)
                seen += 2 * _PAIR_BATCH
            else:
                value, figure = run.long_loss(rng, args.batch_tokens)
                seen += 2
            optimizer.zero_grad(set_to_none=True)
            value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), _CLIP)
        optimizer.step()
        step += 1
        notes[kind].append((float(value.detach()), figure))
        spent += time.monotonic() - began
        if step % 25 == 0:
            means = "  ".join("{} {:.3f} {:.3f}".format(k, *np.mean(v, axis=0)) for k, v in notes.items() if v)
            print(f"{spent / 60:6.1f} min  step {step}  seen {seen}  {means}", flush=True)
            notes = {kind: [] for kind in notes}
        if time.monotonic() - saved > 240:
            _save(state_file, run, optimizer, spent, step, seen)
            saved = time.monotonic()
    _save(state_file, run, optimizer, spent, step, seen)


def _save(path: Path, run: Run, optimizer: torch.optim.Optimizer, spent: float, step: int, seen: int) -> None:
    draft = path.with_suffix(".draft")
    state = {"weights": run.student.state_dict(), "optimizer": optimizer.state_dict(), "scale": run.scale.data}
    torch.save(state | {"spent": spent, "step": step, "seen": seen}, draft)
    draft.rename(path)


if __name__ == "__main__":
    main()
