"""`config.json` in both dialects: read to the same network, or refused with the key that stands in the way."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import reference
from checkpoints import VARIANTS, Variant, build, read_config
from gte_rag.config import GTEConfig
from gte_rag.errors import CheckpointError

LEGACY: dict[str, Any] = {
    "model_type": "new",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "vocab_size": 250048,
    "max_position_embeddings": 8192,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-12,
    "layer_norm_type": "layer_norm",
    "position_embedding_type": "rope",
    "hidden_act": "gelu",
    "pad_token_id": 1,
    "logn_attention_scale": False,
    "logn_attention_clip1": False,
    "pack_qkv": True,
    "unpad_inputs": False,
    "use_memory_efficient_attention": False,
    "rope_theta": 20000,
    "rope_scaling": {"type": "ntk", "factor": 8.0},
}
NATIVE: dict[str, Any] = {
    "model_type": "gte",
    "hidden_size": 768,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "intermediate_size": 3072,
    "vocab_size": 250048,
    "rope_parameters": {"rope_type": "linear", "rope_theta": 160000, "factor": 8 ** (2 / 64)},
}

both_dialects = pytest.mark.parametrize("base", [LEGACY, NATIVE], ids=["legacy", "native"])


def test_both_dialects_of_the_multilingual_model_are_the_same_network() -> None:
    legacy, native = GTEConfig.from_dict(LEGACY), GTEConfig.from_dict(NATIVE)
    assert legacy.inverse_frequencies().tolist() == native.inverse_frequencies().tolist()
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "head_dim"):
        assert getattr(legacy, name) == getattr(native, name)
    # What the short native configuration leaves to defaults.
    assert native.max_position_embeddings == legacy.max_position_embeddings == 8192
    assert native.type_vocab_size == legacy.type_vocab_size == 1
    assert native.layer_norm_eps == legacy.layer_norm_eps == 1e-12
    assert native.pad_token_id == legacy.pad_token_id == 1


def test_fixed_ntk_scaling_is_not_just_a_larger_theta() -> None:
    """Plain theta = 160000 is off by 8 ** (2 / 64) at every frequency."""
    ntk = GTEConfig.from_dict(LEGACY).inverse_frequencies()
    plain = GTEConfig.from_dict(LEGACY | {"rope_theta": 160000, "rope_scaling": None}).inverse_frequencies()
    assert ntk.shape == (32,)
    np.testing.assert_allclose((plain / ntk).numpy(), 8 ** (2 / 64), rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: variant.name)
def test_frequencies_are_those_of_the_float64_reference(variant: Variant, tmp_path: Any) -> None:
    raw = read_config(build(variant, tmp_path))
    config = GTEConfig.from_dict(raw)
    expected = reference.inverse_frequencies(raw, variant.hidden // variant.heads)
    np.testing.assert_allclose(config.inverse_frequencies().numpy(), expected, rtol=1e-6)


def test_mixed_scaling_stretches_the_lowest_frequency_by_the_factor() -> None:
    raw = LEGACY | {"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.625}}
    plain = GTEConfig.from_dict(LEGACY | {"rope_scaling": None}).inverse_frequencies()
    mixed = GTEConfig.from_dict(raw).inverse_frequencies()
    assert float(plain[-1] / mixed[-1]) == pytest.approx(8.0, rel=1e-5)
    assert float(plain[0] / mixed[0]) == pytest.approx(math.exp(math.log(8) / 32**0.625), rel=1e-5)


@pytest.mark.parametrize(
    "scaling",
    [None, {"type": "ntk", "factor": 8.0}, {"type": "ntk", "factor": 2.0}, {"type": "linear", "factor": 4.0}],
    ids=["none", "ntk8", "ntk2", "linear"],
)
def test_the_native_dictionary_describes_the_same_network(scaling: dict[str, Any] | None) -> None:
    config = GTEConfig.from_dict(LEGACY | {"rope_scaling": scaling, "matryoshka_dimensions": [512, 64, 128]})
    raw = config.to_dict()
    again = GTEConfig.from_dict(raw)
    assert raw["model_type"] == "gte"
    assert again.inverse_frequencies().tolist() == config.inverse_frequencies().tolist()
    assert again.matryoshka_dimensions == config.matryoshka_dimensions == (64, 128, 512)
    assert again.to_dict() == raw


def test_mixed_scaling_has_no_native_dictionary() -> None:
    config = GTEConfig.from_dict(LEGACY | {"rope_scaling": {"type": "ntk", "factor": 8.0, "mixed_b": 0.5}})
    with pytest.raises(ValueError, match="mixed_b"):
        config.to_dict()


@pytest.mark.parametrize("key", ["unpad_inputs", "use_memory_efficient_attention", "pack_qkv"])
@pytest.mark.parametrize("value", ["true", "false", True, None])
def test_switches_that_do_not_change_the_result_are_accepted_as_strings(key: str, value: object) -> None:
    assert GTEConfig.from_dict(LEGACY | {key: value}) == GTEConfig.from_dict(LEGACY)


@pytest.mark.parametrize("value", [False, "false", None])
def test_logn_attention_that_is_off_is_accepted(value: object) -> None:
    raw = LEGACY | {"logn_attention_scale": value, "logn_attention_clip1": value}
    assert GTEConfig.from_dict(raw) == GTEConfig.from_dict(LEGACY)


@both_dialects
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("logn_attention_scale", True),
        ("logn_attention_scale", "true"),
        ("logn_attention_clip1", True),
        ("layer_norm_type", "rms_norm"),
        ("position_embedding_type", "absolute"),
        ("hidden_act", "gelu_new"),
        ("hidden_act", ["gelu"]),
        ("is_decoder", True),
        ("model_type", "bert"),
        ("model_type", None),
        ("head_dim", 32),
        ("head_dim", "64"),
        ("hidden_size", 770),
        ("hidden_size", "768"),
        ("hidden_size", 0),
        ("hidden_size", -768),
        ("hidden_size", 768.0),
        ("hidden_size", None),
        ("num_attention_heads", None),
        ("num_attention_heads", True),
        ("num_hidden_layers", 0),
        ("intermediate_size", "3072"),
        ("vocab_size", -1),
        ("max_position_embeddings", 0),
        ("type_vocab_size", -1),
        ("type_vocab_size", "1"),
        ("pad_token_id", -1),
        ("layer_norm_eps", 0),
        ("layer_norm_eps", "1e-12"),
        ("layer_norm_eps", float("nan")),
        ("matryoshka_dimensions", 256),
        ("matryoshka_dimensions", "256"),
        ("matryoshka_dimensions", [0]),
        ("matryoshka_dimensions", [769]),
        ("matryoshka_dimensions", [64.0]),
        ("matryoshka_dimensions", [True]),
    ],
)
def test_a_value_this_network_cannot_run_is_refused_by_its_key(base: dict[str, Any], key: str, value: object) -> None:
    with pytest.raises(CheckpointError, match=key):
        GTEConfig.from_dict(base | {key: value})


@both_dialects
@pytest.mark.parametrize(
    "key", ["hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size"]
)
def test_a_missing_size_is_refused_by_its_key(base: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=f"{key} is None"):
        GTEConfig.from_dict({other: value for other, value in base.items() if other != key})


@pytest.mark.parametrize(
    ("hidden_size", "heads"), [(768, 256), (768, 13), (12, 4)], ids=["width 3", "no divisor", "width 3 again"]
)
def test_heads_of_an_odd_width_are_refused(hidden_size: int, heads: int) -> None:
    raw = LEGACY | {"hidden_size": hidden_size, "num_attention_heads": heads}
    with pytest.raises(CheckpointError, match=f"hidden_size {hidden_size} does not split into {heads} heads"):
        GTEConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'yarn' is not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "ntk"}}, "factor of the rotary scaling is None"),
        ({"rope_scaling": {"type": "ntk", "factor": "8"}}, "factor of the rotary scaling is '8'"),
        ({"rope_scaling": {"type": "ntk", "factor": -8}}, "factor of the rotary scaling is -8"),
        ({"rope_scaling": {"type": "ntk", "factor": 8, "mixed_b": "x"}}, "mixed_b is 'x'"),
        ({"rope_scaling": "ntk"}, "rotary scaling is 'ntk'; it must be an object"),
        ({"rope_theta": 0}, "rope_theta is 0"),
        ({"rope_theta": "20000"}, "rope_theta is '20000'"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ],
)
def test_a_rotary_scaling_that_is_unknown_or_malformed_is_refused(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        GTEConfig.from_dict(LEGACY | rope)


def test_an_unknown_native_rope_type_is_refused() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 160000, "factor": 2.0}
    with pytest.raises(CheckpointError, match="'longrope' is not supported"):
        GTEConfig.from_dict(NATIVE | {"rope_parameters": rope})


@pytest.mark.parametrize(
    ("listed", "smallest"), [(None, 32), ([], 32), ([768, 128, 256], 128)], ids=["absent", "empty", "listed"]
)
def test_the_smallest_dimension_is_the_checkpoint_s_own_or_32(listed: list[int] | None, smallest: int) -> None:
    assert GTEConfig.from_dict(LEGACY | {"matryoshka_dimensions": listed}).min_dimension == smallest


def test_a_network_narrower_than_32_keeps_its_whole_width() -> None:
    raw = LEGACY | {"hidden_size": 16, "num_attention_heads": 2}
    assert GTEConfig.from_dict(raw).min_dimension == 16
