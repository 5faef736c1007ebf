"""Sparse vectors keep their invariants, compute what a dictionary or a dense matrix computes, and survive storage."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import reference
from gte_rag.vectors import Encoding, SparseMatrix, SparseVector, pack_sparse, unpack_sparse

VOCAB = 40
quick = settings(max_examples=50, deadline=None)

# Wide enough that rounding at the largest product would swallow the smallest one.
weights = st.floats(min_value=2.0**-10, max_value=2.0**15, width=32)
entries = st.dictionaries(st.integers(0, VOCAB - 1), weights, max_size=12)
rows_of_entries = st.lists(entries, max_size=6)


def vector(*pairs: tuple[int, float]) -> SparseVector:
    return SparseVector.from_dict(dict(pairs))


def matrix(rows: list[dict[int, float]]) -> SparseMatrix:
    return SparseMatrix.from_vectors([SparseVector.from_dict(row) for row in rows], VOCAB)


def to_array(sparse: SparseMatrix) -> NDArray[np.float32]:
    array = np.zeros(sparse.shape, dtype=np.float32)
    for row, start in enumerate(sparse.indptr[:-1].tolist()):
        part = slice(start, int(sparse.indptr[row + 1]))
        array[row, sparse.indices[part]] = sparse.values[part]
    return array


# SparseVector


def ids(*values: int) -> NDArray[np.int32]:
    return np.array(values, dtype=np.int32)


def floats(*values: float) -> NDArray[np.float32]:
    return np.array(values, dtype=np.float32)


@pytest.mark.parametrize(
    ("indices", "values", "message"),
    [
        (ids(1, 2), floats(1), r"shape \(2,\) and values \(1,\)"),
        (ids(1)[None], floats(1)[None], "one-dimensional"),
        (np.array([1]), floats(1), "indices are int64 .* must be int32 and float32"),
        (ids(1), np.array([1.0]), "values float64; they must be int32 and float32"),
        (ids(1), floats(0), "greater than 0"),
        (ids(1), floats(-1), "greater than 0"),
        (ids(1), floats(np.nan), "finite"),
        (ids(1), floats(np.inf), "finite"),
        (ids(-1), floats(1), "token id -1 is negative"),
        (ids(2, 1), floats(1, 1), "strictly ascending"),
        (ids(1, 1), floats(1, 1), "strictly ascending"),
    ],
)
def test_a_sparse_vector_refuses_what_breaks_its_invariants(
    indices: NDArray[Any], values: NDArray[Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SparseVector(indices, values)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({1: -0.5}, ValueError, "greater than 0"),
        ({1: float("nan")}, ValueError, "finite"),
        ({-1: 1.0}, ValueError, "token id -1 is out of range"),
        ({2**31: 1.0}, ValueError, "token id 2147483648 is out of range"),
        ({1.5: 1.0}, TypeError, "token id 1.5 is float"),
        ({"3": 1.0}, TypeError, "token id '3' is str"),
        ({True: 1.0}, TypeError, "token id True is bool"),
    ],
)
def test_from_dict_refuses_what_is_no_token_weight(given: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SparseVector.from_dict(given)


def test_from_dict_sorts_and_leaves_out_zeros() -> None:
    made = SparseVector.from_dict({7: 0.5, 3: 0.25, 5: 0.0})
    assert made.indices.tolist() == [3, 7]
    assert made.to_dict() == {3: 0.25, 7: 0.5}
    assert len(made) == 2


def test_sparse_vectors_are_compared_by_value_and_have_no_hash() -> None:
    assert vector((1, 0.5)) == vector((1, 0.5))
    assert vector((1, 0.5)) != vector((1, 0.25))
    assert vector((1, 0.5)) != vector((2, 0.5))
    assert vector((1, 0.5)) != {1: 0.5}
    with pytest.raises(TypeError, match="unhashable"):
        hash(vector())


@given(entries, entries)
@quick
def test_dot_is_the_sum_over_shared_ids(left: dict[int, float], right: dict[int, float]) -> None:
    score = SparseVector.from_dict(left).dot(SparseVector.from_dict(right))
    assert type(score) is float
    assert score == pytest.approx(reference.sparse_dot(left, right), rel=1e-5)


# SparseMatrix


def pointers(*values: int) -> NDArray[np.int64]:
    return np.array(values, dtype=np.int64)


@pytest.mark.parametrize(
    ("indptr", "indices", "shape", "message"),
    [
        (pointers(0, 2), ids(1, 2), (2, 9), r"must be int64 \(3,\)"),
        (pointers(0, 2).astype(np.int32), ids(1, 2), (1, 9), "indptr is int32"),
        (pointers(1, 2), ids(1, 2), (1, 9), "rise from 0"),
        (pointers(0, 1), ids(1, 2), (1, 9), "rise from 0 to the number of stored weights"),
        (pointers(0, 2, 1, 2), ids(1, 2), (3, 9), "rise from 0"),
        (pointers(0, 2), ids(1, 9), (1, 9), "token id 9 is outside a vocabulary of 9"),
        (pointers(0, 2), ids(-1, 2), (1, 9), "token id -1 is negative"),
        (pointers(0, 2), ids(2, 1), (1, 9), "ascending within each row"),
        (pointers(0, 2), ids(2, 2), (1, 9), "ascending within each row"),
        (pointers(0, 0, 2), ids(2, 1), (2, 9), "ascending within each row"),
        (pointers(0, 2, 2), ids(2, 1), (2, 9), "ascending within each row"),
        (pointers(0, 1, 3), ids(5, 4, 3), (2, 9), "ascending within each row"),
    ],
)
def test_a_sparse_matrix_refuses_what_is_no_csr(
    indptr: NDArray[Any], indices: NDArray[np.int32], shape: tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SparseMatrix(indptr, indices, np.ones(len(indices), dtype=np.float32), shape)


def test_a_row_may_start_below_the_end_of_the_row_before() -> None:
    made = SparseMatrix(pointers(0, 0, 2, 2, 3, 3), ids(7, 8, 1), floats(1, 2, 3), (5, 9))
    assert [row.to_dict() for row in made] == [{}, {7: 1.0, 8: 2.0}, {}, {1: 3.0}, {}]


@given(rows_of_entries)
@quick
def test_rows_come_back_as_they_were_stacked(rows: list[dict[int, float]]) -> None:
    vectors = [SparseVector.from_dict(row) for row in rows]
    stacked = SparseMatrix.from_vectors(vectors, VOCAB)
    assert len(stacked) == len(rows)
    assert stacked.shape == (len(rows), VOCAB)
    assert list(stacked) == vectors
    assert [stacked[row - len(rows)] for row in range(len(rows))] == vectors


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (2, IndexError, "row 2 of a matrix with 2 rows"),
        (-3, IndexError, "row -3 of a matrix with 2 rows"),
        (slice(0, 1), TypeError, "not slice"),
        ("0", TypeError, "not str"),
    ],
)
def test_an_index_that_names_no_row_is_refused(row: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        matrix([{1: 1.0}, {}])[row]


@given(rows_of_entries, entries)
@example([{1: 2.0**15}, {1: 2.0**-10}], {1: 2.0**-10})
@example([{}, {1: 1.0}, {}, {2: 1.0}, {}], {2: 1.0, 39: 1.0})
@quick
def test_the_scores_of_a_matrix_are_those_of_its_rows(rows: list[dict[int, float]], query: dict[int, float]) -> None:
    scores = matrix(rows).dot(SparseVector.from_dict(query))
    assert scores.dtype == np.float32
    assert scores.shape == (len(rows),)
    assert scores.tolist() == pytest.approx([reference.sparse_dot(row, query) for row in rows], rel=1e-5)


@given(rows_of_entries, st.data())
@quick
def test_take_selects_rows_like_a_dense_matrix(rows: list[dict[int, float]], data: st.DataObject) -> None:
    places = st.lists(st.integers(0, len(rows) - 1), max_size=8) if rows else st.just([])
    chosen = np.array(data.draw(places), dtype=np.int64)
    taken = matrix(rows).take(chosen)
    assert taken.shape == (len(chosen), VOCAB)
    np.testing.assert_array_equal(to_array(taken), to_array(matrix(rows))[chosen])


@given(st.lists(rows_of_entries, max_size=4))
@quick
def test_stack_puts_matrices_below_each_other_like_dense_ones(parts: list[list[dict[int, float]]]) -> None:
    matrices = [matrix(rows) for rows in parts]
    expected = np.concatenate([np.zeros((0, VOCAB), dtype=np.float32), *map(to_array, matrices)])
    np.testing.assert_array_equal(to_array(SparseMatrix.stack(matrices, VOCAB)), expected)


def test_stack_refuses_ids_beyond_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="token id 39 is outside a vocabulary of 39"):
        SparseMatrix.stack([matrix([{39: 1.0}])], 39)


# Encoding


@pytest.mark.parametrize(
    ("dense", "sparse", "message"),
    [
        (None, None, "dense vectors, sparse vectors, or both"),
        (np.zeros((1, 4)), None, "dense is float64"),
        (np.zeros(4, dtype=np.float32), None, r"must be float32 \(n, dimension\)"),
        (np.zeros((2, 4), dtype=np.float32), matrix([{1: 1.0}]), "2 dense and 1 sparse"),
    ],
)
def test_an_encoding_refuses_vectors_that_do_not_belong_together(dense: Any, sparse: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Encoding(dense, sparse)


def test_the_length_of_an_encoding_is_the_number_of_texts() -> None:
    dense = np.zeros((2, 4), dtype=np.float32)
    assert len(Encoding(dense, None)) == 2
    assert len(Encoding(None, matrix([{}, {}, {}]))) == 3


# Storage

storable = st.dictionaries(
    st.integers(0, 2**31 - 1), st.floats(min_value=0, max_value=1e6, width=32, exclude_min=True), max_size=20
)


@given(storable)
@quick
def test_a_packed_vector_comes_back_rounded_to_float16(weights: dict[int, float]) -> None:
    packed = pack_sparse(SparseVector.from_dict(weights))
    assert packed.isascii()
    rounded = {index: float(np.float16(min(weight, 65504.0))) for index, weight in sorted(weights.items())}
    assert unpack_sparse(packed).to_dict() == {index: weight for index, weight in rounded.items() if weight > 0}


def test_weights_out_of_the_range_of_float16_are_clipped_or_left_out() -> None:
    assert unpack_sparse(pack_sparse(vector((1, 1e30), (2, 1e-9), (3, 1.0)))).to_dict() == {1: 65504.0, 3: 1.0}


def test_a_packed_token_takes_eight_characters() -> None:
    assert len(pack_sparse(SparseVector.from_dict(dict.fromkeys(range(300), 0.5)))) == 8 * 300


def raw(token_ids: list[int], token_weights: list[float]) -> str:
    data = np.array(token_ids, dtype="<u4").tobytes() + np.array(token_weights, dtype="<f2").tobytes()
    return base64.b64encode(data).decode()


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        ("not base64!", "not a packed sparse vector"),
        ("北京", "not a packed sparse vector"),
        ("AAA", "not a packed sparse vector"),
        (raw([1], [1]) + "!", "not a packed sparse vector"),
        ("\n" + raw([1], [1]), "not a packed sparse vector"),
        ("AAAA", "3 bytes, which is no multiple of 6"),
        (raw([2**31], [1]), "token id out of range"),
        (raw([2, 1], [1, 1]), "strictly ascending"),
        (raw([1], [float("nan")]), "finite"),
        (raw([1], [float("inf")]), "finite"),
        (raw([1], [0]), "greater than 0"),
        (raw([1], [-1]), "greater than 0"),
    ],
)
def test_a_string_that_was_not_packed_here_is_refused(packed: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_sparse(packed)


@given(storable, st.data())
@quick
def test_a_damaged_string_is_refused_or_read_as_some_valid_vector(
    weights: dict[int, float], data: st.DataObject
) -> None:
    packed = pack_sparse(SparseVector.from_dict(weights))
    start = data.draw(st.integers(0, len(packed)))
    stop = data.draw(st.integers(start, len(packed)))
    damaged = packed[:start] + data.draw(st.text(max_size=4)) + packed[stop:]
    try:
        read = unpack_sparse(damaged)
    except ValueError:
        return
    assert np.all(read.values > 0)
    assert np.all(np.diff(read.indices.astype(np.int64)) > 0)
