"""Dense stage: the student learns the teacher's mean-pooled vectors with its first token.

The teacher runs beside the student, on the same text in its own pieces; its vectors are centred and rotated to their principal
components, so that leading dimensions come first and every prefix of a vector is worth something (Matryoshka,
arXiv:2205.13147). The loss is the cosine distance at each dimension and the divergence of the similarities within the batch.

    python training/distil.py --data FOLDER --start start.pt --out run/ --minutes 90

Resumes from `--out` by itself; the learning rate falls to zero at the end of the time.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import numpy as np
import torch
from student import Student, config_from
from teacher import Teacher, tokenize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

DIMENSIONS = (96, 192, 384)
_TEMPERATURE = 0.05
_CLIP = 1.0
_BETAS = (0.9, 0.98)


def seeded(seed: int) -> random.Random:
    """Return a source of chance that is the same in every run."""
    return random.Random(seed)  # noqa: S311 - not for secrets


def mixture(folder: Path, seed: int, longest: int = 900) -> list[str]:
    """Return training texts, shuffled: passages and questions whole, of everything else a share by source."""
    rng = seeded(seed)
    sources: dict[str, list[str]] = {}
    for source, text in corpus.texts(folder):
        sources.setdefault(source, []).append(text[:longest])
    chosen: list[str] = []
    for source in sorted(sources):
        texts = sources[source]
        part = source.split("/")[0]
        share = {"mono": len(texts) ** 0.6, "parallel": 1.5 * len(texts) ** 0.7, "queries": 4 * len(texts) ** 0.7}
        size = len(texts) if part == "qa_pairs" and "tldr" not in source else int(share.get(part, len(texts) ** 0.8))
        chosen += rng.sample(texts, min(size, len(texts)))
    rng.shuffle(chosen)
    return chosen


def batches(
    texts: list[str], tokenizer: Tokenizer, tokens: int, longest: int, rng: random.Random
) -> Iterator[list[int]]:
    """Yield positions of texts of one token length, over and over; a few last tokens are dropped to make lengths equal."""
    while True:
        order = list(range(len(texts)))
        rng.shuffle(order)
        for start in range(0, len(order), 8192):
            window = order[start : start + 8192]
            by_length: dict[int, list[int]] = {}
            for position, ids in zip(window, tokenize(tokenizer, [texts[i] for i in window], longest), strict=True):
                by_length.setdefault(round_length(len(ids)), []).append(position)
            ready = []
            for length, members in by_length.items():
                size = max(8, tokens // length)
                ready += [
                    members[i : i + size] for i in range(0, len(members), size) if len(members[i : i + size]) >= 8
                ]
            rng.shuffle(ready)
            yield from ready


def round_length(length: int) -> int:
    """Return the length a text is cut to: exact when short, a multiple of 8 or 16 above."""
    step = 1 if length <= 32 else 4 if length <= 64 else 8 if length <= 128 else 16
    return length // step * step


def cut(ids: list[list[int]]) -> Tensor:
    """Return ids of texts of nearly the same length as one tensor; the closing token stays."""
    length = min(round_length(len(row)) for row in ids)
    return torch.tensor([row if len(row) == length else row[: length - 1] + row[-1:] for row in ids])


def loss(vectors: Tensor, targets: Tensor) -> Tensor:
    """Return cosine distance plus divergence of in-batch similarities, averaged over the dimensions."""
    total = torch.zeros(())
    for dimension in DIMENSIONS:
        v = functional.normalize(vectors[:, :dimension], dim=1)
        t = functional.normalize(targets[:, :dimension], dim=1)
        total = total + (1 - (v * t).sum(1)).mean()
        student, teacher = (v @ v.T / _TEMPERATURE).fill_diagonal_(-1e4), (t @ t.T / _TEMPERATURE).fill_diagonal_(-1e4)
        total = total + 0.1 * functional.kl_div(
            student.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
        )
    return total / len(DIMENSIONS)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the training folder")
    parser.add_argument("--start", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, default=90, help="length of the whole run, resumed parts together")
    parser.add_argument("--batch-tokens", type=int, default=6144)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest text")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--embedding-lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    start = torch.load(args.start, weights_only=True)
    torch.manual_seed(args.seed)
    tokenizer = Tokenizer.from_str(start["tokenizer"])
    teacher_tokenizer = Tokenizer.from_str(start["teacher_tokenizer"])
    teacher = Teacher()
    teacher.prepare(torch.bfloat16)
    student = Student(config_from(start["shape"]))
    student.load_state_dict(start["weights"])
    groups = [
        {"params": [student.word_embeddings.weight], "lr": args.embedding_lr, "weight_decay": 0.0},
        {
            "params": [p for n, p in student.named_parameters() if n.startswith(("layers", "embeddings_ln"))],
            "lr": args.lr,
        },
    ]
    optimizer = torch.optim.AdamW(groups, betas=_BETAS, weight_decay=0.01)
    base = [group["lr"] for group in optimizer.param_groups]
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "state.pt"
    spent, step, seen = 0.0, 0, 0
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        student.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        spent, step, seen = state["spent"], state["step"], state["seen"]
    texts = mixture(args.data, args.seed)
    print(f"{len(texts)} texts, resuming at step {step}", flush=True)
    stream = batches(texts, tokenizer, args.batch_tokens, args.longest, seeded(args.seed + step))
    began, saved, running = time.monotonic() - spent, time.monotonic(), []
    for members in stream:
        spent = time.monotonic() - began
        share = spent / (60 * args.minutes)
        if share >= 1:
            break
        ids = cut(tokenize(tokenizer, [texts[i] for i in members], args.longest))
        raw = torch.from_numpy(
            teacher.embed(tokenize(teacher_tokenizer, [texts[i] for i in members], 384)).astype(np.float32)
        )
        targets = (functional.normalize(raw, dim=1) - start["mean"]) @ start["rotation"].T
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * min(1.0, (step + 1) / 30) * (1 - share)
        with torch.autocast("cpu", torch.bfloat16):
            hidden = student(ids)
        value = loss(hidden[:, 0], targets)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), _CLIP)
        optimizer.step()
        step, seen = step + 1, seen + len(members)
        cosine = (
            (functional.normalize(hidden[:, 0].detach(), dim=1) * functional.normalize(targets, dim=1)).sum(1).mean()
        )
        running.append((float(value.detach()), float(cosine)))
        if step % 20 == 0:
            mean = np.mean(running, axis=0)
            print(
                f"{spent / 60:6.1f} min  step {step}  texts {seen}  loss {mean[0]:.4f}  cosine {mean[1]:.4f}",
                flush=True,
            )
            running.clear()
        if time.monotonic() - saved > 180:
            _save(state_file, student, optimizer, spent, step, seen)
            saved = time.monotonic()
    _save(state_file, student, optimizer, spent, step, seen)


def _save(path: Path, student: Student, optimizer: torch.optim.Optimizer, spent: float, step: int, seen: int) -> None:
    draft = path.with_suffix(".draft")
    state = {"weights": student.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state | {"spent": spent, "step": step, "seen": seen}, draft)
    draft.rename(path)


if __name__ == "__main__":
    main()
