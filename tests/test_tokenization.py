"""Texts are checked, cut and packed without loss."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gte_rag import GTEEncoder
from gte_rag.tokenization import check_texts, pack, special_token_ids, tokenize


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (None, TypeError, "texts is NoneType; give a list of strings"),
        (3, TypeError, "texts is int; give a list"),
        ("text", TypeError, r"texts is a single str; give a list of strings, for example \[text\]"),
        (b"text", TypeError, "texts is a single bytes"),
        (bytearray(b"text"), TypeError, "texts is a single bytearray"),
        ({"a": 1}, TypeError, "texts is dict; give a list"),
        ({"a", "b"}, TypeError, "texts is set; give a list"),
        (["a", None], TypeError, r"texts\[1\] is NoneType; every text must be a string"),
        ([b"a"], TypeError, r"texts\[0\] is bytes"),
        (["a", ["b"]], TypeError, r"texts\[1\] is list"),
        (["a", float("nan")], TypeError, r"texts\[1\] is float"),
        (np.array([1, 2]), TypeError, r"texts\[0\] is int64"),
        (["a", "b\udc80c"], ValueError, r"texts\[1\] has a lone surrogate '\\udc80' at character 1"),
        (["\ud83d"], ValueError, r"texts\[0\] has a lone surrogate '\\ud83d' at character 0"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_texts(given)


@pytest.mark.parametrize(
    ("given", "texts"),
    [
        ([], []),
        (("a", "北京"), ["a", "北京"]),
        ((text for text in ("a", "b")), ["a", "b"]),
        (np.array(["a", "b"]), ["a", "b"]),
        (np.array(["a", "b"], dtype=object), ["a", "b"]),
        (["", "  ", "\0"], ["", "  ", "\0"]),
        (["😀", "\ufffd"], ["😀", "\ufffd"]),
    ],
    ids=["empty", "tuple", "generator", "array", "object array", "blank and NUL", "astral"],
)
def test_every_ordered_collection_of_strings_is_accepted(given: Any, texts: list[str]) -> None:
    assert check_texts(given) == texts


token_id_lists = st.lists(st.lists(st.integers(0, 99), min_size=2, max_size=40), max_size=30)


@given(token_id_lists, st.integers(1, 60))
@example([[1] * 40, [2] * 2, [3] * 40], 39)
@example([[1] * 20] * 6, 60)
@settings(max_examples=50, deadline=None)
def test_packing_keeps_every_text_once_within_the_budget_and_longest_first(
    token_ids: list[list[int]], max_tokens: int
) -> None:
    batches = list(pack(token_ids, max_tokens))
    rows = [row for batch in batches for row in batch.rows.tolist()]
    assert rows == sorted(range(len(token_ids)), key=lambda row: (-len(token_ids[row]), row))
    for batch in batches:
        starts = batch.cu_seqlens.tolist()
        texts = [batch.token_ids[start:stop].tolist() for start, stop in pairwise(starts)]
        assert texts == [token_ids[row] for row in batch.rows]
        assert len(batch.token_ids) <= max_tokens or len(batch.rows) == 1
        assert {batch.token_ids.dtype, batch.cu_seqlens.dtype, batch.rows.dtype} == {np.dtype(np.int64)}
    # No batch could have taken the next text as well.
    for batch, following in pairwise(batches):
        assert len(batch.token_ids) + len(token_ids[following.rows[0]]) > max_tokens


@pytest.fixture(scope="module")
def tokenizer(encoder: GTEEncoder) -> Tokenizer:
    return encoder.tokenizer


def test_a_long_text_loses_its_end_and_keeps_its_closing_special_token(tokenizer: Tokenizer) -> None:
    text = "one two three four five six seven eight nine ten"
    (whole,), none_cut = tokenize(tokenizer, [text], 8192)
    assert none_cut == 0
    for max_length in (3, 5, len(whole) - 1):
        (cut,), truncated = tokenize(tokenizer, [text], max_length)
        assert truncated == 1
        assert len(cut) == max_length
        assert cut == [*whole[: max_length - 1], whole[-1]]
    assert tokenize(tokenizer, [text], len(whole)) == ([whole], 0)


def test_only_texts_over_the_limit_are_counted(tokenizer: Tokenizer) -> None:
    texts = ["a b c d e f g h", "", "a", "a b c d e f g h i"]
    token_ids, truncated = tokenize(tokenizer, texts, 6)
    assert truncated == 2
    assert [len(ids) for ids in token_ids][1] == 2
    assert max(map(len, token_ids)) == 6


def test_no_texts_give_no_tokens(tokenizer: Tokenizer) -> None:
    assert tokenize(tokenizer, [], 8192) == ([], 0)


def test_special_token_ids_leave_out_names_the_tokenizer_does_not_know(tokenizer: Tokenizer) -> None:
    assert special_token_ids(tokenizer, ["<s>", "</s>", "[CLS]", None, ""]) == {0, 2}
