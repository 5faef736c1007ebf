"""What an encoder promises beyond parity: rows stand alone, options do what they say, nothing is printed unasked."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import gte_rag.encoder
from checkpoints import LONG_TEXT, TEXTS, Variant, build, find_variant
from gte_rag import CheckpointError, GTEEncoder
from gte_rag.vectors import Encoding, SparseMatrix, SparseVector

DENSE_TOLERANCE, SPARSE_TOLERANCE = 1e-6, 5e-6
"""Matrix products of another height round in another order: a few units in the last place of float32. Dense vectors have length
1; token weights come from hidden states of length 10 and more."""


def load(variant: Variant, folder: Path, **options: Any) -> GTEEncoder:
    return GTEEncoder.from_pretrained(build(variant, folder), **({"device": "cpu", "precision": "float32"} | options))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GTEEncoder:
    """Random weights, dense and sparse."""
    return load(find_variant("bare-with-head"), tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def dense_only(tmp_path_factory: pytest.TempPathFactory) -> GTEEncoder:
    """No sparse head, and a query prompt."""
    return load(find_variant("arctic"), tmp_path_factory.mktemp("arctic"))


@pytest.fixture
def many_small_batches() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gte_rag.encoder, "_MAX_BATCH_TOKENS", {"cpu": 40})
        patch.setattr(gte_rag.encoder, "_WINDOW", 5)
        yield


def dense_of(encoding: Encoding) -> np.ndarray[Any, np.dtype[np.float32]]:
    assert encoding.dense is not None
    return encoding.dense


def sparse_of(encoding: Encoding) -> list[SparseVector]:
    assert encoding.sparse is not None
    return list(encoding.sparse)


def assert_same(actual: Encoding, expected: Encoding) -> None:
    np.testing.assert_allclose(dense_of(actual), dense_of(expected), rtol=0, atol=DENSE_TOLERANCE)
    assert len(sparse_of(actual)) == len(sparse_of(expected))
    for one, other in zip(sparse_of(actual), sparse_of(expected), strict=True):
        weights, others = one.to_dict(), other.to_dict()
        # A weight that one side rounds to 0 is absent there.
        for token in weights.keys() | others.keys():
            assert weights.get(token, 0.0) == pytest.approx(others.get(token, 0.0), rel=0, abs=SPARSE_TOLERANCE)


def join(encodings: Sequence[Encoding], vocab_size: int) -> Encoding:
    vectors = [vector for encoding in encodings for vector in sparse_of(encoding)]
    return Encoding(np.concatenate([*map(dense_of, encodings)]), SparseMatrix.from_vectors(vectors, vocab_size))


# Rows stand alone

unicode_text = st.text(max_size=30)
sentence = st.lists(st.sampled_from([*TEXTS[:-1], "the", "China", "北", "."]), max_size=12).map(" ".join)
text_lists = st.lists(st.one_of(unicode_text, sentence), min_size=1, max_size=8)


@given(text_lists)
@example([LONG_TEXT, "", LONG_TEXT, "a"])
@settings(max_examples=25, deadline=None)
def test_a_text_s_vectors_do_not_depend_on_its_batch(tiny: GTEEncoder, texts: list[str]) -> None:
    together = tiny.encode_documents(texts)
    alone = [tiny.encode_documents([text]) for text in texts]
    assert_same(together, join(alone, tiny.vocab_size))


@given(text_lists.flatmap(lambda texts: st.tuples(st.just(texts), st.permutations(range(len(texts))))))
@settings(max_examples=25, deadline=None)
def test_vectors_come_in_the_order_of_the_texts(tiny: GTEEncoder, drawn: tuple[list[str], list[int]]) -> None:
    texts, order = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gte_rag.encoder, "_MAX_BATCH_TOKENS", {"cpu": 40})
        patch.setattr(gte_rag.encoder, "_WINDOW", 3)
        shuffled = tiny.encode_documents([texts[place] for place in order])
    straight = tiny.encode_documents(texts)
    assert_same(shuffled, join([pick(straight, place, tiny.vocab_size) for place in order], tiny.vocab_size))


def pick(encoding: Encoding, row: int, vocab_size: int) -> Encoding:
    return Encoding(
        dense_of(encoding)[row : row + 1], SparseMatrix.from_vectors([sparse_of(encoding)[row]], vocab_size)
    )


def test_the_bundled_model_gives_a_text_the_same_vectors_in_any_batch(encoder: GTEEncoder) -> None:
    together = encoder.encode_documents(TEXTS)
    alone = [encoder.encode_documents([text]) for text in TEXTS]
    assert_same(together, join(alone, encoder.vocab_size))


@pytest.mark.usefixtures("many_small_batches")
def test_windows_and_batches_leave_no_trace(tiny: GTEEncoder) -> None:
    split = tiny.encode_documents(TEXTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gte_rag.encoder, "_MAX_BATCH_TOKENS", {"cpu": 10**6})
        patch.setattr(gte_rag.encoder, "_WINDOW", 10**6)
        whole = tiny.encode_documents(TEXTS)
    assert_same(split, whole)


def test_threads_share_an_encoder(tmp_path: Path) -> None:
    fresh = load(find_variant("bare-with-head"), tmp_path)  # whose rotary table has yet to grow
    texts = [LONG_TEXT * 2, *TEXTS]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda text: fresh.encode_documents([text]), texts))
    assert_same(join(results, fresh.vocab_size), fresh.encode_documents(texts))


def test_the_same_call_gives_the_same_bits(tiny: GTEEncoder) -> None:
    first, second = tiny.encode_documents(TEXTS), tiny.encode_documents(TEXTS)
    np.testing.assert_array_equal(dense_of(first), dense_of(second))
    assert sparse_of(first) == sparse_of(second)


# Shapes and options


def test_no_texts_give_no_rows(tiny: GTEEncoder) -> None:
    encoding = tiny.encode_documents([])
    assert len(encoding) == 0
    assert dense_of(encoding).shape == (0, tiny.dimension)
    assert encoding.sparse is not None
    assert encoding.sparse.shape == (0, tiny.vocab_size)
    assert encoding.truncated == 0


def test_dense_vectors_are_float32_of_unit_length(tiny: GTEEncoder) -> None:
    for dimension in (32, 48, 64):
        dense = dense_of(tiny.encode_documents(TEXTS, dimension=dimension))
        assert dense.dtype == np.float32
        assert dense.shape == (len(TEXTS), dimension)
        np.testing.assert_allclose(np.linalg.norm(dense, axis=1), 1, atol=1e-6)


def test_either_kind_alone_equals_its_half_of_both(tiny: GTEEncoder) -> None:
    both = tiny.encode_documents(TEXTS)
    dense, sparse = tiny.encode_documents(TEXTS, sparse=False), tiny.encode_documents(TEXTS, dense=False)
    assert dense.sparse is None
    assert sparse.dense is None
    # Dense vectors alone take another way through the last layer, which computes the first tokens only: float32 rounding.
    np.testing.assert_allclose(dense_of(dense), dense_of(both), rtol=0, atol=1e-6)
    assert sparse_of(sparse) == sparse_of(both)


def test_the_dimension_of_the_encoder_is_a_default_that_a_call_overrides(tmp_path: Path) -> None:
    whole = load(find_variant("bare-with-head"), tmp_path / "a")
    cut = load(find_variant("bare-with-head"), tmp_path / "b", dimension=np.int64(40))
    assert (whole.dimension, cut.dimension) == (64, 40)
    np.testing.assert_array_equal(
        dense_of(cut.encode_queries(TEXTS)), dense_of(whole.encode_queries(TEXTS, dimension=40))
    )
    np.testing.assert_array_equal(
        dense_of(cut.encode_queries(TEXTS, dimension=64)), dense_of(whole.encode_queries(TEXTS))
    )


def test_an_empty_text_has_a_dense_vector_and_no_token_weights(encoder: GTEEncoder) -> None:
    encoding = encoder.encode_documents(["", "Paris"])
    np.testing.assert_allclose(np.linalg.norm(dense_of(encoding), axis=1), 1, atol=1e-6)
    empty, city = sparse_of(encoding)
    assert len(empty) == 0
    assert len(city) > 0
    assert empty.dot(city) == 0.0


def test_special_tokens_carry_no_weight_even_when_the_text_spells_them(encoder: GTEEncoder) -> None:
    (vector,) = sparse_of(encoder.encode_documents(["<s> Paris </s> <pad> <unk> \ue000"]))
    assert not {0, 1, 2, 3} & vector.to_dict().keys()
    assert len(vector) > 0


@pytest.mark.usefixtures("many_small_batches")
def test_the_length_limit_cuts_counts_and_warns_once(tmp_path: Path) -> None:
    short = load(find_variant("bare-with-head"), tmp_path, max_length=8)
    texts = [LONG_TEXT, "the", LONG_TEXT, "", "cat", LONG_TEXT, "dog"]  # the last one in a window of its own
    with pytest.warns(UserWarning, match="3 of 7 texts are longer than max_length=8 tokens and were cut") as caught:
        encoding = short.encode_documents(texts)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert encoding.truncated == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert short.encode_documents(["the", "the cat"]).truncated == 0


def test_a_cut_text_is_its_beginning_and_the_closing_token(tmp_path: Path) -> None:
    whole = load(find_variant("bare-with-head"), tmp_path / "a")
    short = load(find_variant("bare-with-head"), tmp_path / "b", max_length=6)
    assert whole.count_tokens("the cat and dog") == 6
    with pytest.warns(UserWarning, match="1 of 1 texts"):
        cut = short.encode_documents(["the cat and dog where who when"])
    assert_same(cut, whole.encode_documents(["the cat and dog"]))


def test_the_query_prompt_of_a_checkpoint_stands_before_queries_only(dense_only: GTEEncoder) -> None:
    assert (dense_only.query_prompt, dense_only.document_prompt) == ("query: ", "")
    queries = dense_of(dense_only.encode_queries(TEXTS, sparse=False))
    prompted = dense_of(dense_only.encode_documents([f"query: {text}" for text in TEXTS], sparse=False))
    plain = dense_of(dense_only.encode_documents(TEXTS, sparse=False))
    np.testing.assert_array_equal(queries, prompted)
    assert np.abs(queries - plain).max(axis=1).min() > 1e-3


def test_a_document_prompt_stands_before_documents_only(tmp_path: Path) -> None:
    folder = build(find_variant("bare-with-head"), tmp_path)
    plain = GTEEncoder.from_pretrained(folder, device="cpu")
    prompts = {"prompts": {"query": "", "passage": "text: "}}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts), encoding="utf-8")
    prompted = GTEEncoder.from_pretrained(folder, device="cpu")
    expected = plain.encode_documents([f"text: {text}" for text in TEXTS])
    assert_same(prompted.encode_documents(TEXTS), expected)
    assert_same(prompted.encode_queries(TEXTS), plain.encode_queries(TEXTS))


def test_a_checkpoint_without_sparse_head_says_what_to_do(dense_only: GTEEncoder) -> None:
    assert not dense_only.has_sparse
    with pytest.raises(CheckpointError, match=r"gives no sparse vectors: .* dense only\. Call with sparse=False"):
        dense_only.encode_documents(["a"])


# Pairs


@pytest.mark.parametrize(("dense_weight", "sparse_weight"), [(1.0, 0.3), (0.5, 2), (-1, 0.1), (1, 0), (0, 1)])
def test_pair_scores_are_the_weighted_sum_of_both_scores(
    tiny: GTEEncoder, dense_weight: float, sparse_weight: float
) -> None:
    queries, documents = list(TEXTS[:4]), list(reversed(TEXTS[:4]))
    pairs = list(zip(queries, documents, strict=True))
    left, right = tiny.encode_queries(queries), tiny.encode_documents(documents)
    expected = [
        dense_weight * float(a @ b) + sparse_weight * c.dot(d)
        for a, b, c, d in zip(dense_of(left), dense_of(right), sparse_of(left), sparse_of(right), strict=True)
    ]
    scores = tiny.score_pairs(pairs, dense_weight=dense_weight, sparse_weight=sparse_weight)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, expected, rtol=1e-5, atol=1e-6)


def test_pair_scores_have_the_weights_of_the_model_card_by_default(tiny: GTEEncoder) -> None:
    pairs = [("the capital of China", "what is the capital of China?")]
    expected = tiny.score_pairs(pairs, dense_weight=1.0, sparse_weight=0.3)
    np.testing.assert_array_equal(tiny.score_pairs(pairs), expected)
    assert tiny.score_pairs(pairs)[0] != tiny.score_pairs(pairs, sparse_weight=0)[0]


def test_pair_scores_without_sparse_weight_need_no_sparse_head(dense_only: GTEEncoder) -> None:
    pairs = [("cat", "the cat")]
    queries = dense_of(dense_only.encode_queries(["cat"], sparse=False))
    documents = dense_of(dense_only.encode_documents(["the cat"], sparse=False))
    np.testing.assert_allclose(dense_only.score_pairs(pairs, sparse_weight=0), [queries[0] @ documents[0]], rtol=1e-6)
    with pytest.raises(CheckpointError, match="score_pairs: sparse_weight=0"):
        dense_only.score_pairs(pairs)


def test_no_pairs_give_no_scores(tiny: GTEEncoder) -> None:
    scores = tiny.score_pairs([])
    assert scores.shape == (0,)
    assert scores.dtype == np.float32


# Token weights for people


def test_token_weights_are_strings_highest_first(encoder: GTEEncoder) -> None:
    (vector,) = sparse_of(encoder.encode_queries(["What is the capital of France?"]))
    weights = encoder.token_weights(vector)
    assert list(weights.values()) == sorted(weights.values(), reverse=True)
    assert "capital" in weights
    assert not any("▁" in token for token in weights)


def test_tokens_with_one_string_keep_the_larger_weight(encoder: GTEEncoder) -> None:
    vocabulary = encoder.tokenizer.get_vocab()
    start, inside = vocabulary["▁the"], vocabulary["the"]
    for first, second in ((0.25, 2.0), (2.0, 0.25)):
        vector = SparseVector.from_dict({start: first, inside: second, vocabulary["."]: 1.0})
        assert encoder.token_weights(vector) == {"the": 2.0, ".": 1.0}
    assert encoder.token_strings([start, inside, vocabulary["▁"]]) == ["the", "the", ""]


def test_no_weights_give_no_strings(encoder: GTEEncoder) -> None:
    assert encoder.token_weights(SparseVector.from_dict({})) == {}
    assert encoder.token_strings([]) == []


def test_token_counts_include_the_special_tokens_and_ignore_the_limit(tmp_path: Path) -> None:
    short = load(find_variant("bare-with-head"), tmp_path, max_length=4)
    assert short.count_tokens("") == 2
    assert short.count_tokens("the the the the the the") == 8


# Async


async def test_async_twins_equal_the_sync_methods(dense_only: GTEEncoder, tiny: GTEEncoder) -> None:
    for encoder, sparse in ((dense_only, False), (tiny, True)):
        options: dict[str, Any] = {"sparse": sparse, "dimension": 32}
        pairs = [
            (await encoder.aencode_queries(TEXTS, **options), encoder.encode_queries(TEXTS, **options)),
            (await encoder.aencode_documents(TEXTS, **options), encoder.encode_documents(TEXTS, **options)),
        ]
        for actual, expected in pairs:
            assert dense_of(actual).shape == (len(TEXTS), 32)
            np.testing.assert_array_equal(dense_of(actual), dense_of(expected))
            if sparse:
                assert sparse_of(actual) == sparse_of(expected)
    np.testing.assert_raises(
        AssertionError,
        np.testing.assert_array_equal,
        dense_of(await dense_only.aencode_queries(TEXTS, sparse=False)),
        dense_of(await dense_only.aencode_documents(TEXTS, sparse=False)),
    )


async def test_async_twins_pass_errors_on(tiny: GTEEncoder) -> None:
    with pytest.raises(TypeError, match="texts is a single str"):
        await tiny.aencode_queries("text")


# Progress


@pytest.mark.parametrize(("show_progress", "delay"), [(False, 0.0), (True, 2.0)], ids=["not asked", "short work"])
def test_nothing_is_printed_unless_asked_for_and_never_for_short_work(
    tiny: GTEEncoder, capsys: pytest.CaptureFixture[str], show_progress: bool, delay: float
) -> None:
    options = {"show_progress": True} if show_progress else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gte_rag.encoder, "PROGRESS_DELAY_S", delay)
        tiny.encode_documents(TEXTS, **options)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_long_work_shows_texts_done_on_stderr(tiny: GTEEncoder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gte_rag.encoder, "PROGRESS_DELAY_S", 0.0)
        tiny.encode_documents(TEXTS, show_progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"{len(TEXTS)}/{len(TEXTS)}" in captured.err


# Memory


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Notes the size of the largest tensor that any operation makes, looking into composite operations."""

    elements: int

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self:
            made = function.decompose(*args, **(kwargs or {}))
        if made is NotImplemented:
            made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return made


