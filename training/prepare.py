"""First stage: vocabulary, statistics of the teacher, and the transplanted student.

python training/prepare.py --data FOLDER --out start.pt
python training/distil.py --data FOLDER --start start.pt --out run/ --minutes 90
python training/export.py --start start.pt --state run/state.pt --out gte-mini/
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import vocabulary
from mixture import Texts, seeded
from student import CONSTANT, config_from, transplant
from teacher import Teacher, tokenize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

_LANGUAGE_POWER = 0.3  # a language's counts are divided by its tokens to this power: small ones keep their pieces
_XLMR_SHARE = 0.8  # of XLM-R's own frequencies beside the counted ones
_SAMPLE, _STATED = 12_000, 1500  # texts whose vectors, and whose hidden states are looked at


def count_pieces(texts: Texts, tokenizer: Tokenizer, scores: Sequence[float], most: int = 60_000) -> Counter[int]:
    """Count pieces over all training text, each language damped by its size, and mix with XLM-R's own frequencies.

    The training text is small: a piece it lacks may be common elsewhere, which XLM-R's scores know.
    """
    rng = seeded(0)
    counts: Counter[int] = Counter()
    for parts in texts.pools.values():
        members = [text for part in parts.values() for text in part]
        chosen = rng.sample(members, min(most, len(members)))
        one = vocabulary.count(tokenizer, chosen)
        weight = len(members) / len(chosen) / (one.total() * len(members) / len(chosen)) ** _LANGUAGE_POWER
        for piece, number in one.items():
            counts[piece] += number * weight  # type: ignore[assignment]
    reachable = {
        i: math.exp(score) for i, score in enumerate(scores) if i >= len(vocabulary.SPECIALS) and lower(tokenizer, i)
    }
    share = _XLMR_SHARE * counts.total() / sum(reachable.values())
    for piece, frequency in reachable.items():
        counts[piece] += frequency * share  # type: ignore[assignment]
    return counts


def lower(tokenizer: Tokenizer, piece: int) -> bool:
    """Tell whether a piece can occur in lower-cased text."""
    text = tokenizer.id_to_token(piece)
    return text == text.lower()


def sample(texts: Texts, seed: int, size: int) -> list[str]:
    """Return texts and passages of all languages, as training draws them."""
    rng = seeded(seed)
    return [texts.draw(rng).text for _ in range(size)]


@torch.inference_mode()
def statistics(teacher: Teacher, token_ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """Look at the teacher on real text.

    Returns:
        ``constants``: mean of channel `CONSTANT` after every LayerNorm; ``first``: mean last hidden state of the first token;
        ``importance``: of every neuron of every MLP; ``mean`` and ``rotation``: mean of the unit vectors and their principal
        components, strongest first, as rows; ``pool_norm``: usual length of a mean-pooled vector.
    """
    sums: dict[str, Tensor] = {}
    tokens = 0
    firsts: list[Tensor] = []
    stated = [list(ids) for ids in token_ids[:_STATED]]
    for ids in stated:
        trace = teacher.trace(torch.tensor([ids]))
        tokens += len(ids)
        firsts.append(trace["last"][0, 0])
        for name, value in (("constants", trace["norms"][..., CONSTANT].sum((1, 2))), ("squares", trace["squares"])):
            sums[name] = sums[name] + value if name in sums else value
    outgoing = torch.stack([teacher.weights[f"l{layer}.fo.w"].norm(dim=0) for layer in range(teacher.num_layers)])
    pooled = torch.from_numpy(teacher.embed(token_ids).astype(np.float32))
    unit = functional.normalize(pooled, dim=1)
    centred = unit - unit.mean(0)
    _, components = torch.linalg.eigh(centred.T @ centred)
    signs = torch.randint(0, 2, (len(components), 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return {
        "constants": sums["constants"] / tokens,
        "importance": (sums["squares"] / tokens).sqrt() * outgoing,
        "first": torch.stack(firsts).mean(0),
        "mean": unit.mean(0),
        "rotation": components.flip(1).T * signs,  # signs: no component may stand out in the mean over channels
        "pool_norm": pooled.norm(dim=1).mean(),
        "spread": centred.norm(dim=1).mean(),
    }


def main() -> None:
    """Write what `distil.py` starts from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the training folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=112_000, help="pieces")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[0, 1, 2, 3, 5, 6, 8, 9, 10, 11], help="of the teacher's"
    )
    parser.add_argument("--inner", type=int, default=1536, help="width of the MLP")
    parser.add_argument(
        "--rope-factor", type=float, default=8.0, help="the teacher knows no rotation: start with a slow one"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    teacher = Teacher()
    pieces = [piece.decode() for piece in teacher.pieces]
    whole = vocabulary.build(pieces, teacher.scores)
    texts = Texts(args.data)
    lowercase = vocabulary.build(pieces, teacher.scores, lowercase=True)
    kept = vocabulary.select(pieces, count_pieces(texts, lowercase, teacher.scores), args.vocabulary)
    tokenizer = vocabulary.build([pieces[i] for i in kept], [teacher.scores[i] for i in kept], lowercase=True)
    teacher.prepare()
    seen = statistics(teacher, tokenize(whole, sample(texts, args.seed, _SAMPLE), 160))
    shape: dict[str, Any] = {
        "vocab_size": len(kept),
        "hidden_size": teacher.hidden_size,
        "num_layers": len(args.layers) + 1,
        "num_heads": teacher.num_heads,
        "intermediate_size": args.inner,
        "type_vocab_size": 0,
        "rope_theta": 160_000.0,
        "rope_scaling": {"kind": "linear", "factor": args.rope_factor},
    }
    student = transplant(
        teacher,
        kept,
        args.layers,
        config_from(shape),
        seen["constants"],
        seen["mean"] * seen["pool_norm"],
        seen["rotation"] / seen["spread"] / seen["pool_norm"] * seen["first"].norm(),
        seen["first"],
        [row.topk(args.inner).indices.sort().values for row in seen["importance"]],
    )
    start = {"shape": shape, "weights": student.state_dict(), "mean": seen["mean"], "rotation": seen["rotation"]}
    torch.save(start | {"tokenizer": tokenizer.to_str(), "teacher_tokenizer": whole.to_str()}, args.out)
    print(f"{args.out}: {asdict(student.config)}")


if __name__ == "__main__":
    main()
