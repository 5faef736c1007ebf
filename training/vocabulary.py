"""The tokenizer of gte-mini: the pieces of XLM-R that real text uses, with XLM-R's scores and special ids.

Unigram segmentation with fewer pieces is the segmentation of XLM-R wherever the pieces it wants are there. A character without
a piece is the unknown token, as in XLM-R.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
# What SentencePiece's nmt_nfkc does to control and format characters, before NFKC.
_DROPPED = r"[\x{00}-\x{08}\x{0b}\x{0e}-\x{1f}\x{7f}\x{8f}\x{9f}]"
_SPACES = r"[\t\n\f\r\x{1680}\x{200b}-\x{200f}\x{2028}\x{2029}\x{2581}\x{feff}\x{fffd}]"


def build(pieces: Sequence[str], scores: Sequence[float], lowercase: bool = False) -> Tokenizer:
    """Return the tokenizer of these pieces, of which the first four are `SPECIALS`."""
    if tuple(pieces[:4]) != SPECIALS:
        raise ValueError(f"the first pieces are {pieces[:4]}; they must be {SPECIALS}")
    tokenizer = Tokenizer(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Replace(Regex(_DROPPED), ""),
            normalizers.Replace(Regex(_SPACES), " "),
            normalizers.NFKC(),
            *([normalizers.Lowercase()] if lowercase else []),
            normalizers.Replace(Regex(" {2,}"), " "),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def count(tokenizer: Tokenizer, texts: Iterable[str], at_once: int = 20_000) -> Counter[int]:
    """Count how often each token id occurs."""
    counts: Counter[int] = Counter()
    iterator = iter(texts)
    while batch := list(islice(iterator, at_once)):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            counts.update(encoding.ids)
    return counts


def select(pieces: Sequence[str], counts: Counter[int], size: int) -> list[int]:
    """Return the ids of the pieces to keep, in ascending order: specials, single characters, then the most frequent.

    Ascending, so that frequent pieces keep small ids as in XLM-R.
    """
    kept = set(range(len(SPECIALS)))
    kept.update(index for index, piece in enumerate(pieces) if len(piece.removeprefix("▁")) <= 1 and counts[index])
    if len(kept) > size:
        raise ValueError(f"{len(kept)} special tokens and characters do not fit into {size} pieces")
    for index, _ in counts.most_common():
        if len(kept) == size:
            break
        kept.add(index)
    return sorted(kept)
