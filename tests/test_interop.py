"""What is saved here loads in `sentence-transformers` and `transformers`, and what they save loads here: same vectors.

Tolerance 1e-5: float32 rounding, as for parity.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import TEXTS, build, find_variant
from gte_rag import GTEEncoder

sentence_transformers = pytest.importorskip("sentence_transformers")
transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-5
SAVED = ["gte-mini", "multilingual-base", "base-en", "arctic", "unpacked-bfloat16"]


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    """Their progress bars and remarks on unused heads are no news here."""
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("sentence_transformers").setLevel(logging.ERROR)
    yield
    transformers.utils.logging.set_verbosity(verbosity)
    transformers.utils.logging.enable_progress_bar()


@pytest.fixture(scope="module", params=SAVED)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[GTEEncoder, Path]:
    """An encoder, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp(request.param)
    name: str | Path = request.param
    if name != "gte-mini":
        name = build(find_variant(str(name)), folder / "original")
    encoder = GTEEncoder.from_pretrained(name, device="cpu", precision="float32")
    encoder.save_pretrained(folder / "saved")
    return encoder, folder / "saved"


def sentence_transformer(folder: Path) -> Any:
    return sentence_transformers.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def dense(encoder: GTEEncoder, texts: tuple[str, ...] = TEXTS) -> Any:
    return encoder.encode_documents(texts, sparse=False).dense


def load(folder: Path) -> GTEEncoder:
    return GTEEncoder.from_pretrained(folder, device="cpu", precision="float32")


def test_sentence_transformers_gives_the_same_dense_vectors(saved: tuple[GTEEncoder, Path]) -> None:
    encoder, folder = saved
    model = sentence_transformer(folder)
    assert model.max_seq_length == 8192
    assert model.similarity_fn_name == "cosine"
    np.testing.assert_allclose(model.encode(list(TEXTS)), dense(encoder), rtol=0, atol=TOLERANCE)
    queries = encoder.encode_queries(TEXTS, sparse=False).dense
    assert queries is not None
    np.testing.assert_allclose(model.encode_query(list(TEXTS)), queries, rtol=0, atol=TOLERANCE)
    np.testing.assert_allclose(model.encode_document(list(TEXTS)), dense(encoder), rtol=0, atol=TOLERANCE)


def test_transformers_gives_the_same_token_weights(saved: tuple[GTEEncoder, Path]) -> None:
    encoder, folder = saved
    if not encoder.has_sparse:
        pytest.skip("a dense-only checkpoint has no token classifier")
    model, report = transformers.GteForTokenClassification.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    model.eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    special = {tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    assert special == {0, 1, 2, 3}
    sparse = encoder.encode_documents(TEXTS).sparse
    assert sparse is not None
    for text, vector in zip(TEXTS, sparse, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.inference_mode():
            weights = model(**inputs).logits[0, :, 0].relu().tolist()
        expected: dict[int, float] = {}
        for token, weight in zip(inputs["input_ids"][0].tolist(), weights, strict=True):
            if weight > 0 and token not in special:
                expected[token] = max(weight, expected.get(token, 0.0))
        assert vector.to_dict() == pytest.approx(expected, rel=0, abs=TOLERANCE)


def test_a_folder_of_sentence_transformers_loads_here(saved: tuple[GTEEncoder, Path], tmp_path: Path) -> None:
    encoder, folder = saved
    sentence_transformer(folder).save_pretrained(str(tmp_path / "theirs"))
    theirs = load(tmp_path / "theirs")
    np.testing.assert_allclose(dense(theirs), dense(encoder), rtol=0, atol=TOLERANCE)
    assert (theirs.query_prompt, theirs.document_prompt) == (encoder.query_prompt, encoder.document_prompt)
    assert not theirs.has_sparse  # they load and save the encoder alone


def test_a_folder_of_transformers_loads_here(saved: tuple[GTEEncoder, Path], tmp_path: Path) -> None:
    encoder, folder = saved
    kind = transformers.GteForTokenClassification if encoder.has_sparse else transformers.GteModel
    kind.from_pretrained(folder).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    theirs = load(tmp_path)
    assert theirs.fingerprint == encoder.fingerprint
    assert theirs.has_sparse == encoder.has_sparse
    np.testing.assert_allclose(dense(theirs), dense(encoder), rtol=0, atol=TOLERANCE)


def test_a_folder_of_transformers_in_several_files_loads_here(encoder: GTEEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "saved")
    model = transformers.GteForTokenClassification.from_pretrained(tmp_path / "saved")
    model.save_pretrained(tmp_path / "shards", max_shard_size="5MB")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "saved").save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert load(tmp_path / "shards").fingerprint == encoder.fingerprint


@pytest.mark.parametrize("kind", ["GteForSequenceClassification", "GteForMaskedLM"])
def test_other_heads_of_transformers_leave_the_dense_vectors(kind: str, tmp_path: Path) -> None:
    build(find_variant("native-default"), tmp_path / "original")
    expected = dense(load(tmp_path / "original"))
    model = getattr(transformers, kind).from_pretrained(tmp_path / "original", num_labels=1)
    model.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "original").save_pretrained(tmp_path / "theirs")
    theirs = load(tmp_path / "theirs")
    assert not theirs.has_sparse
    np.testing.assert_allclose(dense(theirs), expected, rtol=0, atol=TOLERANCE)


def test_a_smaller_vector_stays_of_unit_length_unlike_theirs(encoder: GTEEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "saved")
    model = sentence_transformer(tmp_path / "saved")
    cut = encoder.encode_documents(TEXTS, sparse=False, dimension=64).dense
    assert cut is not None
    np.testing.assert_allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(
        model.encode(list(TEXTS), truncate_dim=64, normalize_embeddings=True), cut, rtol=0, atol=TOLERANCE
    )


def test_a_text_longer_than_a_saved_tokenizer_limit_gives_the_same_vector(tmp_path: Path) -> None:
    """The tokenizer file of this checkpoint carries a truncation to 128 tokens."""
    encoder = load(build(find_variant("base-en"), tmp_path / "original"))
    encoder.save_pretrained(tmp_path / "saved")
    raw = json.loads((tmp_path / "saved" / "tokenizer.json").read_text(encoding="utf-8"))
    assert raw["truncation"]["max_length"] == 128
    text = "the capital city " * 100
    assert encoder.count_tokens(text) == 302
    theirs = sentence_transformer(tmp_path / "saved").encode([text])
    np.testing.assert_allclose(theirs, dense(encoder, (text,)), rtol=0, atol=TOLERANCE)