def test_attention_never_makes_a_matrix_of_all_token_pairs(tiny: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiny._model, "packed_forward", None)  # of the fused pass, test_fused.py shows the same
    text = "the " * 998
    tokens = tiny.count_tokens(text)
    assert tokens == 1000
    widest = 2 * tiny.config.intermediate_size
    with LargestTensor() as spy:
        tiny.encode_documents([text])
    assert spy.elements <= tokens * widest < tokens**2
    with LargestTensor() as spy, sdpa_kernel(SDPBackend.MATH):  # the spy does see such a matrix where there is one
        tiny.encode_documents([text])
    assert spy.elements >= tokens**2


# Attributes


def test_an_encoder_says_what_it_is(encoder: GTEEncoder) -> None:
    assert encoder.name == "gte-mini"
    assert (encoder.dimension, encoder.vocab_size, encoder.max_length) == (384, 132_000, 8192)
    assert encoder.has_sparse
    assert encoder.precision == "float32"
    assert (encoder.query_prompt, encoder.document_prompt) == ("", "")
    assert len(encoder.fingerprint) == 16
    assert set(encoder.fingerprint) <= set("0123456789abcdef")
    assert encoder.num_parameters > 10_000_000
    assert repr(encoder) == f"GTEEncoder('gte-mini', dimension=384, device='{encoder.device}', float32)"


