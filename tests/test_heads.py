"""The two heads as pure functions: cut then normalise, and the maximum per token."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gte_rag.heads import dense_vectors, sparse_rows, token_weights

VOCAB = 9
SPECIAL = frozenset({0, 2})

tokens = st.tuples(st.integers(0, VOCAB - 1), st.sampled_from([0.0, 0.25, 0.5, 1.0, 3.0]))
packed_texts = st.lists(st.lists(tokens, min_size=1, max_size=12), max_size=6)


@given(packed_texts)
@example([[(0, 1.0), (2, 1.0)], [(5, 0.0)], [(8, 0.25), (8, 3.0), (8, 0.5)]])
@settings(max_examples=50, deadline=None)
def test_sparse_rows_keep_the_largest_weight_of_each_token(texts: list[list[tuple[int, float]]]) -> None:
    flat = [token for text in texts for token in text]
    rows = sparse_rows(
        np.array([weight for _, weight in flat], dtype=np.float32),
        np.array([token_id for token_id, _ in flat], dtype=np.int64),
        np.cumsum([0, *map(len, texts)], dtype=np.int64),
        vocab_size=VOCAB,
        special_ids=SPECIAL,
    )
    expected: list[dict[int, float]] = []
    for text in texts:
        row: dict[int, float] = {}
        for token_id, weight in text:
            if weight > row.get(token_id, 0.0) and token_id not in SPECIAL:
                row[token_id] = weight
        expected.append(row)
    assert rows.shape == (len(texts), VOCAB)
    assert [row.to_dict() for row in rows] == expected


def test_dense_vectors_are_cut_before_they_are_normalised() -> None:
    hidden = torch.tensor([[3.0, 4.0, 12.0]])
    assert dense_vectors(hidden, 2).tolist() == [[np.float32(0.6), np.float32(0.8)]]
    # The other order gives a vector that is too short: (3, 4) / 13.
    other = torch.nn.functional.normalize(hidden, dim=-1)[:, :2]
    assert not torch.allclose(dense_vectors(hidden, 2), other, atol=0.1)


def test_dense_vectors_of_half_precision_states_are_float32_of_unit_length() -> None:
    hidden = torch.full((2, 64), 100.0, dtype=torch.float16)  # whose squares overflow float16
    vectors = dense_vectors(hidden, 64)
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))


def test_token_weights_are_the_positive_part_of_the_linear_head() -> None:
    hidden = torch.tensor([[1.0, 2.0], [-1.0, 0.0], [0.0, 0.0]])
    weights = token_weights(hidden, torch.tensor([[2.0, 1.0]]), torch.tensor([-0.5]))
    assert weights.tolist() == [3.5, 0.0, 0.0]
    assert weights.dtype == torch.float32
