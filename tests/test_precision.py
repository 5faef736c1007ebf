"""Each precision keeps its promise, refuses what it cannot do, and leaves files and fingerprints alone."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from checkpoints import LONG_TEXT, TEXTS, build, find_variant
from gte_rag import GTEEncoder, fused, precision
from gte_rag.checkpoint import load_checkpoint
from gte_rag.config import GTEConfig
from gte_rag.model import GatedMLP, GTEModel, Linear, pair_channels, runs
from gte_rag.precision import Int8Linear, level_sizes, quantise, resolve

CPU = torch.device("cpu")
SENTENCES = (
    "The lighthouse keeper wrote the wind speed into a green notebook every evening.",
    "Der Bäcker an der Ecke öffnet sonntags erst um acht Uhr.",
    "La rivière a débordé après trois jours de pluie continue.",
    "El tren nocturno a Sevilla sale del andén cuatro.",
    "Поезд опоздал на сорок минут из-за снега на путях.",
    "図書館は月曜日に休みますが、返却ポストは使えます。",
    "这座桥建于十五世纪，至今仍然可以通行。",
    "도서관 앞의 은행나무는 가을마다 노랗게 물든다.",
    "تفتح المكتبة أبوابها في الساعة التاسعة صباحا.",
    "पहाड़ी रास्ता बारिश के बाद फिसलन भरा हो जाता है।",
    "Rừng ngập mặn bảo vệ bờ biển khỏi sóng lớn.",
    "Kuzey rüzgârı akşama doğru yön değiştirdi.",
    "Sensori hupimi lämpötilan minuutin välein.",
    "Το μουσείο φιλοξενεί μια έκθεση για τους χάρτες.",
    "Mradi huo ulipanda miti elfu kumi kando ya mto.",
    "How do I reset the thermostat?",
    "",
    "42",
    LONG_TEXT,
)
# The promise for each precision, minimum over texts.
LEAST_COSINE = {"bf16": 0.9995, "int8": 0.99}

has_int8 = pytest.mark.skipif(not precision._has_int8(), reason="this processor has no 8-bit dot products")
each_lower = pytest.mark.parametrize("lower", ["bf16", pytest.param("int8", marks=has_int8)])
each_precision = pytest.mark.parametrize("name", ["float32", "bf16", pytest.param("int8", marks=has_int8)])


@pytest.fixture(scope="module")
def exact() -> GTEEncoder:
    return GTEEncoder.from_pretrained(precision="float32", device="cpu")


@each_lower
def test_lower_precisions_stay_close_to_float32_in_every_language(lower: str, exact: GTEEncoder) -> None:
    encoder = GTEEncoder.from_pretrained(precision=lower, device="cpu")
    assert encoder.precision == lower
    full, low = exact.encode_documents(SENTENCES), encoder.encode_documents(SENTENCES)
    assert full.dense is not None
    assert low.dense is not None
    assert full.sparse is not None
    assert low.sparse is not None
    cosines = (full.dense * low.dense).sum(axis=1)
    assert cosines.min() >= LEAST_COSINE[lower]
    assert cosines.min() < 1 - 1e-6  # it is another arithmetic indeed
    np.testing.assert_allclose(np.linalg.norm(low.dense, axis=1), 1, atol=1e-5)
    for ours, theirs in zip(low.sparse, full.sparse, strict=True):
        product = ours.dot(theirs)
        assert product >= 0.98 * float(np.linalg.norm(ours.values) * np.linalg.norm(theirs.values))


@each_lower
def test_rankings_of_known_translations_survive(lower: str, exact: GTEEncoder) -> None:
    encoder = GTEEncoder.from_pretrained(precision=lower, device="cpu")
    full, low = exact.encode_documents(SENTENCES).dense, encoder.encode_documents(SENTENCES).dense
    assert full is not None
    assert low is not None
    differences = np.abs(full @ full.T - low @ low.T)
    assert differences.max() < (0.01 if lower == "bf16" else 0.04)


@each_precision
def test_neighbours_do_not_change_a_text(name: str) -> None:
    encoder = GTEEncoder.from_pretrained(precision=name, device="cpu")
    together = encoder.encode_documents(SENTENCES).dense
    assert together is not None
    for row, text in enumerate(SENTENCES):
        alone = encoder.encode_documents([text]).dense
        assert alone is not None
        assert float(alone[0] @ together[row]) > {"float32": 1 - 1e-6, "bf16": 0.9998, "int8": 0.999}[name]


@each_precision
def test_first_tokens_alone_equal_those_of_the_full_last_layer(name: str) -> None:
    encoder = GTEEncoder.from_pretrained(precision=name, device="cpu")
    both, dense = encoder.encode_documents(SENTENCES), encoder.encode_documents(SENTENCES, sparse=False)
    assert both.dense is not None
    assert dense.dense is not None
    assert dense.sparse is None
    tolerance = {"float32": 1e-6, "bf16": 4e-3, "int8": 4e-3}[name]
    np.testing.assert_allclose(dense.dense, both.dense, rtol=0, atol=tolerance)


def test_first_tokens_alone_equal_on_a_long_text(tmp_path: Path) -> None:
    folder = build(find_variant("multilingual-base"), tmp_path)
    encoder = GTEEncoder.from_pretrained(folder, precision="float32", device="cpu")
    texts = [" ".join([LONG_TEXT] * 6), "short", "short two", "tiny"]
    assert encoder.count_tokens(texts[0]) > 1024  # several row blocks
    both, dense = encoder.encode_documents(texts).dense, encoder.encode_documents(texts, sparse=False).dense
    assert both is not None
    assert dense is not None
    np.testing.assert_allclose(dense, both, rtol=0, atol=1e-6)


@each_lower
def test_long_texts_pass_through_row_blocks_in_every_precision(lower: str, tmp_path: Path) -> None:
    folder = build(find_variant("multilingual-base"), tmp_path)
    texts = [" ".join([LONG_TEXT] * 6), *TEXTS]
    full = GTEEncoder.from_pretrained(folder, precision="float32", device="cpu").encode_documents(texts).dense
    low = GTEEncoder.from_pretrained(folder, precision=lower, device="cpu").encode_documents(texts).dense
    assert full is not None
    assert low is not None
    assert (full * low).sum(axis=1).min() > 0.99


@each_precision
def test_the_plain_network_and_the_fast_one_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = GTEEncoder.from_pretrained(precision=name, device="cpu").encode_documents(SENTENCES).dense
    monkeypatch.setattr(precision, "_has_packed_products", lambda: False)
    plain = GTEEncoder.from_pretrained(precision="float32", device="cpu").encode_documents(SENTENCES).dense
    assert fast is not None
    assert plain is not None
    if name == "float32":
        np.testing.assert_allclose(fast, plain, rtol=0, atol=2e-6)
    else:
        assert (fast * plain).sum(axis=1).min() >= LEAST_COSINE[name]


def test_bf16_runs_on_the_plain_network(monkeypatch: pytest.MonkeyPatch, exact: GTEEncoder) -> None:
    """As on CUDA, and on a CPU whose bfloat16 is emulated."""
    monkeypatch.setattr(precision, "_has_packed_products", lambda: False)
    low = GTEEncoder.from_pretrained(precision="bf16", device="cpu").encode_documents(SENTENCES).dense
    full = exact.encode_documents(SENTENCES).dense
    assert full is not None
    assert low is not None
    assert (full * low).sum(axis=1).min() >= 0.999


def test_precision_changes_neither_fingerprint_nor_files(tmp_path: Path, exact: GTEEncoder) -> None:
    low = GTEEncoder.from_pretrained(precision="bf16", device="cpu")
    assert low.fingerprint == exact.fingerprint
    assert low.num_parameters == exact.num_parameters
    low.save_pretrained(tmp_path / "low")
    exact.save_pretrained(tmp_path / "exact")
    assert (tmp_path / "low/model.safetensors").read_bytes() == (tmp_path / "exact/model.safetensors").read_bytes()


def test_threads_that_share_an_encoder_do_not_disturb_each_other(exact: GTEEncoder) -> None:
    texts = [[f"{sentence} {number}" for sentence in SENTENCES] for number in range(4)]
    expected: list[Any] = [exact.encode_documents(group).dense for group in texts]
    results: dict[int, list[Any]] = {number: [] for number in range(4)}

    def work(number: int) -> None:
        for _ in range(3):
            results[number].append(exact.encode_documents(texts[number]).dense)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(4):
        assert len(results[number]) == 3
        for dense in results[number]:
            np.testing.assert_allclose(dense, expected[number], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("bf16", "expected"), [(True, "bf16"), (False, "float32")])
def test_auto_is_bf16_where_the_hardware_computes_it(
    monkeypatch: pytest.MonkeyPatch, bf16: bool, expected: str
) -> None:
    monkeypatch.setattr(precision, "_has_bf16", lambda device: bf16)
    assert resolve("auto", CPU) == expected
    assert resolve("auto", torch.device("cuda")) == expected


def test_an_encoder_says_which_precision_auto_was() -> None:
    assert GTEEncoder.from_pretrained(device="cpu").precision == resolve("auto", CPU)


@pytest.mark.parametrize("given", ["float16", "fp32", "INT8", ""])
def test_unknown_precisions_are_refused(given: str) -> None:
    with pytest.raises(ValueError, match="accepted: 'auto', 'float32', 'bf16', 'int8'"):
        GTEEncoder.from_pretrained(precision=given)


@pytest.mark.parametrize("given", [None, 32, torch.bfloat16])
def test_precisions_that_are_no_strings_are_refused(given: object) -> None:
    with pytest.raises(TypeError, match="accepted: 'auto'"):
        resolve(given, CPU)  # type: ignore[arg-type]


def test_int8_is_refused_where_it_would_be_slow_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_has_int8", lambda: False)
    with pytest.raises(ValueError, match=r"'int8' does not work on cpu here.*use 'auto'"):
        GTEEncoder.from_pretrained(precision="int8", device="cpu")
    with pytest.raises(ValueError, match="'int8' does not work on cuda"):
        resolve("int8", torch.device("cuda"))


def test_quantised_rows_are_off_by_half_a_level_at_most() -> None:
    x = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 7)[:, None]
    levels, size = quantise(x)
    assert levels.dtype == torch.uint8
    restored = (levels.float() - 128) * size
    assert bool(((restored - x).abs() <= 0.501 * size).all())
    assert int((levels.int() - 128).abs().max()) == 127
    zeros, _ = quantise(torch.zeros(2, 5))
    assert bool((zeros == 128).all())


@has_int8
def test_the_8_bit_product_is_exact_on_levels() -> None:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(64, 48)
    x = torch.randn(5, 64, generator=generator)
    residual = torch.randn(5, 48, generator=generator)
    with torch.inference_mode():
        product = Int8Linear(linear)
        levels, size = quantise(x)
        weight = (linear.weight / product.scales[:, None]).round() * product.scales[:, None]
        expected = ((levels.double() - 128) * size) @ weight.double().T + linear.bias + residual
        np.testing.assert_allclose(product(x, residual), expected, rtol=0, atol=1e-5)


def test_rows_of_whole_steps_of_a_power_of_two_lose_nothing_in_8_bits() -> None:
    steps = torch.tensor([[127.0, -3.0, 0.0, 1.0], [5.0, 2.0, -1.0, 0.0], [130.0, 1.0, 0.0, 0.0], [0.3, 0.2, 0.1, 0.0]])
    weight = steps * 2.0**-9
    sizes = level_sizes(weight)
    levels = (weight / sizes[:, None]).round()
    assert levels.abs().max() <= 127
    assert torch.equal((levels * sizes[:, None])[:2], weight[:2])
    assert sizes[2] == weight[2, 0] / 127  # 130 whole steps do not fit
    assert sizes[3] == weight[3, 0] / 127
    assert bool((level_sizes(torch.zeros(1, 4)) > 0).all())


def test_pairing_the_channels_keeps_the_scores() -> None:
    heads, width = 3, 8
    weight = torch.arange(3 * heads * width, dtype=torch.float32)
    paired = pair_channels(weight, heads)
    assert paired[:width].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert paired[2 * heads * width :].tolist() == weight[2 * heads * width :].tolist()  # values stay
    assert sorted(paired.tolist()) == weight.tolist()


def test_neighbours_of_equal_length_form_runs() -> None:
    assert runs([7, 7, 3]) == [(0, 7, 2), (14, 3, 1)]
    assert runs([2]) == [(0, 2, 1)]
    assert runs([1, 2, 1]) == [(0, 1, 1), (1, 2, 1), (3, 1, 1)]


def test_identical_texts_pass_through_the_network_once(exact: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    forward = GTEModel.forward

    def counting(model: GTEModel, token_ids: torch.Tensor, cu_seqlens: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.append(len(cu_seqlens) - 1)
        return forward(model, token_ids, cu_seqlens, **options)

    monkeypatch.setattr(GTEModel, "forward", counting)
    texts = ["b", "a longer text", "b", "", "a longer text", "b"]
    repeated = exact.encode_documents(texts)
    assert sum(seen) == 3
    assert repeated.dense is not None
    assert repeated.sparse is not None
    for row, text in enumerate(texts):
        alone = exact.encode_documents([text])
        assert alone.dense is not None
        assert alone.sparse is not None
        np.testing.assert_allclose(repeated.dense[row], alone.dense[0], rtol=0, atol=1e-6)
        assert repeated.sparse[row].to_dict() == pytest.approx(alone.sparse[0].to_dict(), abs=1e-5)


def test_repeated_texts_that_are_cut_are_all_counted() -> None:
    encoder = GTEEncoder.from_pretrained(precision="float32", device="cpu", max_length=8)
    with pytest.warns(UserWarning, match="3 of 4 texts are longer"):
        assert encoder.encode_documents([LONG_TEXT, "short", LONG_TEXT, LONG_TEXT]).truncated == 3


def test_a_stream_gives_the_same_vectors_in_order(exact: GTEEncoder) -> None:
    texts = [f"{sentence} {number}" for number in range(3) for sentence in SENTENCES]
    whole = exact.encode_documents(texts)
    parts = list(exact.encode_stream(iter(texts), batch_size=10))
    assert [len(part) for part in parts] == [10] * 5 + [7]
    assert whole.dense is not None
    assert whole.sparse is not None
    np.testing.assert_allclose(np.concatenate([part.dense for part in parts]), whole.dense, rtol=0, atol=1e-6)
    streamed = [vector for part in parts if part.sparse is not None for vector in part.sparse]
    for ours, theirs in zip(streamed, whole.sparse, strict=True):
        assert ours.to_dict() == pytest.approx(theirs.to_dict(), abs=1e-5)
    assert list(exact.encode_stream([])) == []


def test_a_stream_reads_no_further_than_it_must(exact: GTEEncoder) -> None:
    taken: list[int] = []

    def endless() -> Iterator[str]:
        number = 0
        while True:
            taken.append(number)
            yield f"text {number}"
            number += 1

    stream = exact.encode_stream(endless(), batch_size=4, sparse=False)
    assert taken == []
    for round_number in range(1, 6):
        assert len(next(stream)) == 4
        assert len(taken) <= 4 * (round_number + 1)
    stream.close()  # type: ignore[attr-defined]


def test_a_stream_refuses_bad_input(exact: GTEEncoder) -> None:
    with pytest.raises(TypeError, match="single str"):
        exact.encode_stream("text")
    with pytest.raises(TypeError, match="NoneType"):
        exact.encode_stream(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size is 0"):
        exact.encode_stream(["a"], batch_size=0)
    with pytest.raises(TypeError, match="batch_size"):
        exact.encode_stream(["a"], batch_size=True)
    with pytest.raises(ValueError, match="both False"):
        exact.encode_stream(["a"], dense=False, sparse=False)
    with pytest.raises(TypeError, match="every text must be a string"):
        list(exact.encode_stream(["a", 3]))  # type: ignore[list-item]


def test_windows_join_to_one_result(exact: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = exact.encode_documents(SENTENCES)
    monkeypatch.setattr("gte_rag.encoder._WINDOW", 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pieces = exact.encode_documents(SENTENCES)
    assert whole.dense is not None
    assert pieces.dense is not None
    assert whole.sparse is not None
    assert pieces.sparse is not None
    np.testing.assert_allclose(pieces.dense, whole.dense, rtol=0, atol=1e-6)
    for ours, theirs in zip(pieces.sparse, whole.sparse, strict=True):
        assert ours.to_dict() == pytest.approx(theirs.to_dict(), abs=1e-5)


@each_precision
@pytest.mark.parametrize("fused_pass", [True, False])
def test_what_is_the_same_for_every_token_is_left_out_without_a_change(
    name: str, fused_pass: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gte-mini's MLPs had one branch before they were brought into this form: most rows of up are 1 for every token."""
    checkpoint = load_checkpoint("gte-mini")
    rows = torch.tensor([0, 5000, 6000, 7000, 8000, 9000, 2, 0, 10000, 2])
    texts = torch.tensor([0, 7, 10])
    found = []
    for left_out in (True, False):
        if not left_out:
            monkeypatch.setattr(GatedMLP, "leave_out_constants", lambda mlp, norm: None)
        model = fused.build(checkpoint.config, checkpoint.weights, name, CPU)
        if fused_pass and model.packed_forward is None:
            pytest.skip("no fused pass here")
        if not fused_pass:
            model.packed_forward = None
        with torch.inference_mode():
            found.append((model(rows, texts), model(rows, texts, firsts=True)))
    for spared, whole in zip(*found, strict=True):
        cosine = torch.nn.functional.cosine_similarity(spared, whole)
        assert cosine.min() > {"float32": 1 - 1e-6, "bf16": 0.9998, "int8": 0.995}[name]


