"""First stage: vocabulary, statistics of the teacher, the transplanted student, and what can be solved for without training.

    python training/prepare.py --data FOLDER --out start.pt

About twenty minutes on two processor cores.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import vocabulary
from alignment import common
from batch import Batch, by_length
from counting import place_counting
from grid import EMBEDDING_STEPS, coarse
from heal import Lesson, heal, heal_pooling, heal_words, place_pooling
from mixture import RARITY_POWER, Texts, seeded
from student import CARRIED, CARRYING, CONSTANT, RARE_SCALE, config_from, transplant
from teacher import Teacher, tokenize
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

_LANGUAGE_POWER = 0.3  # a language's counts are divided by its tokens to this power: small ones keep their pieces
_XLMR_SHARE = 0.8  # of XLM-R's own frequencies beside the counted ones
_WHITENED = 0.35  # how far the target's components are brought to one variance: 0 not at all, 1 all the way
_BETWEEN = 2.0  # what differs between languages counts so often in that: it is damped
_SAMPLE, _STATED = 2500, 500  # texts whose vectors, and whose hidden states are looked at
_COUNTED = 600  # texts that counting is fitted to
_WORDED, _HEALED = 4000, 2500  # texts that word embeddings, and then the layers are fitted to
_LONGEST, _TOKENS = 320, 4000  # tokens of such a text, and of those that pass through together


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


def sample(texts: Texts, seed: int, size: int) -> tuple[list[str], list[str]]:
    """Return texts and passages of all languages, as training draws them, and their languages."""
    rng = seeded(seed)
    drawn = [texts.draw(rng) for _ in range(size)]
    return [text.text for text in drawn], [text.language for text in drawn]


def words_as_written(teacher: Teacher, pieces: Sequence[str], kept: Sequence[int]) -> Tensor:
    """Return the teacher's embeddings of lower-cased pieces: the means over the ways to write each, by frequency."""
    ways: dict[str, list[int]] = {}
    for piece, text in enumerate(pieces):
        ways.setdefault(text.lower(), []).append(piece)
    its_words = teacher.weights["emb.word"]
    words = its_words[torch.tensor(list(kept))]
    for row in range(len(vocabulary.SPECIALS), len(kept)):
        same = torch.tensor(ways[pieces[kept[row]]])
        if len(same) > 1:
            words[row] = torch.tensor([teacher.scores[piece] for piece in same]).softmax(0) @ its_words[same]
    return words


@torch.inference_mode()
def statistics(teacher: Teacher, token_ids: Sequence[Sequence[int]], languages: Sequence[str]) -> dict[str, Tensor]:
    """Look at the teacher on real text.

    Args:
        teacher: Prepared in float32.
        token_ids: Texts in the teacher's tokens.
        languages: Of each text.

    Returns:
        ``constants``: mean of channel `CONSTANT` after every LayerNorm; ``norms``: what `transplant` wants to know of them;
        ``size``: usual length of a last hidden state;
        ``importance``: of every neuron of every MLP; ``mean``: of the unit vectors; ``projection``: see `target_projection`;
        ``pool_norm``: usual length of a mean-pooled vector.
    """
    batch = Batch.of([list(ids) for ids in token_ids[:_STATED]])
    hidden = teacher.embedded(batch)
    constants, norms, squares = [], [], []

    def look(before: Tensor, after: Tensor) -> Tensor:
        constants.append(after[:, CONSTANT].mean())
        usual = 1 / before.std(1).reciprocal().mean()
        norms.append(torch.stack([before.mean(1).mean(), usual, *after[:, CARRIED].mean(0)]))
        return after

    look(hidden, hidden)
    for layer in range(teacher.num_layers):
        before = teacher.attended(hidden, layer, batch)
        hidden = look(before, teacher.norm(before, f"l{layer}.aln"))
        neurons = teacher.neurons(hidden, layer)
        squares.append(neurons.square().mean(0))
        before = hidden + teacher.linear(neurons, f"l{layer}.fo")
        hidden = look(before, teacher.norm(before, f"l{layer}.oln"))
    outgoing = torch.stack([teacher.weights[f"l{layer}.fo.w"].norm(dim=0) for layer in range(teacher.num_layers)])
    pooled = teacher.embed(token_ids)
    unit = functional.normalize(pooled, dim=1)
    centred = unit - unit.mean(0)
    return {
        "constants": torch.stack(constants),
        "norms": torch.stack(norms),
        "importance": torch.stack(squares).sqrt() * outgoing,
        "size": hidden.norm(dim=1).mean(),
        "mean": unit.mean(0),
        "projection": target_projection(centred, languages),
        "pool_norm": pooled.norm(dim=1).mean(),
        "spread": centred.norm(dim=1).mean(),
    }


