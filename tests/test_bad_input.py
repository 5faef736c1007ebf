"""Whatever is handed in, there is a result that was meant or an error that says what was given and what is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import build, find_variant
from gte_rag import CheckpointError, GTEEncoder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> GTEEncoder:
    folder = build(find_variant("bare-with-head"), tmp_path_factory.mktemp("tiny"))
    return GTEEncoder.from_pretrained(folder, device="cpu")


# Texts

LIST = "give a list of strings"
EVERY = "every text must be a string"
SURROGATE = r"lone surrogate .* repair it"


@pytest.mark.parametrize("method", ["encode_queries", "encode_documents"])
@pytest.mark.parametrize(
    ("texts", "error", "message"),
    [
        (None, TypeError, f"texts is NoneType; {LIST}"),
        (7, TypeError, f"texts is int; {LIST}"),
        ("text", TypeError, f"texts is a single str; {LIST}"),
        ("", TypeError, f"texts is a single str; {LIST}"),
        (b"text", TypeError, f"texts is a single bytes; {LIST}"),
        ({"a": "b"}, TypeError, f"texts is dict; {LIST}"),
        ({"a"}, TypeError, f"texts is set; {LIST}"),
        ([None], TypeError, rf"texts\[0\] is NoneType; {EVERY}"),
        (["a", b"b"], TypeError, rf"texts\[1\] is bytes; {EVERY}"),
        ([["a"]], TypeError, rf"texts\[0\] is list; {EVERY}"),
        ([("a", "b")], TypeError, rf"texts\[0\] is tuple; {EVERY}"),
        (np.array(["a", None]), TypeError, rf"texts\[1\] is NoneType; {EVERY}"),
        (np.array(["a", "b"])[:, None], TypeError, rf"texts\[0\] is ndarray; {EVERY}"),
        (["\ud800"], ValueError, rf"texts\[0\] has a {SURROGATE}"),
        (["ok", "half \udc00 pair"], ValueError, rf"texts\[1\] has a {SURROGATE}"),
    ],
    ids=repr,
)
def test_what_is_no_list_of_texts_is_refused(
    tiny: GTEEncoder, method: str, texts: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(tiny, method)(texts)


@pytest.mark.parametrize(
    "texts",
    [
        [],
        [""],
        ["", " ", "\t\n", "\u3000", "\u200b"],
        ["\0", "a\0b"],
        ["\x1b[31m", "\x7f", "\ufeff", "\uffff", "\U0010ffff"],
        ["🏳️‍🌈 👩‍👩‍👧 e\u0301", "\u202eright to left"],
        ("a", "b"),
        np.array(["a", "bc"]),
        (text for text in ("a", "b")),
    ],
    ids=["none", "empty", "blank", "NUL", "control", "joined", "tuple", "array", "generator"],
)
def test_every_list_of_texts_gives_one_finite_row_per_text(tiny: GTEEncoder, texts: Any) -> None:
    count = 2 if not hasattr(texts, "__len__") else len(texts)
    encoding = tiny.encode_documents(texts)
    assert encoding.dense is not None
    assert encoding.sparse is not None
    assert encoding.dense.shape == (count, 64)
    assert len(encoding.sparse) == count
    np.testing.assert_allclose(np.linalg.norm(encoding.dense, axis=1), 1, atol=1e-6)
    assert encoding.truncated == 0


def test_a_text_over_8192_tokens_is_cut_with_a_warning(tiny: GTEEncoder) -> None:
    text = "the " * 8191
    assert tiny.count_tokens(text) == 8193
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than max_length=8192 tokens and were cut"):
        encoding = tiny.encode_documents([text])
    assert encoding.truncated == 1
    assert encoding.dense is not None
    assert np.isfinite(encoding.dense).all()


@pytest.mark.parametrize(
    "text",
    ["word " * 20_000, "a" * 100_000, "北" * 1_000_000],
    ids=["100,000 characters", "one long word", "a megabyte without a space"],
)
def test_a_text_of_any_length_is_read_to_the_limit(tiny: GTEEncoder, text: str) -> None:
    short = GTEEncoder.from_pretrained(tiny.name, device="cpu", max_length=16)
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than max_length=16 tokens and were cut"):
        encoding = short.encode_documents([text])
    assert encoding.truncated == 1
    assert encoding.dense is not None
    assert np.isfinite(encoding.dense).all()


# Options of a call


@pytest.mark.parametrize(
    ("dimension", "error", "message"),
    [
        (0, ValueError, "dimension is 0; this model gives dense vectors of 32 to 64"),
        (1, ValueError, "dimension is 1; this model gives dense vectors of 32 to 64"),
        (-1, ValueError, "dimension is -1"),
        (31, ValueError, "dimension is 31"),
        (65, ValueError, "dimension is 65"),
        (769, ValueError, "dimension is 769"),
        ("256", TypeError, "dimension is '256'; give a whole number from 32 to 64"),
        (True, TypeError, "dimension is True; give a whole number"),
        (64.0, TypeError, "dimension is 64.0; give a whole number"),
        ([64], TypeError, r"dimension is \[64\]; give a whole number"),
    ],
    ids=repr,
)
def test_a_dimension_the_model_does_not_have_is_refused(
    tiny: GTEEncoder, dimension: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny.encode_documents(["a"], dimension=dimension)
    with pytest.raises(error, match=message):
        GTEEncoder.from_pretrained(tiny.name, dimension=dimension)


def test_asking_for_neither_kind_of_vector_is_refused(tiny: GTEEncoder) -> None:
    with pytest.raises(ValueError, match="dense and sparse are both False; ask for at least one"):
        tiny.encode_queries(["a"], dense=False, sparse=False)


@pytest.mark.parametrize("text", [None, 3, b"text", ["text"]], ids=repr)
def test_only_a_string_has_a_number_of_tokens(tiny: GTEEncoder, text: Any) -> None:
    with pytest.raises(TypeError, match=f"is {type(text).__name__}; {EVERY}"):
        tiny.count_tokens(text)


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        (None, TypeError, r"pairs is NoneType; give a list of \(query, document\) tuples"),
        ("ab", TypeError, "pairs is str; give a list"),
        (b"ab", TypeError, "pairs is bytes; give a list"),
        ({"a": "b"}, TypeError, "pairs is dict; give a list"),
        (zip("a", "b", strict=True), TypeError, "pairs is zip; give a list"),
        (["ab"], TypeError, r"pairs\[0\] is 'ab'; every pair must be a \(query, document\) tuple"),
        ([("a", "b"), ("a",)], TypeError, r"pairs\[1\] is \('a',\); every pair"),
        ([("a", "b", "c")], TypeError, r"pairs\[0\] is \('a', 'b', 'c'\); every pair"),
        ([{"a", "b"}], TypeError, r"pairs\[0\] is \{.*\}; every pair"),
        ([None], TypeError, r"pairs\[0\] is None; every pair"),
        ([("a", None)], TypeError, r"pairs\[0\]: texts\[1\] is NoneType; every text must be a string"),
        ([(b"a", "b")], TypeError, r"pairs\[0\]: texts\[0\] is bytes; every text must be a string"),
        ([("a", "\ud800")], ValueError, SURROGATE),
    ],
    ids=[f"pairs {number}" for number in range(13)],  # the same in every process: a zip shows its address
)
def test_what_is_no_list_of_pairs_is_refused(
    tiny: GTEEncoder, pairs: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny.score_pairs(pairs)


@pytest.mark.parametrize("name", ["dense_weight", "sparse_weight"])
@pytest.mark.parametrize(
    ("weight", "error", "message"),
    [
        (None, TypeError, "is None; give a number"),
        ("1", TypeError, "is '1'; give a number"),
        (True, TypeError, "is True; give a number"),
        (float("nan"), ValueError, "is nan; give a finite number"),
        (float("inf"), ValueError, "is inf; give a finite number"),
    ],
    ids=repr,
)
def test_a_weight_of_a_score_is_a_finite_number(
    tiny: GTEEncoder, name: str, weight: Any, error: type[Exception], message: str
) -> None:
    options: dict[str, Any] = {name: weight}
    with pytest.raises(error, match=f"{name} {message}"):
        tiny.score_pairs([("a", "b")], **options)


# Options of the encoder


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_length": 2}, ValueError, "max_length is 2; this model reads 3 to 8192 tokens"),
        ({"max_length": 0}, ValueError, "max_length is 0; this model reads 3 to 8192 tokens"),
        ({"max_length": -1}, ValueError, "max_length is -1; this model reads"),
        ({"max_length": 8193}, ValueError, "max_length is 8193; this model reads"),
        ({"max_length": 9000}, ValueError, "max_length is 9000; this model reads 3 to 8192 tokens"),
        ({"max_length": "512"}, TypeError, "max_length is '512'; give a whole number of tokens from 3 to 8192"),
        ({"max_length": 512.0}, TypeError, "max_length is 512.0; give a whole number"),
        ({"max_length": True}, TypeError, "max_length is True; give a whole number"),
        ({"max_length": None}, TypeError, "max_length is None; give a whole number"),
        ({"device": "tpu"}, ValueError, "device 'tpu' is not available .*; None chooses one, 'cpu' always works"),
        ({"device": ""}, ValueError, "device '' is not available"),
        ({"device": "cpu:x"}, ValueError, "device 'cpu:x' is not available"),
        ({"device": "cuda:99"}, ValueError, "device 'cuda:99' is not available"),
        ({"device": "meta"}, ValueError, "device 'meta' is not available"),
        ({"device": 1.5}, ValueError, "device 1.5 is not available"),
        ({"precision": "fast"}, ValueError, "precision is 'fast'; accepted: 'auto', 'float32', 'bf16', 'int8'"),
        ({"precision": None}, TypeError, "precision is None; accepted"),
        ({"precision": torch.float32}, TypeError, "precision is torch.float32; accepted"),
        ({"name_or_path": None}, TypeError, "name_or_path is NoneType; give a name, a folder or a Hugging Face id"),
        ({"name_or_path": 3}, TypeError, "name_or_path is int; give a name, a folder"),
        ({"name_or_path": "no/such/model"}, CheckpointError, "no checkpoint 'no/such/model': give 'gte-mini'"),
        (
            {"name_or_path": "nonsense"},
            CheckpointError,
            "no checkpoint 'nonsense': give 'gte-mini', an existing folder",
        ),
        ({"name_or_path": "no-such/model"}, CheckpointError, "cannot fetch 'no-such/model' from Hugging Face"),
        ({"name_or_path": ""}, CheckpointError, "has no config.json; give the folder that holds a checkpoint"),
        ({"device": 0, "max_length": 2}, ValueError, "max_length is 2"),
    ],
    ids=repr,
)
def test_an_option_out_of_range_is_refused(
    tiny: GTEEncoder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # an empty name is the working directory
    name = options.get("name_or_path", tiny.name)
    rest = {key: value for key, value in options.items() if key != "name_or_path"}
    with pytest.raises(error, match=message):
        GTEEncoder.from_pretrained(name, **rest)


def test_options_at_the_edge_of_their_range_are_accepted(tiny: GTEEncoder) -> None:
    encoder = GTEEncoder.from_pretrained(
        tiny.name, device=torch.device("cpu"), max_length=np.int64(3), dimension=32, precision="float32"
    )
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than max_length=3"):
        encoding = encoder.encode_documents(["the cat and the dog", "the"])
    assert encoding.dense is not None
    assert encoding.dense.shape == (2, 32)
    np.testing.assert_allclose(encoding.dense[0], encoding.dense[1], rtol=0, atol=1e-6)