def gated(config: GTEConfig, up: torch.Tensor) -> tuple[GatedMLP, torch.nn.LayerNorm]:
    """Return an MLP with these rows of up, and a LayerNorm that holds channel 1 at 2."""
    generator = torch.Generator().manual_seed(0)
    mlp, norm = GatedMLP(config), torch.nn.LayerNorm(config.hidden_size)
    with torch.no_grad():
        for parameter in mlp.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        mlp.up_gate_proj.weight[: len(up)] = up
        norm.weight[1], norm.bias[1] = 0.0, 2.0
    return mlp.requires_grad_(False), norm.requires_grad_(False)


@pytest.mark.parametrize(
    ("constant", "silent", "neurons", "plain"),
    [
        ([], [], 8, 0),
        ([2, 5], [], 8, 2),
        ([0], [3, 4], 6, 1),
        ([], [7], 7, 0),
        ([*range(8)], [], 8, 8),
        ([], [*range(8)], 1, 0),
    ],
)
def test_rows_of_up_that_read_constants_are_left_out(
    constant: list[int], silent: list[int], neurons: int, plain: int, encoder: GTEEncoder
) -> None:
    config = replace(encoder.config, hidden_size=6, num_heads=1, intermediate_size=8)
    up = torch.randn(8, 6, generator=torch.Generator().manual_seed(1))
    up[constant + silent] = 0.0
    up[constant, 1] = torch.linspace(0.5, 3.0, len(constant))
    mlp, norm = gated(config, up)
    hidden = norm(torch.randn(5, 6, generator=torch.Generator().manual_seed(2)))
    expected = mlp(hidden.clone())
    mlp.leave_out_constants(norm)
    torch.testing.assert_close(mlp(hidden.clone()), expected, atol=1e-5, rtol=1e-5)
    assert (mlp.down_proj.in_features, mlp.plain) == (neurons, plain)
    assert mlp.up_gate_proj.out_features == 2 * neurons - plain
