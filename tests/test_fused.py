"""The fused pass gives what the plain network gives, whatever the texts, the threads and the installation."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from checkpoints import LONG_TEXT, TEXTS, build, find_variant
from gte_rag import GTEEncoder, fused, precision
from gte_rag.precision import quantise

pytestmark = pytest.mark.skipif(not fused.has_kernels(), reason="numba is not installed (extra fast)")
kernels: Any = importlib.import_module("gte_rag.kernels") if fused.has_kernels() else None

has_int8 = pytest.mark.skipif(not precision._has_int8(), reason="this processor has no 8-bit dot products")
each_precision = pytest.mark.parametrize("name", ["float32", "bf16", pytest.param("int8", marks=has_int8)])
# Of all lengths: some attend in one loop, some by products in one block of queries, one in several.
MIXED = [
    *TEXTS,
    LONG_TEXT,
    " ".join([LONG_TEXT] * 3),
    *(" ".join(["water"] * n) for n in (30, 33, 60, 61, 62, 63, 64, 65, 300)),
]
NOTHING = np.empty(0, np.float32)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def vectors(encoder: GTEEncoder, texts: list[str], *, sparse: bool = True) -> NDArray[np.float32]:
    dense = encoder.encode_documents(texts, sparse=sparse).dense
    assert dense is not None
    return dense


@each_precision
@pytest.mark.parametrize("sparse", [True, False])
def test_the_fused_pass_equals_the_one_on_torch_alone(name: str, sparse: bool, two_threads: None) -> None:
    encoder = GTEEncoder.from_pretrained(precision=name, device="cpu")
    if not encoder.fused:
        pytest.skip("this processor or build of torch has no packed products")
    joined = vectors(encoder, MIXED, sparse=sparse)
    encoder._model.packed_forward = None
    apart = vectors(encoder, MIXED, sparse=sparse)
    if name == "float32":
        np.testing.assert_allclose(joined, apart, rtol=0, atol=2e-6)
    else:
        assert (joined * apart).sum(axis=1).min() > {"bf16": 0.9995, "int8": 0.99}[name]


@pytest.mark.parametrize("threads", [2, 3])
def test_each_thread_of_a_team_computes_alone(threads: int) -> None:
    found: list[int] = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fused._TEAM.run([fused._Phase(range(8), lambda part, thread: found.append(torch.get_num_threads()))], threads)
        assert torch.get_num_threads() == threads  # of the caller
    finally:
        torch.set_num_threads(before)
    assert found == [1] * 8  # more, and as many times more threads than cores would compete


@each_precision
def test_the_number_of_threads_does_not_change_a_vector(name: str) -> None:
    encoder = GTEEncoder.from_pretrained(precision=name, device="cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(vectors(encoder, MIXED))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert (other * found[0]).sum(axis=1).min() > 1 - 1e-5


def test_threads_that_call_at_once_get_their_own_results(two_threads: None) -> None:
    encoder = GTEEncoder.from_pretrained(precision="float32", device="cpu")
    groups = [[f"{text} {number}" for text in MIXED] for number in range(3)]
    expected = [vectors(encoder, group) for group in groups]
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        results[number] = vectors(encoder, groups[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, dense in enumerate(expected):
        np.testing.assert_allclose(results[number], dense, rtol=0, atol=1e-6)


def test_an_error_in_a_thread_reaches_the_caller_and_leaves_the_encoder_usable(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = GTEEncoder.from_pretrained(precision="float32", device="cpu")
    if not encoder.fused:
        pytest.skip("this processor or build of torch has no packed products")
    expected = vectors(encoder, MIXED)

    def broken(*arguments: object) -> None:
        raise MemoryError("no room for scores")

    with monkeypatch.context() as patch:
        patch.setattr(kernels, "softmax", broken)
        with pytest.raises(MemoryError, match="no room for scores"):
            encoder.encode_documents(MIXED)
    np.testing.assert_allclose(vectors(encoder, MIXED), expected, rtol=0, atol=1e-6)


def test_a_long_stream_uses_the_same_buffers_again(tmp_path: Path) -> None:
    folder = build(find_variant("multilingual-base"), tmp_path)
    encoder = GTEEncoder.from_pretrained(folder, precision="float32", device="cpu")
    forward = encoder._model.packed_forward
    if not isinstance(forward, fused.Fused):
        pytest.skip("this processor or build of torch has no packed products")
    places = set()
    texts = (f"{text} {number}" for number in range(40) for text in TEXTS)
    for _ in encoder.encode_stream(texts, batch_size=len(TEXTS)):
        assert len(forward._spare) == 1
        places.add(forward._spare[0].hidden.tensor.data_ptr())
    assert len(places) <= 2  # the first batch may be the smaller one
    longest = " ".join(["water"] * (fused._KEPT_ROWS // 4 + 10))
    assert encoder.count_tokens(longest) > fused._KEPT_ROWS
    encoder.encode_documents([longest])
    assert all(spare.rows <= fused._KEPT_ROWS for spare in forward._spare)


def test_memory_of_a_long_text_is_linear() -> None:
    """No buffer holds scores of all pairs of tokens."""
    encoder = GTEEncoder.from_pretrained(precision="float32", device="cpu")
    forward = encoder._model.packed_forward
    if not isinstance(forward, fused.Fused):
        pytest.skip("this processor or build of torch has no packed products")
    for tokens in (40, 1000, 8192):
        bounds = torch.tensor([0, tokens])
        parts = fused._Pass(forward, torch.zeros(tokens, dtype=torch.int64), bounds, None, False)._attention_parts()
        calls = [call for part in parts for call in part]
        most = max((c.queries.stop - c.queries.start) * (c.heads.stop - c.heads.start) * c.length for c in calls)
        assert most <= max(fused._SCORES, fused._QUERIES * tokens)
        pairs = sum((c.queries.stop - c.queries.start) * (c.heads.stop - c.heads.start) for c in calls)
        assert pairs == tokens * encoder.config.num_heads  # every query of every head once


@pytest.mark.parametrize("variant", ["multilingual-base", "bare-with-head"])
def test_other_architectures_run_fused_too(variant: str, tmp_path: Path, two_threads: None) -> None:
    encoder = GTEEncoder.from_pretrained(build(find_variant(variant), tmp_path), precision="float32", device="cpu")
    texts = [*TEXTS, LONG_TEXT]
    joined = vectors(encoder, texts)
    encoder._model.packed_forward = None
    np.testing.assert_allclose(joined, vectors(encoder, texts), rtol=0, atol=2e-6)


def test_without_numba_the_network_runs_on_torch_alone() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "from gte_rag import GTEEncoder\n"
        "encoder = GTEEncoder.from_pretrained(device='cpu')\n"
        "print(encoder.fused, len(encoder.encode_documents(['a text'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "1"]


# Loops


@pytest.mark.parametrize("plain", [0, 100, 20001])  # columns without one of up, which is 1 here anyway
def test_gelu_is_within_two_millionths(plain: int) -> None:
    x = np.linspace(-9, 9, 20001, dtype=np.float32)[None]
    out = np.empty_like(x)
    kernels.gate(np.ones_like(x[:, plain:]), x, 0, x.shape[1], plain, NOTHING, out, NOTHING)
    exact = torch.nn.functional.gelu(torch.from_numpy(x).double()).numpy()
    np.testing.assert_allclose(out, exact, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("spread", [0.01, 1.0, 40.0])
def test_softmax_equals_torch(spread: float) -> None:
    scores = torch.randn(6, 77, generator=torch.Generator().manual_seed(0)) * spread
    exact = torch.softmax(scores.double() * 0.125, dim=-1).numpy()
    found = scores.numpy().copy()
    kernels.softmax(found, np.float32(0.125))
    np.testing.assert_allclose(found, exact, rtol=3e-6, atol=1e-7)


def test_levels_are_those_of_the_plain_quantisation() -> None:
    x = torch.randn(9, 70, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 6, 9)[:, None]
    levels, size = quantise(x)
    out, out_size = np.empty(x.shape, np.uint8), np.empty(len(x), np.float32)
    kernels.level(x.numpy(), out, out_size)
    assert int(np.abs(out.astype(int) - levels.numpy().astype(int)).max()) <= 1  # at halves, in the last bit
    np.testing.assert_allclose(out_size, size[:, 0], rtol=1e-6)


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    out = np.empty(x.shape, np.uint16)
    kernels.level(x.numpy(), out, NOTHING)
    assert np.array_equal(out, x.bfloat16().view(torch.uint16).numpy())


def test_normalise_adds_and_normalises() -> None:
    generator = torch.Generator().manual_seed(0)
    product, hidden = torch.randn(4, 24, generator=generator), torch.randn(4, 24, generator=generator)
    size, bias = torch.rand(4, generator=generator), torch.randn(24, generator=generator)
    weight, offset = torch.randn(24, generator=generator), torch.randn(24, generator=generator)
    exact = torch.nn.functional.layer_norm(hidden + product * size[:, None] + bias, (24,), weight, offset, 1e-12)
    state, empty = hidden.numpy().copy(), np.empty((0, 0), np.float32)
    arrays = (weight.numpy(), offset.numpy())
    kernels.normalise(product.numpy(), size.numpy(), bias.numpy(), state, *arrays, np.float32(1e-12), empty, NOTHING)
    np.testing.assert_allclose(state, exact, rtol=0, atol=2e-6)
