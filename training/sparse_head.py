"""Sparse stage: one vector and a bias over the finished encoder, by contrast of questions and passages within a batch.

The encoder is frozen, so its hidden states are computed once. A batch comes from one source, which makes its other passages
hard negatives: the same language, the same kind of text. Words that all of them share cannot tell them apart and lose weight.

    python training/sparse_head.py --data FOLDER --start start.pt --state run/state.pt --out model.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

import corpus
import torch
from distil import seeded
from student import Student, config_from
from teacher import tokenize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

_LONGEST = {"question": 48, "passage": 160}  # tokens
_BATCH = 48
_SPECIALS = 4


@torch.inference_mode()
def states(student: Student, ids: list[list[int]]) -> list[Tensor]:
    """Return the hidden states of every text, bfloat16, each (tokens, C)."""
    out: list[Tensor] = [torch.empty(0)] * len(ids)
    by_length: dict[int, list[int]] = {}
    for position, row in enumerate(ids):
        by_length.setdefault(len(row), []).append(position)
    for length, members in by_length.items():
        step = max(1, 6144 // length)
        for start in range(0, len(members), step):
            part = members[start : start + step]
            with torch.autocast("cpu", torch.bfloat16):
                hidden = student(torch.tensor([ids[i] for i in part]))
            for position, row in zip(part, hidden.bfloat16(), strict=True):
                out[position] = row
    return out


def vectors(student: Student, ids: list[list[int]], hidden: list[Tensor]) -> Tensor:
    """Return sparse vectors as rows over the vocabulary; of repeated tokens the largest weight counts."""
    weights = student.token_weights(torch.cat(hidden).float()[None])[0]
    tokens = torch.tensor([token for row in ids for token in row])
    rows = torch.repeat_interleave(torch.arange(len(ids)), torch.tensor([len(row) for row in ids]))
    weights = torch.where(tokens >= _SPECIALS, weights, torch.zeros(()))
    flat = torch.zeros(len(ids) * student.config.vocab_size)
    flat = flat.scatter_reduce(0, rows * student.config.vocab_size + tokens, weights, "amax")
    return flat.view(len(ids), -1)


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the training folder")
    parser.add_argument("--start", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--state", type=Path, required=True, help="state.pt of distil.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    start = torch.load(args.start, weights_only=True)
    tokenizer = Tokenizer.from_str(start["tokenizer"])
    student = Student(config_from(start["shape"]))
    student.load_state_dict(torch.load(args.state, weights_only=True)["weights"])
    rng = seeded(args.seed)
    by_source: dict[str, list[corpus.Pair]] = {}
    for pair in corpus.question_pairs(args.data):
        if "tldr" not in pair.source:
            by_source.setdefault(pair.source, []).append(pair)
    for pair in corpus.translation_pairs(args.data):  # the same words in two languages: names, numbers, borrowed words
        if pair.source.startswith("ntrex128"):
            by_source.setdefault(pair.source, []).append(pair)
    sources = sorted(source for source, pairs in by_source.items() if len(pairs) >= _BATCH)
    total = sum(len(by_source[source]) ** 0.5 for source in sources)
    chosen: list[corpus.Pair] = []
    places: dict[str, list[int]] = {}
    for source in sources:
        pairs = by_source[source]
        size = max(_BATCH, min(len(pairs), round(args.pairs * len(pairs) ** 0.5 / total)))
        places[source] = list(range(len(chosen), len(chosen) + size))
        chosen += rng.sample(pairs, size)
    print(f"{len(chosen)} pairs of {len(sources)} sources", flush=True)
    questions = tokenize(tokenizer, [pair.first for pair in chosen], _LONGEST["question"])
    passages = tokenize(tokenizer, [pair.second for pair in chosen], _LONGEST["passage"])
    question_states, passage_states = states(student, questions), states(student, passages)
    print("states computed", flush=True)

    torch.nn.init.normal_(student.classifier.weight, std=0.02)
    torch.nn.init.constant_(student.classifier.bias, 0.5)
    scale = torch.nn.Parameter(torch.tensor(2.0))
    optimizer = torch.optim.Adam([*student.classifier.parameters(), scale], lr=args.lr)
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - step / args.steps)
        source = rng.choice(sources)
        members = rng.sample(places[source], _BATCH)
        q = vectors(student, [questions[i] for i in members], [question_states[i] for i in members])
        p = vectors(student, [passages[i] for i in members], [passage_states[i] for i in members])
        scores = scale.exp() * q @ p.T
        value = functional.cross_entropy(scores, torch.arange(_BATCH))
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(
                f"step {step + 1}  {source}  loss {value.item():.3f}  score {scores.diag().mean().item():.2f}",
                flush=True,
            )
    # A matching question and passage score a few units, several times the cosine, as with the full models.
    torch.save({"weights": student.state_dict(), "scale": scale.item()}, args.out)


if __name__ == "__main__":
    main()
