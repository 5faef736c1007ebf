"""The sealed form of sparse vectors: what opens, what does not, and in which order seals sort."""

from __future__ import annotations

import pytest

from gte_rag.records import open_seal, seal
from gte_rag.vectors import SparseMatrix, SparseVector, pack_sparse, unpack_sparse

FINGERPRINT = "0123456789abcdef"
TEXT = "naïve 北京"
VECTOR = SparseVector.from_dict({7: 0.5, 100_000: 2.0})
# Written by the first format, which had no time.
FIRST_FORMAT = "1:0123456789abcdef:55bd3b75f056d249:BwD//5qGADgAAABA"


def sealed(text: str = TEXT) -> str:
    return seal(SparseMatrix.from_vectors([VECTOR], 2**20), [text], FINGERPRINT)[0]


def test_a_seal_opens_for_its_text_and_model_only() -> None:
    assert open_seal(sealed(), TEXT, FINGERPRINT) == pack_sparse(VECTOR)
    assert open_seal(sealed(), TEXT + ".", FINGERPRINT) is None
    assert open_seal(sealed(), TEXT, "f" * 16) is None


def test_a_seal_of_the_first_format_still_opens() -> None:
    packed = open_seal(FIRST_FORMAT, TEXT, FINGERPRINT)
    assert packed is not None
    assert unpack_sparse(packed) == VECTOR
    assert open_seal(FIRST_FORMAT, TEXT + ".", FINGERPRINT) is None
    assert open_seal(FIRST_FORMAT, TEXT, "f" * 16) is None


@pytest.mark.parametrize(
    "value",
    [FIRST_FORMAT.replace("1:", "2:", 1), sealed().replace("2:", "1:", 1), "3", "", ":"],
    ids=["second number", "first number", "no fields", "nothing", "empty fields"],  # a seal holds the time
)
def test_a_seal_whose_fields_are_not_those_of_its_format_does_not_open(value: str) -> None:
    assert open_seal(value, TEXT, FINGERPRINT) is None


def test_later_seals_sort_after_earlier_ones() -> None:
    """Chroma's index over strings is then appended to, not rewritten all over."""
    texts = [f"text {number}" for number in range(50)]
    matrix = SparseMatrix.from_vectors([VECTOR] * len(texts), 2**20)
    values = [value for _ in range(3) for value in seal(matrix, texts, FINGERPRINT)]
    assert values == sorted(values)
