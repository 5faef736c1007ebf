"""Checkpoints load or are refused with the file or key at fault; what is saved loads again, the same."""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

import gte_rag.checkpoint
from checkpoints import TEXTS, Variant, build, find_variant
from gte_rag import CheckpointError, GTEEncoder
from gte_rag.checkpoint import load_checkpoint, save_checkpoint

Tensors = dict[str, torch.Tensor]

PLAIN = find_variant("bare-with-head")
NATIVE = find_variant("native-default")
SHARDED = find_variant("sharded")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint to damage."""
    return build(PLAIN, tmp_path / "checkpoint")


def load(folder: Path) -> GTEEncoder:
    return GTEEncoder.from_pretrained(folder, device="cpu", precision="float32")


def change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | values), encoding="utf-8")


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    changed = folder / "changed"
    save_file(tensors, changed, metadata={"format": "pt"})
    changed.replace(folder / "model.safetensors")  # what is loaded may still lie in the old file


def refused(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


# What is no checkpoint


@pytest.mark.parametrize(
    "name", ["nonsense", "no/such/model", "/no/such/folder", "a b/c", "~no-such-user/x", "gte-mini\0"]
)
def test_a_name_that_is_neither_folder_nor_hub_id_is_refused(name: str) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*: give 'gte-mini', an existing folder, or a Hugging"):
        load_checkpoint(name)


@pytest.mark.parametrize("name", [None, 3, b"gte-mini", ["gte-mini"]])
def test_a_name_that_is_no_name_is_refused(name: Any) -> None:
    with pytest.raises(TypeError, match=f"name_or_path is {type(name).__name__}; give a name"):
        load_checkpoint(name)


def test_a_file_is_no_checkpoint(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*config\.json"):
        load_checkpoint(folder / "config.json")


def test_a_folder_without_config_is_refused(folder: Path) -> None:
    (folder / "config.json").unlink()
    refused(folder, r"has no config\.json; give the folder that holds a checkpoint")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b"{", "cannot be read as JSON"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (b"[]", "holds a list; expected a dict"),
        (b"{}", "model_type None"),
    ],
)
def test_a_config_that_is_no_configuration_is_refused(folder: Path, content: bytes, message: str) -> None:
    (folder / "config.json").write_bytes(content)
    refused(folder, rf"config\.json.* {message}|{message}")


def test_a_bert_checkpoint_is_refused_by_its_type(folder: Path) -> None:
    change_config(folder, model_type="bert")
    refused(folder, "model_type 'bert'; this package runs the GTE architecture only")


# Tokenizers


def test_a_checkpoint_without_tokenizer_says_how_to_get_one(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    refused(folder, r"has no tokenizer\.json; save the tokenizer with .*save_pretrained")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"model": {"type": "Unknown"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content, encoding="utf-8")
    refused(folder, r"tokenizer\.json is not a tokenizer")


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder: Path) -> None:
    largest = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values())
    change_config(folder, vocab_size=largest)
    refused(folder, rf"token ids up to {largest} but config\.json a vocabulary of {largest}")


def test_an_added_token_beyond_the_vocabulary_is_refused(folder: Path) -> None:
    path = str(folder / "tokenizer.json")
    tokenizer = Tokenizer.from_file(path)
    tokenizer.add_tokens([f"added{number}" for number in range(640)])
    tokenizer.save(path)
    refused(folder, "a vocabulary of 640; these files do not belong together")


def test_a_tokenizer_that_adds_no_special_tokens_is_refused(folder: Path) -> None:
    path = folder / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8")) | {"post_processor": None}
    path.write_text(json.dumps(raw), encoding="utf-8")
    refused(folder, "does not put one special token before and one after a text")


def test_limits_saved_with_the_tokenizer_are_lifted(tmp_path: Path) -> None:
    variant = dataclasses.replace(PLAIN, saved_limits=True)
    limited, plain = load(build(variant, tmp_path / "limited")), load(build(PLAIN, tmp_path / "plain"))
    texts = ["the " * 200, "the"]
    assert limited.count_tokens(texts[0]) == 202
    encoding = limited.encode_documents(texts)
    assert encoding.truncated == 0
    np.testing.assert_array_equal(encoding.dense, plain.encode_documents(texts).dense)


def test_special_tokens_are_those_the_tokenizer_names(folder: Path) -> None:
    assert load_checkpoint(folder).special_ids == {0, 1, 2, 3}
    path = folder / "tokenizer_config.json"
    vocabulary = Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    names = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(names | {"unk_token": {"content": "▁the", "lstrip": False}}), encoding="utf-8")
    assert load_checkpoint(folder).special_ids == {0, 1, 2, 3, vocabulary["▁the"]}


@pytest.mark.parametrize("prompts", ['{"prompts": ["query: "]}', '{"prompts": {"query": 3}}', '{"prompts": "query: "}'])
def test_malformed_prompts_are_refused(folder: Path, prompts: str) -> None:
    (folder / "config_sentence_transformers.json").write_text(prompts, encoding="utf-8")
    refused(folder, "prompts must map names to strings")


@pytest.mark.parametrize("prompts", ["{}", '{"prompts": null}', '{"prompts": {}}', '{"prompts": {"sts": "x"}}'])
def test_no_prompts_are_fine(folder: Path, prompts: str) -> None:
    (folder / "config_sentence_transformers.json").write_text(prompts, encoding="utf-8")
    assert load_checkpoint(folder).prompts == {"query": "", "document": ""}


# Weight files


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refused(folder, r"has no model\.safetensors")


def test_pickled_weights_are_never_read(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(folder, r"only as pickle \(pytorch_model\.bin\), which can run code .* convert")


@pytest.mark.parametrize("size", [0, 4, 100, 5000, -1])
def test_a_truncated_weight_file_is_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, r"model\.safetensors is damaged or not a safetensors file .* fetch it again")


@pytest.mark.parametrize("place", [0, 7, 9], ids=["length", "length's end", "header"])
def test_a_corrupted_header_is_refused(folder: Path, place: int) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)
    refused(folder, r"model\.safetensors is damaged or not a safetensors file")


def test_a_git_lfs_pointer_is_refused(folder: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 611\n"
    (folder / "model.safetensors").write_text(pointer, encoding="utf-8")
    refused(folder, r"model\.safetensors is damaged or not a safetensors file")


def test_a_missing_shard_is_refused_by_its_name(tmp_path: Path) -> None:
    folder = build(SHARDED, tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    refused(folder, r"index\.json names model-00002-of-00003\.safetensors, which is not beside it")


@pytest.mark.parametrize("index", ["{}", '{"weight_map": null}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_weight_map_is_refused(tmp_path: Path, index: str) -> None:
    folder = build(SHARDED, tmp_path)
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    refused(folder, r"model\.safetensors\.index\.json has no weight_map")


def test_an_index_that_names_no_files_leaves_all_weights_missing(tmp_path: Path) -> None:
    folder = build(SHARDED, tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {}}', encoding="utf-8")
    refused(folder, "missing: .* more; unexpected: none")


@pytest.mark.parametrize("path", ["../stolen.safetensors", "sub/part.safetensors"])
def test_an_index_cannot_name_files_elsewhere(tmp_path: Path, path: str) -> None:
    folder = build(SHARDED, tmp_path / "checkpoint")
    (folder / "sub").mkdir()
    for place in (tmp_path / "stolen.safetensors", folder / "sub/part.safetensors"):
        save_file({"a": torch.zeros(1)}, place)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": path}}), encoding="utf-8")
    refused(folder, "which is not beside it")


# Tensors

_WORDS = "embeddings.word_embeddings.weight"
_NORM = "encoder.layer.1.mlp_ln.bias"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(_NORM), r"do not fit config\.json; missing: layers\.1\.mlp_ln\.bias; unexpected: none"),
        (
            lambda w: w.update({"encoder.layer.2.mlp_ln.bias": torch.zeros(64)}),
            r"missing: none; unexpected: layers\.2\.mlp_ln\.bias",
        ),
        (
            lambda w: w.update({_NORM: torch.zeros(63)}),
            r"layers\.1\.mlp_ln\.bias has shape \(63,\); config\.json makes it \(64,\)",
        ),
        (lambda w: w[_NORM].__setitem__(5, float("nan")), r"layers\.1\.mlp_ln\.bias holds NaN or infinite"),
        (lambda w: w[_WORDS].__setitem__((3, 3), float("inf")), "word_embeddings.weight holds NaN or infinite"),
        (lambda w: w["classifier.weight"].fill_(float("nan")), r"classifier\.weight holds NaN"),
        (lambda w: w.update({_WORDS: w[_WORDS].to(torch.int8)}), "word_embeddings.weight is torch.int8"),
        (lambda w: w.update({_WORDS: w[_WORDS].to(torch.float8_e5m2)}), "word_embeddings.weight is torch.float8"),
        (lambda w: w.update({f"new.{_NORM}": torch.zeros(64)}), r"'layers\.1\.mlp_ln\.bias' twice"),
        (lambda w: w.update({"classifier.weight": torch.zeros(2, 64)}), r"classifier\.weight has shape \(2, 64\)"),
        (lambda w: w.update({"classifier.bias": torch.zeros(2)}), r"classifier\.bias \(2,\); a sparse head has"),
        (lambda w: w.clear(), "missing: .* more; unexpected: none"),
    ],
    ids=[
        "missing", "extra", "shape", "NaN", "infinite", "NaN head", "int8", "float8", "twice", "labels", "bias", "nothing"
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_by_their_key(
    folder: Path, change: Callable[[Tensors], object], message: str
) -> None:
    change_tensors(folder, change)
    refused(folder, message)


_KEY, _VALUE = "gte.layers.0.self_attn.k_proj.weight", "gte.layers.0.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.update({_KEY: torch.zeros(64, 32)}), r"k_proj\.weight, .* have shapes \(64, 32\), \(64, 64\)"),
        (
            # Together these have the right number of rows.
            lambda w: w.update({_KEY: torch.zeros(32, 64), _VALUE: torch.zeros(96, 64)}),
            r"have shapes \(32, 64\), \(64, 64\), \(96, 64\); they must be equal",
        ),
        (lambda w: w.update({_KEY: torch.tensor(1.0)}), r"have shapes \(\), \(64, 64\)"),
        (lambda w: w.update({_KEY: torch.zeros(64, 64, dtype=torch.int8)}), r"k_proj\.weight is torch\.int8"),
        (lambda w: w.pop(_KEY), r"missing: layers\.0\.attention\.qkv_proj\.weight; unexpected: .*q_proj\.weight"),
        (
            lambda w: w.pop("gte.layers.1.mlp.gate_proj.weight"),
            r"missing: layers\.1\.mlp\.up_gate_proj\.weight; unexpected: layers\.1\.mlp\.up_proj\.weight",
        ),
    ],
    ids=["width", "rows", "scalar", "int8", "missing", "missing gate"],
)
def test_separate_projections_that_do_not_fit_are_refused(
    tmp_path: Path, change: Callable[[Tensors], object], message: str
) -> None:
    folder = build(NATIVE, tmp_path)
    change_tensors(folder, change)
    refused(folder, message)


def test_a_config_of_another_size_is_refused(folder: Path) -> None:
    change_config(folder, num_hidden_layers=1)
    refused(folder, r"missing: none; unexpected: layers\.1\.attention.* and 7 more")


def test_computed_buffers_in_the_file_are_ignored(folder: Path) -> None:
    expected = load(folder).encode_documents(TEXTS).dense
    buffers = {
        "embeddings.position_ids": torch.arange(8192),
        "embeddings.rotary_emb.inv_freq": torch.full((8,), float("nan")),
    }
    change_tensors(folder, lambda tensors: tensors.update(buffers))
    np.testing.assert_array_equal(load(folder).encode_documents(TEXTS).dense, expected)


def test_a_head_without_bias_has_a_bias_of_zero(folder: Path) -> None:
    change_tensors(folder, lambda tensors: tensors["classifier.bias"].zero_())
    expected = load(folder)
    change_tensors(folder, lambda tensors: tensors.pop("classifier.bias"))
    without = load(folder)
    assert without.fingerprint == expected.fingerprint
    assert list(without.encode_documents(TEXTS).sparse or ()) == list(expected.encode_documents(TEXTS).sparse or ())


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("multilingual-reranker", "it is a reranker, whose classifier scores pairs and not tokens"),
        ("multilingual-mlm", "it is a masked language model"),
        ("arctic", "it is dense only"),
    ],
)
def test_a_checkpoint_without_sparse_head_gives_dense_vectors_and_says_why_no_sparse_ones(
    tmp_path: Path, name: str, reason: str
) -> None:
    encoder = load(build(find_variant(name), tmp_path))
    assert not encoder.has_sparse
    with pytest.raises(CheckpointError, match=f"gives no sparse vectors: .*{reason}. Call with sparse=False"):
        encoder.encode_queries(["a"])
    dense = encoder.encode_queries(["a"], sparse=False).dense
    assert dense is not None
    np.testing.assert_allclose(np.linalg.norm(dense), 1, atol=1e-6)


# Hugging Face

_COMMIT = "0123456789abcdef0123456789abcdef01234567"
_OTHER = "fedcba9876543210fedcba9876543210fedcba98"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A download cache with two revisions of one model."""
    repository = tmp_path / "cache" / "models--someone--tiny-gte"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(_COMMIT, encoding="utf-8")
    (repository / "refs" / "v2").write_text(_OTHER, encoding="utf-8")
    build(PLAIN, repository / "snapshots" / _COMMIT)
    build(PLAIN, repository / "snapshots" / _OTHER, seed=1)
    return tmp_path / "cache"


