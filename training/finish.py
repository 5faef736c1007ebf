"""Last stage of training: the layer that pools, the sparse head and perhaps some layers below, on states computed once.

    python training/finish.py --corpus corpus.pt --start start.pt --out finished.pt
    python training/finish.py --corpus corpus.pt --start start.pt --state run/state.pt --out finished.pt    # after distil.py

The layers below stay as they are. So what the first of the `--depth` last ones reads is the same in every epoch, and a step
costs these instead of all of them and the teacher. The pooling projection and the sparse head are solved for, then both and
the rest of the layers are trained, with the losses of `distil.py`. Prints on examples that are kept out: the cosine to the
teacher's vectors in each dimension, and the mean reciprocal ranks of pairs by dense vectors in each, and by sparse ones.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from batch import Batch
from distil import DIMENSIONS, RARITY, ROUNDED_FROM, Run, Side, distillation, holding
from grid import rounded
from heal import heal_pooling
from mixture import seeded
from packed import Drawn
from student import FIRST, turns
from torch import Tensor
from torch.nn import functional

_TOKENS = 4000  # of the texts that pass through together
_HELD_OUT = 10  # one example in so many
_BELOW = 0.2  # of the learning rate for layers below the last one, which were the teacher's
_WARM = 30  # steps until the learning rate is reached


class Example(NamedTuple):
    """Texts: what the trained layers read of them, (tokens, C) in float16, the teacher's vectors, (texts, C), and languages.

    Long documents have no languages: sparse weights are not trained on them.
    """

    batch: Batch
    states: Tensor
    target: Tensor
    language: Tensor | None


class Finish:
    """Examples, and what the last layers make of them."""

    def __init__(self, run: Run, depth: int = 1) -> None:
        self.run = run
        self.layers = run.student.layers[-depth:]

    @torch.no_grad()
    def example(self, batch: Batch, target: Tensor, language: Tensor | None) -> Example:
        """Run the layers below."""
        return Example(batch, self.run.encode(batch)[-1 - len(self.layers)].half(), target, language)

    @torch.no_grad()
    def taught(self, drawn: Drawn) -> Example:
        """Run the layers below and the teacher."""
        return self.example(drawn.mine, self.run.taught(drawn).vectors, drawn.language)

    @torch.no_grad()
    def long(self, drawn: Drawn) -> Example:
        """Do that for long documents."""
        return self.example(drawn.mine, self.run.long_target(drawn), None)

    def apply(self, example: Example) -> Tensor:
        """Return the last states, (tokens, C), float32."""
        return self.last(self.read_by_last(example), example)

    def read_by_last(self, example: Example) -> Tensor:
        """Return what the last layer reads, (tokens, C)."""
        hidden = example.states.float()
        with self.run.autocast():
            for layer in self.layers[:-1]:
                hidden = layer(hidden, *turns(example.batch, self.run.student.frequencies), example.batch)
        return hidden

    def last(self, hidden: Tensor, example: Example) -> Tensor:
        """Apply the last layer."""
        with self.run.autocast():
            return self.layers[-1](hidden, *turns(example.batch, self.run.student.frequencies), example.batch).float()

    def side(self, example: Example, states: Tensor) -> Side:
        """Return what the contrast reads."""
        return Side(states[example.batch.first], self.run.sparse(states, example.batch), example.target)

    def loss(self, examples: Sequence[Example], anchor: float) -> Tensor:
        """Return the loss of texts, or of questions and their passages."""
        value, vectors = torch.zeros(()), []
        for example in examples:
            states = self.apply(example)
            vectors.append(states[example.batch.first])
            value = value + distillation(vectors[-1], example.target) / len(examples)
            if example.language is not None:
                value = value + anchor * self.run.rarity(states, example.batch, example.language) / len(examples)
        if len(examples) == 2:  # by vectors only: contrasted on these few pairs, sparse weights find less elsewhere
            dense = self.run.dense_scores(*vectors)
            value = value + self.run.contrast(dense, None, examples[0].target, examples[1].target)
        return value

    def solve(self, examples: Sequence[Sequence[Example]]) -> None:
        """Solve for the pooling projection and the sparse head."""
        flat = [example for group in examples for example in group if example.language is not None]
        batches = [example.batch for example in flat]
        with torch.inference_mode():
            states = [self.read_by_last(example).float() for example in flat]
        heal_pooling(self.run.student, batches, states, [example.target for example in flat])
        with torch.inference_mode():
            some = flat[:: max(1, len(flat) // 60)]
            self.run.solve_classifier([(self.apply(example), example.batch, example.language) for example in some])

    @torch.inference_mode()
    def report(self, examples: Sequence[Sequence[Example]]) -> str:
        """Return how well examples come out, as text."""
        rows: dict[str, list[Tensor]] = {"texts": [], "long": [], "pairs": []}
        for group in examples:
            states = [self.apply(example) for example in group]
            if len(group) == 1:
                vectors, target = states[0][group[0].batch.first], group[0].target
                row = [functional.cosine_similarity(vectors[:, :n], target[:, :n]).mean() for n in DIMENSIONS]
                rows["long" if group[0].language is None else "texts"].append(torch.stack(row))
                continue
            dense, lexical = self.run.scores(*(self.side(*both) for both in zip(group, states, strict=True)))
            rows["pairs"].append(torch.stack([reciprocal_rank(scores) for scores in (*dense, lexical)]))
        means = {kind: torch.stack(few).mean(0) for kind, few in rows.items() if few}
        return "  ".join(" ".join([kind, *(f"{value:.3f}" for value in mean)]) for kind, mean in means.items())


def reciprocal_rank(scores: Tensor) -> Tensor:
    """Return the mean reciprocal rank of the diagonal."""
    return (1 / (1 + (scores > scores.diagonal()[:, None]).sum(1)).float()).mean()


def gather(
    finish: Finish, rng: random.Random, args: argparse.Namespace, say: Callable[[str], None]
) -> list[list[Example]]:
    """Draw all examples and run the layers below."""
    mixture = finish.run.mixture
    with rounded(finish.run.student.layers[FIRST : -len(finish.layers)], True):  # what is read when all is exported
        examples = [[finish.taught(side) for side in mixture.pairs(args.pair_tokens)] for _ in range(args.groups)]
        say(f"{len(examples)} groups of pairs")
        examples += [[finish.taught(mixture.texts(_TOKENS))] for _ in range(args.texts)]
        examples += [[finish.long(mixture.long(_TOKENS))] for _ in range(args.long)]
    rng.shuffle(examples)
    return examples


def train(
    finish: Finish,
    rng: random.Random,
    examples: Sequence[list[Example]],
    args: argparse.Namespace,
    say: Callable[[str], None],
) -> None:
    """Solve for what can be solved for, then train; one example in `_HELD_OUT` is only looked at."""
    run = finish.run
    held_out, shown = examples[::_HELD_OUT], [group for i, group in enumerate(examples) if i % _HELD_OUT]
    tokens = sum(len(example.states) for group in examples for example in group)
    say(f"{tokens} tokens; as it is: {finish.report(held_out)}")
    finish.solve(shown)
    say(f"solved for: {finish.report(held_out)}")
    last = [*finish.layers[-1].parameters(), *run.student.classifier.parameters()]
    rates = [(last, args.lr), (list(finish.layers[:-1].parameters()), _BELOW * args.lr)]
    parameters = [parameter for group, _ in rates for parameter in group]
    optimizer = torch.optim.AdamW(
        [{"params": group} for group, _ in rates if group], betas=(0.9, 0.98), weight_decay=0.0
    )
    step, total = 0, args.epochs * len(shown)
    for epoch in range(args.epochs):
        rng.shuffle(shown)
        for group in shown:
            share = step / total
            for parameter_group, (_, rate) in zip(optimizer.param_groups, rates, strict=False):
                parameter_group["lr"] = rate * min(1.0, (step + 1) / _WARM) * (1 - share)
            with rounded(finish.layers, share >= ROUNDED_FROM):
                optimizer.zero_grad(set_to_none=True)
                finish.loss(group, RARITY * holding(share)).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
        with rounded(finish.layers, True):
            say(f"epoch {epoch + 1}: {finish.report(held_out)}")


def main() -> None:
    """Write the weights, the last layer and the head finished."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="what packed.py wrote")
    parser.add_argument("--start", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--state", type=Path, help="state.pt of distil.py; without it, the start as it is")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=100, help="times 4,000 tokens of single texts and passages")
    parser.add_argument("--groups", type=int, default=240, help="groups of pairs")
    parser.add_argument("--pair-tokens", type=int, default=6000, help="tokens of a group")
    parser.add_argument("--long", type=int, default=30, help="times some long documents")
    parser.add_argument("--depth", type=int, default=1, help="layers to train, from the last one on")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=3)
    args = parser.parse_args()

    start, corpus = (torch.load(path, weights_only=True) for path in (args.start, args.corpus))
    run = Run(start, corpus, torch.device("cpu"), args.seed)
    if args.state:
        run.student.load_state_dict(torch.load(args.state, weights_only=True)["weights"])
    finish, rng, began = Finish(run, args.depth), seeded(args.seed), time.monotonic()

    def say(what: str) -> None:
        print(f"{(time.monotonic() - began) / 60:6.1f} min  {what}", flush=True)

    train(finish, rng, gather(finish, rng, args, say), args, say)
    torch.save({"weights": run.student.state_dict()}, args.out)


if __name__ == "__main__":
    main()
