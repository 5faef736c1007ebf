"""The reranker gives what `transformers` gives, whatever the layout, the batch and the length of a pair."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import threading
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from checkpoints import (
    LONG_TEXT,
    TEXTS,
    Variant,
    build,
    find_variant,
    native_twin,
    transformers_scores,
)
from gte_rag import CheckpointError, GTEEncoder, GTEReranker, RerankResult
from gte_rag.heads import rerank_scores
from gte_rag.tokenization import check_pairs, pair_template, shorten_pair, tokenize_pairs

# float32 rounding through the layers; a wrong token type or template is off by more than 1e-2.
TOLERANCE = 1e-5

LEGACY = find_variant("multilingual-reranker")
RERANKERS = (
    LEGACY,
    Variant(
        "reranker-native",
        layout="native",
        theta=160000,
        scaling={"rope_type": "linear", "factor": 8.0 ** (2 / 64)},
        pooler=True,
    ),
    Variant("reranker-two-types", layout="legacy-bare", tokenizer="bert", type_vocab=2, pooler=True),
    Variant("reranker-no-types", layout="legacy-unpacked", tokenizer="xlmr", type_vocab=0, pooler=True),
)
PAIRS = [
    *((TEXTS[0], text) for text in TEXTS[1:9]),
    ("北京", ""),
    ("", "the cat"),
    (LONG_TEXT[:300], TEXTS[2]),
    (TEXTS[2], LONG_TEXT[:700]),
]

each_reranker = pytest.mark.parametrize("variant", RERANKERS, ids=lambda variant: variant.name)


def load(folder: Path, **options: Any) -> GTEReranker:
    return GTEReranker.from_pretrained(folder, device="cpu", precision="float32", **options)


def score(reranker: GTEReranker, pairs: list[tuple[str, str]]) -> Any:
    """Score pairs some of which are too long, which is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reranker.score_pairs(pairs)