def target_projection(centred: Tensor, languages: Sequence[str]) -> Tensor:
    """Return the map from the teacher's vectors to what the student shall learn.

    The teacher spends its strongest components on few things, the language of a text before all. They are damped: every
    component a part of the way to one variance, and what differs between languages a little more. On training pairs that
    finds more, most of all in leading dimensions and across languages.

    Args:
        centred: The teacher's unit vectors less their mean, (texts, C).
        languages: Of each text.

    Returns:
        float32, (C, C): principal components of the damped vectors as rows, strongest first, at the usual length of `centred`.
    """
    centred = centred.double()
    rows: dict[str, list[int]] = {}
    for row, language in enumerate(languages):
        rows.setdefault(language, []).append(row)
    means = torch.zeros_like(centred)
    for members in rows.values():
        means[members] = centred[members].mean(0)
    total = centred.T @ centred / len(centred)
    within = (centred - means).T @ (centred - means) / (len(centred) - len(rows))
    between, directions = torch.linalg.eigh(total - within)
    between = directions * between.clamp(min=0) @ directions.T
    variances, directions = torch.linalg.eigh(within + _BETWEEN * between)
    damping = directions * variances.clamp(min=1e-9) ** (-_WHITENED / 2) @ directions.T
    _, components = torch.linalg.eigh(damping @ total @ damping)
    projection = components.flip(1).T @ damping
    projection *= centred.norm(dim=1).mean() / (centred @ projection.T).norm(dim=1).mean()
    projection *= projection.gather(1, projection.abs().argmax(1, keepdim=True)).sign()  # the same on every machine
    signs = torch.randint(0, 2, (len(components), 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return (projection * signs).float()  # signs: no component may stand out in the mean over channels


def centred_rarity(rare: Tensor, token_ids: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """Return how much rarer each token is than the mean over real text, and that; special tokens are at the mean."""
    counts = torch.bincount(torch.tensor([token for ids in token_ids for token in ids]), minlength=len(rare)).float()
    counts[: len(vocabulary.SPECIALS)] = 0
    usual = (rare * counts).sum() / counts.sum()
    centred = rare - usual
    centred[: len(vocabulary.SPECIALS)] = 0
    return centred, float(usual)


def lessons(texts: Sequence[str], tokenizer: Tokenizer, teacher_tokenizer: Tokenizer) -> list[Lesson]:
    """Return texts of at most `_LONGEST` tokens, those of about one length together, in the tokens of both."""
    mine, its = tokenizer.encode_batch(list(texts)), teacher_tokenizer.encode_batch(list(texts))
    fitting = [i for i in range(len(texts)) if max(len(mine[i].ids), len(its[i].ids)) <= _LONGEST]
    groups: list[list[int]] = [[]]
    for i in sorted(fitting, key=lambda i: len(mine[i].ids)):
        groups[-1].append(i)
        if sum(len(mine[member].ids) for member in groups[-1]) >= _TOKENS:
            groups.append([])
    seeded(0).shuffle(groups)
    made = []
    for group in filter(None, groups):
        sides = [mine[i] for i in group], [its[i] for i in group]
        spans = common(*sides, [len(encoding.ids) for encoding in sides[0]])
        made.append(Lesson(*(Batch.of([encoding.ids for encoding in side]) for side in sides), spans, {}))
    return made


def main() -> None:
    """Write what `distil.py` starts from."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the training folder")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--vocabulary", type=int, default=132_000, help="pieces")
    parser.add_argument("--layers", type=int, nargs="+", default=list(range(12)), help="of the teacher's")
    parser.add_argument("--inner", type=int, default=1536, help="width of the MLP")
    parser.add_argument(
        "--rope-theta", type=float, default=1e10, help="so large that most channels of a head hardly turn"
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
    drawn, languages = sample(texts, args.seed, _SAMPLE)
    seen = statistics(teacher, tokenize(whole, drawn, 160), languages)
    shape: dict[str, Any] = {
        "vocab_size": len(kept),
        "hidden_size": teacher.hidden_size,
        "num_layers": len(args.layers) + 2,
        "num_heads": teacher.num_heads,
        "intermediate_size": args.inner,
        "type_vocab_size": 0,
        "rope_theta": args.rope_theta,
        "rope_scaling": {"kind": "none", "factor": 1.0},
    }
    rarities = texts.inverse_frequencies(tokenizer)
    rare = torch.from_numpy(texts.usual_rarity(rarities)) ** RARITY_POWER
    centred, usual = centred_rarity(rare, tokenize(tokenizer, drawn))
    words, worded = words_as_written(teacher, pieces, kept), sample(texts, args.seed + 2, _WORDED)[0]
    student = transplant(
        teacher,
        heal_words(words, teacher.weights["emb.word"], *(reader.encode_batch(worded) for reader in (tokenizer, whole))),
        args.layers,
        config_from(shape),
        seen["constants"],
        seen["mean"] * seen["pool_norm"],
        seen["projection"] / seen["spread"] / seen["pool_norm"] * seen["size"],
        [row.topk(args.inner - CARRYING).indices.sort().values for row in seen["importance"]],
        centred,
        seen["norms"],
    )
    with torch.no_grad():
        student.word_embeddings.weight.copy_(coarse(student.word_embeddings.weight, EMBEDDING_STEPS, per_row=True))
    read = tokenize(tokenizer, drawn[:_COUNTED], _LONGEST)
    counted = [Batch.of([read[i] for i in group]) for group in by_length([len(ids) for ids in read], _TOKENS)]
    told = place_counting(student, counted, RARE_SCALE * usual)
    print(f"the first layer tells {told:.3f} of the variance of BM25's saturated counts", flush=True)
    texts_of_both = lessons(sample(texts, args.seed + 1, _HEALED)[0], tokenizer, whole)
    missed = heal(student, teacher, args.layers, texts_of_both)
    print("variance of the teacher's states missed after each layer:", *(f"{share:.3f}" for share in missed))
    vectors = [functional.normalize(its.mean(states["teacher"]), dim=1) for _, its, _, states in texts_of_both]
    place_pooling(student, texts_of_both)
    heal_pooling(
        student,
        [lesson.mine for lesson in texts_of_both],
        [lesson.states["hidden"] for lesson in texts_of_both],
        [(unit - seen["mean"]) @ seen["projection"].T for unit in vectors],
    )
    start = {"shape": shape, "weights": student.state_dict(), "layers": args.layers}
    start |= {"mean": seen["mean"], "projection": seen["projection"]}
    start |= {"rarities": {language: torch.from_numpy(values).half() for language, values in rarities.items()}}
    torch.save(start | {"tokenizer": tokenizer.to_str(), "teacher_tokenizer": whole.to_str()}, args.out)
    print(f"{args.out}: {asdict(student.config)}")


if __name__ == "__main__":
    main()
