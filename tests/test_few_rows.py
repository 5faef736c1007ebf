"""A few rows in 8 bits get what they get among many, whoever takes part."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from checkpoints import TEXTS, build, find_variant
from gte_rag import GTEEncoder, fused
from gte_rag.model import Linear
from gte_rag.precision import Int8Linear, resolve


def _is_here() -> bool:
    try:
        resolve("int8", torch.device("cpu"))
    except ValueError:
        return False
    return fused.has_kernels() and fused._few_rows() is not None


pytestmark = pytest.mark.skipif(not _is_here(), reason="needs AVX-512 VNNI and numba (extra fast)")
few_rows: Any = importlib.import_module("gte_rag.few_rows") if _is_here() else None
instructions: Any = importlib.import_module("gte_rag.instructions") if _is_here() else None


def _product() -> Any:
    numba = importlib.import_module("numba")
    parts, multiply = few_rows._parts, few_rows._multiply
    shape_tiles, release_tiles, rows_of_sums, panel = (
        instructions.shape_tiles, instructions.release_tiles, few_rows._TOGETHER, few_rows.PANEL,
    )  # fmt: skip

    def product(
        levels: Any, weights: Any, inner: Any, channels: Any, offsets: Any, scales: Any, out: Any, rows: Any, tiles: Any
    ) -> None:
        sums = np.empty((rows_of_sums if tiles.shape[0] else 0, panel), np.int32)
        if tiles.shape[0]:
            shape_tiles(tiles.ctypes.data)
        for part in range(parts(inner, channels)):
            multiply(levels, weights, 64, inner, channels, offsets, scales, out, rows, part, sums)
        if tiles.shape[0]:
            release_tiles()

    return numba.njit(product)


multiply: Any = _product() if _is_here() else None


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder() -> GTEEncoder:
    return GTEEncoder.from_pretrained(precision="int8", device="cpu")


def alone(encoder: GTEEncoder, texts: list[str], *, sparse: bool = True) -> NDArray[np.float32]:
    """Encode each text by itself."""
    found = [encoder.encode_documents([text], sparse=sparse).dense for text in texts]
    return np.concatenate([dense for dense in found if dense is not None])


@pytest.fixture
def other_way(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Any]]:
    """Return a context in which few rows are computed as many are."""

    @contextmanager
    def context() -> Iterator[None]:
        with monkeypatch.context() as patch:
            patch.setattr(fused, "_few_rows", lambda: None)
            yield

    return context


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("rows", [*range(1, 14), 16, 17, 20, 21, 24, 25, 31, 32, 33, 48, 49, 63, 64])
@pytest.mark.parametrize(("inner", "channels"), [(4, 32), (5, 1), (64, 33), (770, 96), (4160, 31)])
def test_a_product_is_exact(rows: int, inner: int, channels: int, tiles: bool) -> None:
    """Whatever the levels, the largest too: against the sum in 64 bits."""
    shapes = instructions.tile_shapes() if tiles else np.empty((few_rows._TOGETHER + 1, 0), np.uint8)
    if shapes is None:
        pytest.skip("this processor has no tiles (AMX)")
    random = np.random.default_rng(rows)
    levels = np.full((few_rows.ROWS, few_rows.COLUMNS), 77, np.uint8)  # what lies behind counts for nothing
    weights = random.integers(-127, 128, (channels, inner)).astype(np.int8)
    levels[:rows, :inner] = random.integers(0, 256, (rows, inner))
    if rows % 2:
        levels[:rows, :inner], weights[:] = 255, -127
    panels = few_rows._panelled(weights).reshape(-1)
    placed = few_rows._aligned(len(panels) + 64)
    placed[64:] = panels
    columns = few_rows._padded(channels, few_rows.PANEL)
    offsets, scales = np.zeros(columns, np.int32), np.zeros(columns, np.float32)
    offsets[:channels] = 128 * weights.sum(axis=1, dtype=np.int32)
    scales[:channels] = 2.0 ** random.integers(-9, 3, channels)
    out = np.full((few_rows.ROWS, columns + few_rows.PANEL), np.nan, np.float32)
    multiply(levels, placed, inner, channels, offsets, scales, out, rows, shapes[min(rows, few_rows._TOGETHER)])
    exact = (levels[:rows, :inner].astype(np.int64) - 128) @ weights.T.astype(np.int64)
    np.testing.assert_array_equal(out[:rows, :channels], exact.astype(np.float32) * scales[:channels])
    assert np.isnan(out[few_rows._padded(rows, 4) :]).all()
    assert np.isnan(out[:, columns:]).all()


def test_compiled_code_is_forgotten_when_what_it_calls_changes() -> None:
    package = Path(few_rows.__file__).parent
    called = b"".join((package / name).read_bytes() for name in ("kernels.py", "instructions.py"))
    digest = hashlib.sha256(called).hexdigest()[:16]
    assert digest == few_rows._CALLED, f"set _CALLED in few_rows.py to {digest!r}"


@pytest.mark.parametrize("off", ["amx-", "avx512vnni"])
def test_a_processor_without_the_instructions_does_without_them(off: str, tmp_path: Path) -> None:
    code = (
        "import llvmlite.binding as llvm\n"
        "has = llvm.get_host_cpu_features()\n"
        f"[has.__setitem__(name, False) for name in has if name.startswith({off!r})]\n"
        "llvm.get_host_cpu_features = lambda: has\n"
        "from gte_rag import GTEEncoder, fused\n"
        "encoder = GTEEncoder.from_pretrained(precision='int8', device='cpu')\n"
        "print(len(encoder.encode_documents(['a text'])), fused._few_rows() is not None)"
    )
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}  # what is compiled already would hide a failure
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, check=False
    )
    assert done.stdout.split() == ["1", str(off == "amx-")], done.stderr


@pytest.mark.parametrize(("outer", "inner"), [(3, 5), (96, 64), (33, 770)])
def test_packed_weights_can_be_read_back(outer: int, inner: int) -> None:
    linear = Linear.of(torch.randn(outer, inner, generator=torch.Generator().manual_seed(outer)))
    eight = Int8Linear(linear)
    expected = (linear.weight / eight.scales[:, None]).round().to(torch.int8)
    assert torch.equal(eight.levels(), expected)
    assert int(eight.levels().abs().max()) == 127


def test_a_text_gets_the_vectors_that_it_gets_from_the_other_products(encoder: GTEEncoder, other_way: Any) -> None:
    texts = [" ".join(["water", "is", "a", "liquid"] * 10).rsplit(" ", 40 - words)[0] for words in range(1, 31)]
    texts += [text for text in TEXTS if len(text) < 100]
    texts += [
        " ".join(["the", "capital", "where", "water", "meets", "ice"] * 10)[: 5 * words] for words in range(30, 61, 3)
    ]
    assert few_rows.ROWS <= fused._SHORT_IN_8_BITS
    asked = [encoder.encode_documents([text]) for text in texts]
    with other_way():
        given = [encoder.encode_documents([text]) for text in texts]
    for one, other in zip(asked, given, strict=True):
        assert one.dense is not None
        assert other.dense is not None
        np.testing.assert_allclose(one.dense, other.dense, rtol=0, atol=2e-6)
        for mine, theirs in zip(one.sparse or [], other.sparse or [], strict=True):
            np.testing.assert_array_equal(mine.indices, theirs.indices)
            np.testing.assert_allclose(mine.values, theirs.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparse", [True, False])
def test_dense_vectors_alone_are_the_same_too(encoder: GTEEncoder, sparse: bool, other_way: Any) -> None:
    texts = ["a text", "what is the capital of China?", *(" ".join(["water"] * words) for words in (20, 40, 60))]
    asked = alone(encoder, texts, sparse=sparse)
    with other_way():
        given = alone(encoder, texts, sparse=sparse)
    np.testing.assert_allclose(asked, given, rtol=0, atol=2e-6)


@pytest.mark.parametrize("sparse", [True, False])
def test_several_texts_share_a_pass(encoder: GTEEncoder, sparse: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["a text", "water and ice", "北京", ""]
    assert sum(map(encoder.count_tokens, texts)) <= few_rows.ROWS
    called = []
    forward = few_rows.FewRows.__call__

    def counted(*given: Any) -> None:
        called.append(given)
        forward(*given)

    monkeypatch.setattr(few_rows.FewRows, "__call__", counted)
    together = encoder.encode_documents(texts, sparse=sparse).dense
    assert len(called) == 1
    np.testing.assert_array_equal(together, alone(encoder, texts, sparse=sparse))


@pytest.mark.parametrize("variant", ["multilingual-base", "base-en", "large-en", "bare-with-head"])
def test_other_architectures(variant: str, tmp_path: Path, other_way: Any) -> None:
    encoder = GTEEncoder.from_pretrained(build(find_variant(variant), tmp_path), precision="int8", device="cpu")
    texts = [text for text in TEXTS if encoder.count_tokens(text) <= few_rows.ROWS]
    assert len(texts) > 5
    asked = alone(encoder, texts, sparse=False)
    with other_way():
        given = alone(encoder, texts, sparse=False)
    np.testing.assert_allclose(asked, given, rtol=0, atol=2e-5)


def test_a_network_too_wide_takes_the_other_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = GTEEncoder.from_pretrained(
        build(find_variant("multilingual-base"), tmp_path), precision="int8", device="cpu"
    )
    monkeypatch.setattr(few_rows, "COLUMNS", 100)
    monkeypatch.setattr(few_rows, "FewRows", None)  # calling it would fail
    assert len(encoder.encode_documents(["a text"])) == 1


# Threads


@pytest.mark.parametrize("threads", [1, 2, 3, 4, 9])
def test_the_number_of_threads_does_not_matter(encoder: GTEEncoder, threads: int) -> None:
    texts = ["a text", "how to implement quick sort in python?"]
    expected = alone(encoder, texts)
    torch.set_num_threads(threads)
    for _ in range(5):
        np.testing.assert_array_equal(alone(encoder, texts), expected)


@pytest.mark.parametrize("when", ["never", "late", "after"])
def test_helpers_that_do_not_come_in_time_are_not_missed(
    encoder: GTEEncoder, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(encoder, ["a text"])
    asked: list[Any] = []
    begun = threading.Event()
    helpers: list[threading.Thread] = []

    def ask(work: Any, count: int) -> None:
        asked.append(work)
        if when == "late":
            helpers.append(threading.Thread(target=lambda: (begun.wait(), work())))
            helpers[-1].start()
            threading.Timer(0.001, begun.set).start()

    monkeypatch.setattr(few_rows._HELPERS, "ask", ask)
    found = alone(encoder, ["a text"])
    np.testing.assert_array_equal(found, expected)
    assert len(asked) == 1
    if when == "after":
        asked[0]()  # finds nothing left, and changes nothing
        np.testing.assert_array_equal(found, expected)
    for helper in helpers:
        helper.join()


def test_threads_that_call_at_once_get_their_own_results(encoder: GTEEncoder) -> None:
    groups = [[f"water {number} {word}" for word in ("and", "or", "with")] * 10 for number in range(4)]
    expected = [alone(encoder, group) for group in groups]
    results: dict[int, Any] = {}

    def work(number: int) -> None:
        results[number] = alone(encoder, groups[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, dense in enumerate(expected):
        np.testing.assert_array_equal(results[number], dense)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system binds no thread to cores")
def test_helpers_keep_off_the_core_that_calls(encoder: GTEEncoder) -> None:
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("there is one core")
    try:
        for core in sorted(cores)[:2]:
            os.sched_setaffinity(0, {core})  # moves this thread there
            os.sched_setaffinity(0, cores)
            encoder.encode_documents(["a text"])
            here, allowed = few_rows._HELPERS._kept_off
            assert allowed == cores
            for thread in few_rows._HELPERS._threads:
                assert os.sched_getaffinity(thread.native_id) == cores - {here}
    finally:
        os.sched_setaffinity(0, cores)


def test_a_thread_that_cannot_be_had_is_not_needed(encoder: GTEEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(encoder, ["a text"])

    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(few_rows, "_HELPERS", few_rows._Helpers())
    monkeypatch.setattr(threading.Thread, "start", start)
    np.testing.assert_array_equal(alone(encoder, ["a text"]), expected)
    assert few_rows._HELPERS._jobs.empty()


def test_a_helper_outlives_an_error_and_lets_go_of_its_work() -> None:
    helpers = few_rows._Helpers()
    given: list[Any] = []

    class Work:
        def __call__(self) -> None:
            given.append(weakref.ref(self))
            raise MemoryError

    helpers.ask(Work(), 1)
    if not helpers._threads:
        pytest.skip("there is one core")
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and not (given and given[0]() is None):
        time.sleep(0.01)
    assert given[0]() is None
    assert helpers._threads[0].is_alive()
    helpers._stop()


def test_helpers_end_when_they_are_told_to() -> None:
    helpers, done = few_rows._Helpers(), threading.Event()
    helpers.ask(done.set, 1)
    if not helpers._threads:
        pytest.skip("there is one core")
    assert done.wait(10)
    threads = list(helpers._threads)
    helpers._stop()
    assert not any(thread.is_alive() for thread in threads)
    helpers.ask(done.set, 1)
    assert not helpers._threads


def test_a_process_ends_quietly_right_after_a_query() -> None:
    code = (
        "from gte_rag import GTEEncoder\n"
        "GTEEncoder.from_pretrained(precision='int8', device='cpu').encode_documents(['a text'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_has_helpers_of_its_own() -> None:
    code = (
        "import os\n"
        "from gte_rag import GTEEncoder\n"
        "encoder = GTEEncoder.from_pretrained(precision='int8', device='cpu')\n"
        "before = encoder.encode_documents(['a text']).dense\n"
        "child = os.fork()\n"
        "same = bool((encoder.encode_documents(['a text']).dense == before).all())\n"
        "if not child: os._exit(0 if same else 1)\n"
        "print(same, os.waitpid(child, 0)[1])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["True", "0"], done.stderr