def rewrite(folder: Path, change: Any) -> Path:
    """Change a checkpoint's tensors in place."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


@each_reranker
def test_scores_equal_those_of_transformers(variant: Variant, tmp_path: Path) -> None:
    folder = build(variant, tmp_path / "checkpoint")
    oracle = folder if variant.native else native_twin(folder, tmp_path / "native")
    for max_length in (8192, 64, 9):
        expected = transformers_scores(oracle, PAIRS, max_length)
        assert np.std(expected) > 1000 * TOLERANCE
        scores = score(load(folder, max_length=max_length), PAIRS)
        np.testing.assert_allclose(scores, expected, rtol=0, atol=TOLERANCE)


def test_the_second_text_has_token_type_1_where_the_table_has_it(tmp_path: Path) -> None:
    folder = build(RERANKERS[2], tmp_path)
    before = load(folder).score_pairs(PAIRS[:4])

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["embeddings.token_type_embeddings.weight"][1, :8] += 1

    assert np.abs(load(rewrite(folder, change)).score_pairs(PAIRS[:4]) - before).min() > 1e-3


def test_a_pair_scores_the_same_alone_and_among_others(reranker: GTEReranker) -> None:
    together = reranker.score_pairs(PAIRS)
    alone = np.concatenate([reranker.score_pairs([pair]) for pair in PAIRS])
    np.testing.assert_allclose(together, alone, rtol=0, atol=TOLERANCE)


def test_all_layouts_of_one_reranker_have_one_fingerprint(reranker_folder: Path, tmp_path: Path) -> None:
    unpacked = build(dataclasses.replace(LEGACY, layout="legacy-unpacked"), tmp_path / "unpacked")
    native = native_twin(reranker_folder, tmp_path / "native")
    fingerprints = {load(path).fingerprint for path in (reranker_folder, unpacked, native)}
    assert len(fingerprints) == 1
    other = rewrite(unpacked, lambda tensors: tensors["classifier.weight"].neg_())
    assert load(other).fingerprint not in fingerprints


def test_rerank_puts_the_best_text_first(reranker: GTEReranker) -> None:
    scores = reranker.score_pairs([(TEXTS[0], text) for text in TEXTS])
    results = reranker.rerank(TEXTS[0], TEXTS)
    assert [result.index for result in results] == np.argsort(-scores).tolist()
    assert results == [
        RerankResult(result.index, TEXTS[result.index], float(scores[result.index])) for result in results
    ]
    assert reranker.rerank(TEXTS[0], TEXTS, top_k=3) == results[:3]
    assert reranker.rerank(TEXTS[0], TEXTS, top_k=100) == results


def test_equal_texts_keep_their_order(reranker: GTEReranker) -> None:
    results = reranker.rerank("the cat", ["one", "two", "one", "one"])
    assert [result.index for result in results if result.text == "one"] == [0, 2, 3]


def test_nothing_gives_nothing(reranker: GTEReranker) -> None:
    assert reranker.rerank("the cat", []) == []
    scores = reranker.score_pairs([])
    assert scores.shape == (0,)
    assert scores.dtype == np.float32


async def test_async_calls_give_the_same_from_another_thread(
    reranker: GTEReranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = reranker.rerank(TEXTS[0], TEXTS, top_k=2), reranker.score_pairs(PAIRS).tolist()
    threads = []
    forward = reranker._forward

    def watched(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return forward(*args)

    monkeypatch.setattr(reranker, "_forward", watched)
    assert await reranker.arerank(TEXTS[0], TEXTS, top_k=2) == expected[0]
    assert (await reranker.ascore_pairs(PAIRS)).tolist() == expected[1]
    assert threads
    assert threading.main_thread() not in threads


def test_pairs_that_are_too_long_are_counted_in_one_warning(reranker_folder: Path) -> None:
    reranker = load(reranker_folder, max_length=64)
    with pytest.warns(UserWarning, match=r"2 of 3 pairs are longer than max_length=64 tokens and were cut") as caught:
        reranker.score_pairs([("the cat", LONG_TEXT), ("the cat", "the dog"), (LONG_TEXT, LONG_TEXT)])
    assert caught[0].filename == __file__


# Tokenization


@given(st.integers(0, 40), st.integers(0, 40), st.integers(2, 60))
@settings(max_examples=300, deadline=None)
def test_pairs_are_shortened_as_by_longest_first(first: int, second: int, room: int) -> None:
    tokenizer = plain_tokenizer()
    tokenizer.enable_truncation(room, strategy="longest_first")
    types = tokenizer.encode("a " * first, "b " * second).type_ids
    assert shorten_pair(first, second, room) == (types.count(0), types.count(1))


def plain_tokenizer() -> Tokenizer:
    """One token per word and no special tokens."""
    from tokenizers import models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


@each_reranker
def test_pairs_are_joined_as_by_the_tokenizer_itself(variant: Variant, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(build(variant, tmp_path) / "tokenizer.json"))
    template = pair_template(tokenizer)
    assert template.num_specials == (4 if variant.tokenizer == "xlmr" else 3)
    token_ids, type_ids, truncated = tokenize_pairs(tokenizer, template, PAIRS, 10_000)
    for pair, ids, types in zip(PAIRS, token_ids, type_ids, strict=True):
        encoding = tokenizer.encode(*pair)
        assert (ids, types) == (encoding.ids, encoding.type_ids)
    assert truncated == 0


def test_xlmr_pairs_have_the_documented_form(reranker_folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(reranker_folder / "tokenizer.json"))
    ((ids,), _, _) = tokenize_pairs(tokenizer, pair_template(tokenizer), [("the", "cat")], 10)
    assert [tokenizer.id_to_token(token_id) for token_id in ids] == ["<s>", "▁the", "</s>", "</s>", "▁cat", "</s>"]


def test_a_tokenizer_without_a_pair_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not join two texts"):
        pair_template(plain_tokenizer())
    copy = build(LEGACY, tmp_path)
    raw = json.loads((copy / "tokenizer.json").read_text(encoding="utf-8"))
    raw["post_processor"]["pair"] = raw["post_processor"]["pair"][::-1]
    (copy / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot encode pairs: the tokenizer does not join"):
        load(copy)


def test_the_head_is_tanh_pooler_and_classifier() -> None:
    eye = torch.eye(2)
    hidden = torch.tensor([[0.5, -1.0], [100.0, 0.0]], dtype=torch.float16)
    scores = rerank_scores(hidden, eye, torch.tensor([0.5, 0.0]), torch.tensor([[1.0, 2.0]]), torch.tensor([3.0]))
    expected = [np.tanh(1.0) + 2 * np.tanh(-1.0) + 3, 1.0 + 3]
    assert scores.dtype == torch.float32
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


# What is refused


def test_the_bundled_model_says_that_reranking_needs_a_checkpoint() -> None:
    message = (
        "gte-mini cannot rerank: it has no pooler.* needs a checkpoint .*'Alibaba-NLP/gte-multilingual-reranker-base'"
    )
    with pytest.raises(CheckpointError, match=message):
        GTEReranker.from_pretrained("gte-mini")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("multilingual-base", r"it has no pooler\.dense\.weight"),
        ("large-en", r"it has no pooler\.dense\.weight and no classifier\.weight"),
    ],
)
def test_an_encoder_is_refused(name: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"cannot rerank: {reason}.*GTEEncoder.score_pairs scores pairs"):
        load(build(find_variant(name), tmp_path))


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    def three_labels(tensors: dict[str, torch.Tensor]) -> None:
        tensors["classifier.weight"] = torch.zeros(3, 64)
        tensors["classifier.bias"] = torch.zeros(3)

    with pytest.raises(CheckpointError, match=r"its classifier\.weight has shape \(3, 64\), .* a reranker \(1, 64\)"):
        load(rewrite(build(LEGACY, tmp_path), three_labels))


@pytest.mark.parametrize("key", ["new.pooler.dense.weight", "new.pooler.dense.bias", "classifier.bias"])
def test_a_misshapen_head_is_refused_by_its_name(key: str, tmp_path: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key] = torch.zeros(5, 64)

    with pytest.raises(CheckpointError, match=rf"{key.removeprefix('new.')} has shape \(5, 64\)"):
        load(rewrite(build(LEGACY, tmp_path), widen))


def test_an_encoder_of_a_reranker_names_the_reranker_for_scoring(reranker_folder: Path) -> None:
    encoder = GTEEncoder.from_pretrained(reranker_folder, device="cpu")
    with pytest.raises(CheckpointError, match=r"GTEReranker scores pairs with it\): it is a reranker"):
        encoder.score_pairs([("a", "b")])


def test_a_length_without_room_for_both_texts_is_refused(reranker_folder: Path) -> None:
    with pytest.raises(ValueError, match="max_length is 5; a pair needs at least 6 tokens"):
        load(reranker_folder, max_length=5)
    with pytest.raises(ValueError, match="max_length is 9000; this model reads 3 to 8192"):
        load(reranker_folder, max_length=9000)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda r: r.rerank(["q"], ["t"]), TypeError, "query is list; give one string"),
        (lambda r: r.rerank("q", "t"), TypeError, "texts is a single str"),
        (lambda r: r.rerank("q", [None]), TypeError, r"texts\[0\] is NoneType"),
        (lambda r: r.rerank("q", ["t"], top_k=0), ValueError, "top_k is 0; it must be at least 1"),
        (lambda r: r.rerank("q", ["t"], top_k=True), TypeError, "top_k is True; give a whole number"),
        (lambda r: r.score_pairs("ab"), TypeError, "pairs is str"),
        (lambda r: r.score_pairs(["ab"]), TypeError, r"pairs\[0\] is 'ab'"),
        (lambda r: r.score_pairs([("a", "b"), ("a", 1)]), TypeError, r"pairs\[1\]: texts\[1\] is int"),
        (lambda r: r.score_pairs([("a", "\ud800")]), ValueError, r"pairs\[0\]: texts\[1\] has a lone surrogate"),
    ],
)
def test_wrong_arguments_are_refused(reranker: GTEReranker, call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(reranker)


def test_check_pairs_takes_lists_as_pairs() -> None:
    assert check_pairs([["a", "b"]]) == [("a", "b")]  # type: ignore[list-item]


@pytest.mark.skipif(
    "GTE_RAG_REFERENCE_RERANKER" not in os.environ,
    reason="GTE_RAG_REFERENCE_RERANKER names no folder or id of gte-multilingual-reranker-base",
)
def test_the_model_cards_scores() -> None:
    reranker = GTEReranker.from_pretrained(os.environ["GTE_RAG_REFERENCE_RERANKER"], max_length=512)
    pairs = [
        ("中国的首都在哪儿", "北京"),
        ("what is the capital of China?", "北京"),
        ("how to implement quick sort in python?", "Introduction of quick sort"),
    ]
    # The card ran the model in float16.
    np.testing.assert_allclose(reranker.score_pairs(pairs), [1.2315, 0.5923, 0.3041], atol=5e-3)


def test_a_copy_of_a_reranker_is_the_reranker(reranker: GTEReranker) -> None:
    assert copy.deepcopy([reranker])[0] is reranker