def test_a_hub_id_loads_from_the_cache_in_the_revision_asked_for(cache: Path) -> None:
    def fingerprint(**options: Any) -> str:
        return GTEEncoder.from_pretrained("someone/tiny-gte", cache_dir=cache, device="cpu", **options).fingerprint

    main, other = fingerprint(local_files_only=True), fingerprint(local_files_only=True, revision="v2")
    assert main != other
    assert fingerprint(local_files_only=True, revision="main") == main
    assert fingerprint(local_files_only=True, revision=_OTHER) == other
    assert fingerprint() == main  # offline anyway
    assert load(cache / "models--someone--tiny-gte" / "snapshots" / _COMMIT).fingerprint == main


@pytest.mark.parametrize("local_files_only", [True, False])
def test_a_hub_id_that_cannot_be_had_is_refused(cache: Path, local_files_only: bool) -> None:
    for name, revision in (("someone/other", None), ("someone/tiny-gte", "v3")):
        with pytest.raises(
            CheckpointError, match=f"cannot fetch '{name}' from Hugging Face .*Check the name"
        ) as caught:
            load_checkpoint(name, revision=revision, cache_dir=cache, local_files_only=local_files_only)
        assert "\n" not in str(caught.value)


def test_a_cached_snapshot_that_lacks_its_weights_is_refused(cache: Path) -> None:
    (cache / "models--someone--tiny-gte" / "snapshots" / _COMMIT / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        load_checkpoint("someone/tiny-gte", cache_dir=cache, local_files_only=True)


class Refusal(BaseHTTPRequestHandler):
    """Answers nothing, as a broken connection; to a proxy's CONNECT, that access is denied."""

    def do_CONNECT(self) -> None:
        self.send_error(403)

    def do_GET(self) -> None:
        self.close_connection = True

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def refusing_port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Refusal) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("kind", "reason"), [("proxy", ".*403"), ("broken connection", "")])
def test_a_connection_that_fails_is_reported_as_such(
    refusing_port: int, kind: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    endpoint = f"http://127.0.0.1:{refusing_port}"
    if kind == "proxy":
        monkeypatch.setenv("HTTPS_PROXY", endpoint)
        endpoint = "https://hub.invalid"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    close_session = getattr(
        huggingface_hub, "close_session", lambda: None
    )  # the session keeps the proxies it began with
    close_session()
    with pytest.raises(CheckpointError, match=rf"cannot fetch 'someone/other' .*\({reason}.*the connection"):
        load_checkpoint("someone/other", cache_dir=tmp_path)
    close_session()


# sentence-transformers folders


def test_a_transformer_in_a_subfolder_is_found(tmp_path: Path) -> None:
    build(PLAIN, tmp_path / "0_Transformer")
    modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
    (tmp_path / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    assert load(tmp_path).fingerprint == load(tmp_path / "0_Transformer").fingerprint


@pytest.mark.parametrize("modules", ["[]", "[3]", '[{"path": 3}]', '[{"path": ""}]', '[{"path": "/"}]', '[{"idx": 0}]'])
def test_modules_that_name_no_transformer_are_refused(tmp_path: Path, modules: str) -> None:
    (tmp_path / "modules.json").write_text(modules, encoding="utf-8")
    refused(tmp_path, r"has no config\.json")


# Saving


def assert_same_vectors(actual: GTEEncoder, expected: GTEEncoder) -> None:
    sparse = expected.has_sparse
    assert actual.has_sparse == sparse
    one = actual.encode_documents(TEXTS, sparse=sparse)
    other = expected.encode_documents(TEXTS, sparse=sparse)
    np.testing.assert_array_equal(one.dense, other.dense)
    assert list(one.sparse or ()) == list(other.sparse or ())


@pytest.mark.parametrize(
    "name",
    [
        "multilingual-base",
        "multilingual-native",
        "base-en",
        "large-en",
        "arctic",
        "unpacked-bfloat16",
        "linear",
        "sharded",
    ],
)
def test_a_saved_checkpoint_loads_as_the_same_model(tmp_path: Path, name: str) -> None:
    encoder = load(build(find_variant(name), tmp_path / "original"))
    encoder.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert saved.fingerprint == encoder.fingerprint
    assert (saved.query_prompt, saved.document_prompt) == (encoder.query_prompt, encoder.document_prompt)
    assert_same_vectors(saved, encoder)
    config = json.loads((tmp_path / "saved" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "gte"
    assert config["architectures"] == ["GteForTokenClassification" if encoder.has_sparse else "GteModel"]
    assert config["dtype"] == find_variant(name).dtype


def test_weights_can_be_spread_over_files_of_a_size(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    limit = 40_000
    save_checkpoint(checkpoint, tmp_path / "shards", max_shard_bytes=limit)
    files = sorted((tmp_path / "shards").glob("*.safetensors"))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    sizes = [[tensor.nbytes for tensor in load_file(file).values()] for file in files]
    assert len(files) > 1
    assert all(sum(size) <= limit or len(size) == 1 for size in sizes)
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert index["metadata"]["total_size"] == sum(map(sum, sizes))
    assert_same_vectors(load(tmp_path / "shards"), load(folder))
    assert load(tmp_path / "shards").fingerprint == load(folder).fingerprint


def test_matrices_that_8_bits_hold_take_8_bits_and_are_the_same_everywhere(folder: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder)
    words = "word_embeddings.weight"
    weights = {name: tensor.half() for name, tensor in checkpoint.weights.items()}
    weights[words] = (weights[words] * 16).round().clamp(-15, 15) / 16  # at most four significant bits
    coarse = dataclasses.replace(checkpoint, weights=weights)
    save_checkpoint(coarse, tmp_path / "whole", dtype=torch.float16)
    save_checkpoint(coarse, tmp_path / "bytes", dtype=torch.float16, bytes_where_exact=True)
    tensors = load_file(tmp_path / "bytes" / "model.safetensors")
    assert [key for key, tensor in tensors.items() if tensor.dtype != torch.float16] == [f"gte.embeddings.{words}"]
    assert tensors[f"gte.embeddings.{words}"].dtype == torch.float8_e4m3fn
    assert load_checkpoint(tmp_path / "bytes").weights[words].dtype == torch.float16
    assert_same_vectors(load(tmp_path / "bytes"), load(tmp_path / "whole"))
    assert load(tmp_path / "bytes").fingerprint == load(tmp_path / "whole").fingerprint
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForTokenClassification.from_pretrained(tmp_path / "bytes")
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.float16}
    torch.testing.assert_close(theirs.get_input_embeddings().weight.data, weights[words], rtol=0, atol=0)


def test_the_bundled_model_can_be_saved(encoder: GTEEncoder, tmp_path: Path) -> None:
    encoder.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").fingerprint == encoder.fingerprint


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_the_fingerprint_survives_every_dtype_that_is_exact(tmp_path: Path, stored: Any) -> None:
    variant = dataclasses.replace(PLAIN, dtype=stored)
    original = load(build(variant, tmp_path / "original"))
    for dtype in ("float32", stored, None):
        target = tmp_path / str(dtype)
        original.save_pretrained(target, dtype=dtype)
        kept = load(target)
        assert kept.fingerprint == original.fingerprint
        assert_same_vectors(kept, original)


def test_saving_in_float16_halves_the_weights_and_moves_vectors_a_little(folder: Path, tmp_path: Path) -> None:
    encoder = load(folder)
    encoder.save_pretrained(tmp_path / "half", dtype="float16")
    encoder.save_pretrained(tmp_path / "whole")
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert json.loads((tmp_path / "half" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float16"
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]
    half, whole = load(tmp_path / "half"), load(tmp_path / "whole")
    assert half.fingerprint != whole.fingerprint
    rounded, exact = half.encode_documents(TEXTS).dense, whole.encode_documents(TEXTS).dense
    assert rounded is not None
    assert exact is not None
    assert 0 < np.abs(rounded - exact).max() < 5e-3


@pytest.mark.parametrize("dtype", ["int8", "fp16", torch.float16, 16, ""])
def test_another_dtype_is_refused(encoder: GTEEncoder, tmp_path: Path, dtype: Any) -> None:
    with pytest.raises(ValueError, match="accepted: 'float32', 'float16', 'bfloat16' and None"):
        encoder.save_pretrained(tmp_path / "new", dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_never_written_to(encoder: GTEEncoder, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine", encoding="utf-8")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ValueError, match="exists and is not an empty folder; give a new one"):
            encoder.save_pretrained(target)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    assert (tmp_path / "mine.txt").read_text(encoding="utf-8") == "mine"


def test_an_empty_folder_and_new_parents_are_accepted(folder: Path, tmp_path: Path) -> None:
    encoder = load(folder)
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "some" / "new" / "place"):
        encoder.save_pretrained(target)
        assert load(target).fingerprint == encoder.fingerprint
        assert [path for path in target.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.parametrize("existing", [True, False])
def test_a_failure_while_saving_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool
) -> None:
    place = tmp_path / "place"
    place.mkdir()
    if existing:
        (place / "target").mkdir()
    before = sorted(place.rglob("*"))

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left on device")

    encoder = load(folder)
    monkeypatch.setattr(gte_rag.checkpoint, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        encoder.save_pretrained(place / "target")
    assert sorted(place.rglob("*")) == before


def test_mixed_scaling_cannot_be_saved_and_leaves_nothing_behind(tmp_path: Path) -> None:
    encoder = load(build(find_variant("mixed-ntk"), tmp_path / "original"))
    with pytest.raises(ValueError, match="cannot express rope_scaling with mixed_b"):
        encoder.save_pretrained(tmp_path / "a" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["original"]


def test_saving_works_after_the_working_directory_changed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    encoder = load(Path(folder.name))
    monkeypatch.chdir("/")
    encoder.save_pretrained(folder.parent / "saved")
    assert load(folder.parent / "saved").fingerprint == encoder.fingerprint


def test_saving_without_the_original_tokenizer_fails_instead_of_leaving_it_out(folder: Path, tmp_path: Path) -> None:
    encoder = load(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        encoder.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_home_folder_is_expanded(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    encoder = load(folder)
    encoder.save_pretrained("~/saved")
    assert GTEEncoder.from_pretrained("~/saved", device="cpu").fingerprint == encoder.fingerprint
    assert (tmp_path / "saved").is_dir()


def test_a_masked_language_model_is_saved_without_its_head(tmp_path: Path) -> None:
    variant: Variant = find_variant("multilingual-mlm")
    load(build(variant, tmp_path / "original")).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert not [key for key in saved if "lm_head" in key]
    with pytest.raises(CheckpointError, match="it is dense only"):
        load(tmp_path / "saved").encode_documents(["a"])


def test_a_reranker_is_saved_with_its_head(tmp_path: Path) -> None:
    load(build(find_variant("multilingual-reranker"), tmp_path / "original")).save_pretrained(tmp_path / "saved")
    heads = [
        key for key in load_file(tmp_path / "saved" / "model.safetensors") if "pooler" in key or "classifier" in key
    ]
    assert sorted(heads) == [
        *("classifier.bias", "classifier.weight"),
        *("gte.pooler.dense.bias", "gte.pooler.dense.weight"),
    ]
