"""The encoder gives what `transformers` gives, and what an independent float64 implementation gives.

Tolerance 1e-5: float32 rounding through the layers; a wrong rotary base is off by more than 1e-3.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

import reference
from checkpoints import (
    LONG_TEXT,
    TEXTS,
    VARIANTS,
    Variant,
    build,
    find_variant,
    native_twin,
    read_config,
    read_weights,
    token_ids,
    transformers_vectors,
)
from checkpoints import special_ids as special_ids_of
from gte_rag import GTEEncoder
from gte_rag.vectors import Encoding

VERY_LONG = " ".join([LONG_TEXT] * 7)
MIXED = (*TEXTS, VERY_LONG)
TOLERANCE = 1e-5

each_variant = pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)


def encode(encoder: GTEEncoder, texts: tuple[str, ...]) -> Encoding:
    """Encode documents, sparse too where the checkpoint can."""
    return encoder.encode_documents(texts, sparse=encoder.has_sparse)


@each_variant
def test_vectors_equal_those_of_transformers(variant: Variant, tmp_path: Path) -> None:
    if variant.mixed:
        pytest.skip("transformers cannot express the mixed scaling; the float64 reference covers it")
    folder = build(variant, tmp_path / "checkpoint")
    encoder = GTEEncoder.from_pretrained(folder, device="cpu", precision="float32")
    ids = token_ids(folder, MIXED)
    assert max(map(len, ids)) > 2000
    oracle = folder if variant.native else native_twin(folder, tmp_path / "native")
    dense, weights = transformers_vectors(oracle, ids)
    encoding = encode(encoder, MIXED)
    assert encoding.dense is not None
    np.testing.assert_allclose(encoding.dense, np.stack(dense), rtol=0, atol=TOLERANCE)
    if encoding.sparse is not None:
        special = special_ids_of(folder)
        for text_ids, token_weights, vector in zip(ids, weights, encoding.sparse, strict=True):
            expected: dict[int, float] = {}
            for token, weight in zip(text_ids, token_weights.tolist(), strict=True):
                if weight > 0 and token not in special:
                    expected[token] = max(weight, expected.get(token, 0.0))
            assert vector.to_dict() == pytest.approx(expected, abs=TOLERANCE, rel=0)


@each_variant
def test_vectors_equal_those_of_the_float64_reference(variant: Variant, tmp_path: Path) -> None:
    folder = build(variant, tmp_path)
    encoder = GTEEncoder.from_pretrained(folder, device="cpu", precision="float32")
    oracle = reference.ReferenceEncoder(read_config(folder), read_weights(folder))
    dimension = encoder.config.hidden_size // 2
    ids = token_ids(folder, TEXTS)
    encoding = encoder.encode_documents(TEXTS, sparse=encoder.has_sparse, dimension=dimension)
    assert encoding.dense is not None
    for row, text_ids in enumerate(ids):
        hidden = oracle(text_ids)
        np.testing.assert_allclose(encoding.dense[row], reference.dense(hidden, dimension), rtol=0, atol=TOLERANCE)
        if encoding.sparse is not None:
            assert oracle.classifier_weight is not None
            assert oracle.classifier_bias is not None
            expected = reference.sparse(
                hidden, text_ids, oracle.classifier_weight, oracle.classifier_bias, special_ids_of(folder)
            )
            assert encoding.sparse[row].to_dict() == pytest.approx(expected, abs=TOLERANCE, rel=0)


def test_plain_theta_without_the_extra_factor_is_caught(tmp_path: Path) -> None:
    """The trap of FACTS: theta = 160000 alone is not what ntk with factor 8 means."""
    variant = find_variant("multilingual-base")
    folder = build(variant, tmp_path / "checkpoint")
    dense, _ = transformers_vectors(native_twin(folder, tmp_path / "native"), token_ids(folder, MIXED))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"rope_theta": 160000, "rope_scaling": None}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    wrong = GTEEncoder.from_pretrained(folder, device="cpu", precision="float32").encode_documents(MIXED).dense
    assert wrong is not None
    assert np.abs(wrong - np.stack(dense)).max() > 100 * TOLERANCE


def test_all_layouts_of_one_network_give_the_same_vectors_and_fingerprint(tmp_path: Path) -> None:
    base = find_variant("bare-with-head")
    results = []
    for layout in ("legacy", "legacy-bare", "legacy-unpacked"):
        variant = dataclasses.replace(base, layout=layout)
        results.append(GTEEncoder.from_pretrained(build(variant, tmp_path / layout), device="cpu", precision="float32"))
    results.append(
        GTEEncoder.from_pretrained(
            native_twin(tmp_path / "legacy", tmp_path / "native"), device="cpu", precision="float32"
        )
    )
    assert len({encoder.fingerprint for encoder in results}) == 1
    vectors = [encoder.encode_documents(TEXTS).dense for encoder in results]
    assert vectors[0] is not None
    for dense in vectors[1:]:
        assert dense is not None
        np.testing.assert_allclose(dense, vectors[0], rtol=0, atol=1e-6)
