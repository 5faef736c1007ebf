"""`convert` writes what `transformers` loads by itself, and the converted checkpoint is the same model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from checkpoints import LONG_TEXT, TEXTS, Variant, build, find_variant, transformers_scores
from gte_rag import CheckpointError, GTEEncoder, GTEReranker
from gte_rag.checkpoint import convert

# float32 rounding through the layers.
TOLERANCE = 1e-5
PAIRS = [(TEXTS[0], text) for text in (*TEXTS[1:5], LONG_TEXT[:200])]

TOKEN, SEQUENCE, NO_HEAD = "GteForTokenClassification", "GteForSequenceClassification", "GteModel"
CASES = {
    "multilingual-base": TOKEN,
    "unpacked-bfloat16": TOKEN,
    "multilingual-native": TOKEN,
    "sharded": TOKEN,
    "multilingual-reranker": SEQUENCE,
    "multilingual-mlm": NO_HEAD,
    "large-en": NO_HEAD,
    "arctic": NO_HEAD,
}


def load_as_transformers_does(folder: Path, architecture: str) -> tuple[Any, Any]:
    """Load tokenizer and model by what the folder says of itself, without remote code and without a question."""
    import transformers

    auto = {TOKEN: "AutoModelForTokenClassification", SEQUENCE: "AutoModelForSequenceClassification"}
    loader: Any = getattr(transformers, auto.get(architecture, "AutoModel"))
    loaded: Any = loader.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False, attn_implementation="eager"
    )
    model, report = loaded
    assert type(model).__name__ == architecture
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return tokenizer, model.eval()


@torch.inference_mode()
def dense_and_weights(folder: Path, architecture: str, text: str) -> tuple[NDArray[Any], NDArray[Any] | None]:
    tokenizer, model = load_as_transformers_does(folder, architecture)
    inputs = tokenizer([text], return_tensors="pt", return_token_type_ids=False)
    if architecture == NO_HEAD:
        hidden, weights = model(**inputs).last_hidden_state[0], None
    else:
        output = model(**inputs, output_hidden_states=True)
        hidden, weights = output.hidden_states[-1][0], output.logits[0, :, 0].relu().numpy()
    return torch.nn.functional.normalize(hidden[0], dim=0).numpy(), weights


@pytest.mark.parametrize("name", [name for name, architecture in CASES.items() if architecture != SEQUENCE])
def test_transformers_loads_a_converted_encoder_and_gives_the_same_vectors(name: str, tmp_path: Path) -> None:
    source, target = build(find_variant(name), tmp_path / "source"), tmp_path / "target"
    assert convert(source, target).folder == source
    dense, weights = dense_and_weights(target, CASES[name], TEXTS[0])
    encoder = GTEEncoder.from_pretrained(source, device="cpu", precision="float32")
    encoding = encoder.encode_documents([TEXTS[0]], sparse=encoder.has_sparse)
    assert encoding.dense is not None
    np.testing.assert_allclose(encoding.dense[0], dense, rtol=0, atol=TOLERANCE)
    assert (encoding.sparse is None) == (weights is None)
    if encoding.sparse is not None and weights is not None:
        # The tokens of this text are all different, its first and last ones special.
        ids = encoder.tokenizer.encode(TEXTS[0]).ids
        expected = {
            token: weight for token, weight in zip(ids[1:-1], weights[1:-1].tolist(), strict=True) if weight > 0
        }
        known = {token: weight for token, weight in expected.items() if token != 3}
        assert encoding.sparse[0].to_dict() == pytest.approx(known, abs=TOLERANCE, rel=0)


@pytest.mark.parametrize("layout", ["legacy", "legacy-unpacked", "native"])
def test_transformers_loads_a_converted_reranker_and_gives_the_same_scores(layout: Any, tmp_path: Path) -> None:
    source = build(Variant("reranker", layout=layout, pooler=True), tmp_path / "source")
    convert(source, tmp_path / "target")
    load_as_transformers_does(tmp_path / "target", SEQUENCE)
    reranker = GTEReranker.from_pretrained(source, device="cpu", precision="float32")
    expected = transformers_scores(tmp_path / "target", PAIRS, 8192)
    np.testing.assert_allclose(reranker.score_pairs(PAIRS), expected, rtol=0, atol=TOLERANCE)
    again = GTEReranker.from_pretrained(tmp_path / "target", device="cpu", precision="float32")
    assert again.fingerprint == reranker.fingerprint
    np.testing.assert_allclose(again.score_pairs(PAIRS), expected, rtol=0, atol=TOLERANCE)


def test_sentence_transformers_loads_a_converted_reranker(tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    source = build(find_variant("multilingual-reranker"), tmp_path / "source")
    convert(source, tmp_path / "target", dtype="float32")
    cross_encoder = sentence_transformers.CrossEncoder(str(tmp_path / "target"), device="cpu")
    scores = cross_encoder.predict(PAIRS, activation_fn=torch.nn.Identity(), show_progress_bar=False)
    reranker = GTEReranker.from_pretrained(source, device="cpu", precision="float32")
    np.testing.assert_allclose(reranker.score_pairs(PAIRS), scores, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_the_folder_says_what_it_is(name: str, tmp_path: Path) -> None:
    source, target = build(find_variant(name), tmp_path / "source"), tmp_path / "target"
    convert(source, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == [CASES[name]]
    assert config["model_type"] == "gte"
    assert "auto_map" not in config
    assert config["dtype"] == find_variant(name).dtype
    assert (target / "modules.json").exists() == (CASES[name] != SEQUENCE)
    assert not list(target.glob("*.py"))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_of_the_weights_can_be_chosen(dtype: str, tmp_path: Path) -> None:
    source = build(find_variant("multilingual-reranker"), tmp_path / "source")
    convert(source, tmp_path / "target", dtype=dtype)
    with safe_open(tmp_path / "target" / "model.safetensors", framework="pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {getattr(torch, dtype)}  # noqa: SIM118
    assert json.loads((tmp_path / "target" / "config.json").read_text(encoding="utf-8"))["dtype"] == dtype


def test_converting_twice_gives_the_same_files(tmp_path: Path) -> None:
    source = build(find_variant("bare-with-head"), tmp_path / "source")
    convert(source, tmp_path / "once")
    convert(tmp_path / "once", tmp_path / "twice")
    once, twice = (
        sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("once", "twice")
    )
    assert [path.relative_to(tmp_path / "once") for path in once] == [
        path.relative_to(tmp_path / "twice") for path in twice
    ]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(once, twice, strict=True))


def test_a_query_prompt_is_kept(tmp_path: Path) -> None:
    convert(build(find_variant("arctic"), tmp_path / "source"), tmp_path / "target")
    assert GTEEncoder.from_pretrained(tmp_path / "target", device="cpu").query_prompt == "query: "


def test_the_bundled_model_can_be_converted(tmp_path: Path) -> None:
    convert("gte-mini", tmp_path / "target", dtype="float16")
    encoder = GTEEncoder.from_pretrained(tmp_path / "target", device="cpu")
    assert encoder.fingerprint == GTEEncoder.from_pretrained(device="cpu").fingerprint


# What is refused


def test_a_folder_that_is_not_empty_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="exists and is not an empty folder"):
        convert("no/such", tmp_path)


def test_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="dtype is 'int8'; accepted: 'float32', 'float16', 'bfloat16' and None"):
        convert("gte-mini", tmp_path / "target", dtype="int8")


def test_mixed_scaling_has_no_native_form(tmp_path: Path) -> None:
    source = build(find_variant("mixed-ntk"), tmp_path / "source")
    with pytest.raises(ValueError, match="cannot express rope_scaling with mixed_b"):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_weights_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    source = build(find_variant("bare-with-head"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["embeddings.LayerNorm.bias"][0] = 1e5
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"embeddings\.LayerNorm\.bias has values that torch\.float16 cannot hold"):
        convert(source, tmp_path / "target", dtype="float16")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(source, tmp_path / "target", dtype="bfloat16")


def test_a_missing_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint"):
        convert(tmp_path / "nowhere", tmp_path / "target")
