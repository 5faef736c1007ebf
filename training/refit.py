"""After training: the layer that pools is solved for once more, because what it reads has moved.

    python training/refit.py --data FOLDER --start start.pt --state run/state.pt --out refitted.pt

Prints the mean cosine to the teacher's vectors, in the dimensions of the run, before and after, on texts that were not fitted.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from batch import Batch
from distil import DIMENSIONS
from grid import STEPS, coarse
from heal import heal_pooling
from mixture import Texts, seeded
from student import Student, config_from
from teacher import Teacher, tokenize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

_TEXTS, _HELD_OUT = 3000, 400
_LONGEST, _TOKENS = 200, 3000  # tokens of a text, and of those that pass through together


def batches_of(token_ids: list[list[int]]) -> list[list[int]]:
    """Return which texts go together: those of about one length."""
    groups: list[list[int]] = [[]]
    for text in sorted(range(len(token_ids)), key=lambda text: len(token_ids[text])):
        if (len(groups[-1]) + 1) * len(token_ids[text]) > _TOKENS and groups[-1]:
            groups.append([])
        groups[-1].append(text)
    seeded(0).shuffle(groups)
    return groups


@torch.inference_mode()
def before_pooling(student: Student, batch: Batch) -> Tensor:
    """Return what the last layer reads, (tokens, C)."""
    return student(batch)[-2]


@torch.inference_mode()
def agreement(student: Student, batches: list[Batch], targets: list[Tensor]) -> str:
    """Return the mean cosine of first tokens to targets, in every dimension, as text."""
    vectors, wanted = torch.cat([student(batch)[-1][batch.first] for batch in batches]), torch.cat(targets)
    return ", ".join(
        f"{size}: {float(functional.cosine_similarity(vectors[:, :size], wanted[:, :size]).mean()):.3f}"
        for size in DIMENSIONS
    )


def main() -> None:
    """Write the run's weights, the last layer refitted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the training folder")
    parser.add_argument("--start", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--state", type=Path, required=True, help="state.pt of distil.py")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()

    start = torch.load(args.start, weights_only=True)
    state = torch.load(args.state, weights_only=True)
    student = Student(config_from(start["shape"]))
    student.load_state_dict(state["weights"])
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.ndim == 2 and name.startswith("layers."):
                parameter.copy_(coarse(parameter, STEPS))  # as export.py will; what is solved for makes good for it
    texts, rng = Texts(args.data), seeded(args.seed)
    drawn = [texts.draw(rng).text for _ in range(_TEXTS)]
    teacher = Teacher()
    teacher.prepare()
    unit = functional.normalize(
        teacher.embed(tokenize(Tokenizer.from_str(start["teacher_tokenizer"]), drawn, 220)), dim=1
    )
    target = (unit - start["mean"]) @ start["projection"].T
    ids = tokenize(Tokenizer.from_str(start["tokenizer"]), drawn, _LONGEST)
    unseen = len(drawn) - _HELD_OUT
    held = [[unseen + text for text in group] for group in batches_of(ids[unseen:])]
    seen = batches_of(ids[:unseen])
    held_batches = [Batch([ids[text] for text in group]) for group in held]
    held_targets = [target[group] for group in held]
    print("before:", agreement(student, held_batches, held_targets), flush=True)
    batches = [Batch([ids[text] for text in group]) for group in seen]
    hidden = [before_pooling(student, batch) for batch in batches]
    heal_pooling(student, batches, hidden, [target[group] for group in seen])
    print("after:", agreement(student, held_batches, held_targets))
    torch.save({"weights": student.state_dict()}, args.out)


if __name__ == "__main__":
    main()
