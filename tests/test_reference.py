"""The oracle is itself checked: against ``transformers`` and against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from checkpoints import (
    TEXTS,
    VARIANTS,
    VOCAB_SIZE,
    Variant,
    build,
    find_variant,
    native_twin,
    read_config,
    read_weights,
    special_ids,
    token_ids,
    transformers_vectors,
)
from reference import ReferenceEncoder, dense, inverse_frequencies, sparse, sparse_dot, token_weights

PLAIN = [v for v in VARIANTS if not v.mixed]

# Float32 against float64: differences reach about 1e-7 for vectors and 3e-6 for weights at these lengths.
# They grow with the length, because float32 angles lose precision with the position.
TOLERANCE = 1e-5


def oracle(folder: Path) -> ReferenceEncoder:
    """The reference encoder of a checkpoint."""
    return ReferenceEncoder(read_config(folder), read_weights(folder))


def long_ids(length: int = 300) -> list[int]:
    """Token ids of a long random text."""
    return [int(i) for i in np.random.default_rng(7).integers(4, VOCAB_SIZE, length)]


@pytest.mark.parametrize("v", PLAIN, ids=lambda v: v.name)
def test_oracle_agrees_with_transformers(v: Variant, tmp_path: Path) -> None:
    folder = build(v, tmp_path / "checkpoint")
    lists = [*token_ids(folder, TEXTS), long_ids()]
    expected_dense, expected_weights = transformers_vectors(native_twin(folder, tmp_path / "twin"), lists)
    encoder = oracle(folder)
    positive: list[bool] = []
    assert (encoder.classifier_weight is not None) == v.head == bool(expected_weights)
    for i, ids in enumerate(lists):
        hidden = encoder(ids)
        assert hidden.shape == (len(ids), v.hidden)
        assert hidden.dtype == np.float64
        np.testing.assert_allclose(dense(hidden, v.hidden), expected_dense[i], rtol=0, atol=TOLERANCE)
        if encoder.classifier_weight is not None and encoder.classifier_bias is not None:
            weights = token_weights(hidden, encoder.classifier_weight, encoder.classifier_bias)
            np.testing.assert_allclose(weights, expected_weights[i], rtol=0, atol=TOLERANCE)
            positive += (weights > 0).tolist()
    if v.head:
        assert 0.1 < np.mean(positive) < 0.9  # neither all cut off nor all kept


@pytest.mark.parametrize("v", [v for v in PLAIN if not v.native and v.shards == 1], ids=lambda v: v.name)
def test_twin_holds_what_transformers_itself_reads_from_legacy_keys(v: Variant, tmp_path: Path) -> None:
    from transformers import GteConfig, GteModel

    folder = build(v, tmp_path / "checkpoint")
    twin = native_twin(folder, tmp_path / "twin")
    config = GteConfig.from_pretrained(twin)
    converted = GteModel.from_pretrained(folder, config=config, dtype=torch.float32).state_dict()
    ours = {key.removeprefix("gte."): w for key, w in read_weights(twin).items()}
    for key, w in converted.items():
        if v.layout == "legacy-unpacked" and ("q_proj" in key or "k_proj" in key or "v_proj" in key):
            continue  # transformers knows the packed layout only
        np.testing.assert_array_equal(ours[key], w.numpy(), err_msg=key)


def test_legacy_and_native_layouts_of_the_same_weights_give_the_same_states(tmp_path: Path) -> None:
    legacy = oracle(build(find_variant("multilingual-base"), tmp_path / "legacy"))
    native = oracle(build(find_variant("multilingual-native"), tmp_path / "native"))
    ids = long_ids(60)
    np.testing.assert_allclose(legacy(ids), native(ids), rtol=0, atol=1e-12)


def test_theta_times_factor_alone_is_not_the_multilingual_model(tmp_path: Path) -> None:
    folder = build(find_variant("multilingual-base"), tmp_path)
    config, weights = read_config(folder), read_weights(folder)
    right = ReferenceEncoder(config, weights)
    wrong = ReferenceEncoder(config | {"rope_theta": 160000, "rope_scaling": None}, weights)
    ids = long_ids()
    assert np.abs(dense(right(ids), 128) - dense(wrong(ids), 128)).max() > 1e-3


def test_mixed_scaling_changes_the_states(tmp_path: Path) -> None:
    folder = build(find_variant("mixed-ntk"), tmp_path)
    config, weights = read_config(folder), read_weights(folder)
    mixed = ReferenceEncoder(config, weights)
    plain = ReferenceEncoder(config | {"rope_scaling": {"type": "ntk", "factor": 8.0}}, weights)
    ids = long_ids()
    assert np.abs(dense(mixed(ids), 64) - dense(plain(ids), 64)).max() > 1e-3
    with pytest.raises(ValueError, match="mixed_b"):
        native_twin(folder, tmp_path / "twin")


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, [1.0, 0.1]),
        ({"type": "linear", "factor": 4.0}, [0.25, 0.025]),
        # base 1600, all divided by 16 ** (2/4) = 4
        ({"type": "ntk", "factor": 16.0}, [0.25, 0.00625]),
        ({"type": "ntk", "factor": 16.0, "mixed_b": None}, [0.25, 0.00625]),
        # a = ln(16) / 2, so the divisors are exp(a) = 4 and exp(2a) = 16; the base stays 100
        ({"type": "ntk", "factor": 16.0, "mixed_b": 1}, [0.25, 0.00625]),
        # a = ln(16) / 4, so the divisors are exp(a) = 2 and exp(4a) = 16
        ({"type": "ntk", "factor": 16.0, "mixed_b": 2}, [0.5, 0.00625]),
    ],
)
def test_legacy_frequencies_are_those_worked_out_by_hand(
    scaling: dict[str, object] | None, expected: list[float]
) -> None:
    config = {"rope_theta": 100, "rope_scaling": scaling}
    np.testing.assert_allclose(inverse_frequencies(config, 4), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default", "rope_theta": 100}, [1.0, 0.1]),
        ({"rope_type": "linear", "rope_theta": 1600, "factor": 4.0}, [0.25, 0.00625]),
    ],
)
def test_native_frequencies_are_those_worked_out_by_hand(rope: dict[str, object], expected: list[float]) -> None:
    np.testing.assert_allclose(inverse_frequencies({"rope_parameters": rope}, 4), expected, rtol=1e-15)


def test_fractional_mixed_scaling() -> None:
    # For m = 1..4 the divisor is 8 ** sqrt(m / 4).
    config = {"rope_theta": 10000, "rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.5}}
    expected = [1 / 2.828427124746, 0.1 / 4.350919557125, 0.01 / 6.054787011700, 0.001 / 8]
    np.testing.assert_allclose(inverse_frequencies(config, 8), expected, rtol=1e-9)


def test_legacy_and_native_frequencies_of_the_multilingual_model_are_equal() -> None:
    legacy = {"rope_theta": 20000, "rope_scaling": {"type": "ntk", "factor": 8.0}}
    native = {"rope_parameters": {"rope_type": "linear", "rope_theta": 160000, "factor": 1.0671404006768237}}
    np.testing.assert_array_equal(inverse_frequencies(legacy, 64), inverse_frequencies(native, 64))


def test_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="'yarn'"):
        inverse_frequencies({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2.0}}, 4)


def test_dense_cuts_first_and_normalises_then() -> None:
    hidden = np.array([[3.0, 4.0, 12.0], [9.0, 9.0, 9.0]])
    np.testing.assert_allclose(dense(hidden, 2), [0.6, 0.8], rtol=1e-15)


def test_sparse_keeps_the_largest_positive_weight_of_each_ordinary_token() -> None:
    hidden = np.array([[9.0], [2.0], [3.0], [1.0], [-5.0], [0.5], [9.0]])
    ids = [0, 10, 10, 10, 11, 12, 2]
    vector = sparse(hidden, ids, np.array([[2.0]]), np.array([-1.0]), special_ids={0, 1, 2, 3})
    assert vector == {10: 5.0}  # 11 is below 0, 12 is exactly 0
    assert sparse_dot(vector, {10: 0.5, 11: 7.0}) == 2.5
    assert sparse_dot(vector, {}) == 0


@pytest.mark.parametrize("name", ["multilingual-base", "base-en"])
def test_tokenizers_cover_the_texts(name: str, tmp_path: Path) -> None:
    v = find_variant(name)
    folder = build(v, tmp_path)
    specials = special_ids(folder)
    assert specials == ({0, 1, 2, 3} if v.tokenizer == "xlmr" else {0, 11, 12, 13})
    unknown = 3 if v.tokenizer == "xlmr" else 11
    lists = dict(zip(TEXTS, token_ids(folder, TEXTS), strict=True))
    assert len(lists[""]) == 2
    assert [text for text, ids in lists.items() if unknown in ids] == ["🙂"]
    assert max(map(len, lists.values())) > 300
    repeated = lists["the cat and the dog and the bird"]
    assert len(set(repeated)) == len(repeated) - 3


def test_builds_are_reproducible_and_seeds_matter(tmp_path: Path) -> None:
    first, again, other = (
        build(VARIANTS[0], tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()
    assert (first / "tokenizer.json").read_bytes() == (again / "tokenizer.json").read_bytes()
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