def test_other_weights_positions_head_or_vocabulary_change_the_fingerprint(tmp_path: Path) -> None:
    variant = find_variant("bare-with-head")
    first = load(variant, tmp_path / "first").fingerprint
    assert load(variant, tmp_path / "again").fingerprint == first
    other_weights = GTEEncoder.from_pretrained(build(variant, tmp_path / "weights", seed=1), device="cpu").fingerprint
    folder = build(variant, tmp_path / "rope")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")) | {"rope_theta": 10000}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    other_rope = GTEEncoder.from_pretrained(folder, device="cpu").fingerprint
    folder = build(variant, tmp_path / "tuned")
    tensors = load_file(folder / "model.safetensors")
    tensors["classifier.weight"][:, 1:] += 0.001
    save_file(tensors, folder / "model.safetensors")
    other_head = GTEEncoder.from_pretrained(folder, device="cpu").fingerprint
    folder = build(variant, tmp_path / "vocabulary")
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8").replace('"▁China"', '"▁Chile"')
    (folder / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
    other_vocabulary = GTEEncoder.from_pretrained(folder, device="cpu").fingerprint
    assert len({first, other_weights, other_rope, other_head, other_vocabulary}) == 5


def test_a_copy_of_an_encoder_is_the_encoder(encoder: GTEEncoder) -> None:
    assert copy.deepcopy({"encoder": encoder})["encoder"] is encoder
