"""From a hub name or a folder to configuration, tokenizer and weights, and back to a folder.

Weights come from safetensors only: no pickle, no code from the checkpoint. Every layout in circulation is brought to the
parameter names of `gte_rag.model` by one rename table, and keys and shapes must then match exactly.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from gte_rag.config import GTEConfig
from gte_rag.errors import CheckpointError
from gte_rag.model import GTEModel
from gte_rag.modelscope import download
from gte_rag.tokenization import check_unicode, special_token_ids

BUNDLED = {"gte-mini": Path(__file__).parent / "gte_mini"}

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_PROMPTS_FILE = "config_sentence_transformers.json"
_MODELSCOPE = "modelscope:"
_HUB_ID = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_HUB_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "modules.json",
    _PROMPTS_FILE,
    *_TOKENIZER_FILES,
]

# Foreign parameter names -> those of gte_rag.model, applied in order. The original repositories write
# `new.encoder.layer.0.attention.qkv_proj`, transformers `gte.layers.0.self_attn.q_proj`; both also occur without prefix.
_RENAMES = (
    (r"^(new|gte|model)\.", ""),
    (r"^embeddings\.LayerNorm\.", "embeddings_ln."),
    (r"^embeddings\.", ""),
    (r"^encoder\.layer\.", "layers."),
    (r"\.self_attn\.", ".attention."),
    (r"\.post_attention_layernorm\.", ".attn_ln."),
    (r"\.post_mlp_layernorm\.", ".mlp_ln."),
)
# Parts that some checkpoints store separately -> the packed parameter, in the order of its rows.
_PACKED = (
    ("attention.qkv_proj", ("attention.q_proj", "attention.k_proj", "attention.v_proj")),
    ("mlp.up_gate_proj", ("mlp.up_proj", "mlp.gate_proj")),
)
# What fetching can raise: the base of the hub's own error is its HTTP library's, whose proxy and protocol errors come through.
_FETCH_ERRORS = cast(
    "tuple[type[Exception], ...]", (*HfHubHTTPError.__bases__, HFValidationError, LocalEntryNotFoundError, OSError)
)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BYTE = torch.float8_e4m3fn  # a weight may be kept in it as a plain number; its values are all float16 values
_SAVED_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# A checkpoint may come from a stranger. Real files are a tenth of these sizes; reading takes a multiple of them in memory.
_LARGEST_FILES = {"tokenizer.json": 256 * 2**20}
_LARGEST_FILE = 32 * 2**20
_LONGEST_PROMPT = 4096
# A text that is in no vocabulary: the last character for private use.
_UNKNOWN = "\U0010fffd"
_RERANK_HEAD = ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias")
# Buffers some exports contain; they are computed here.
_BUFFERS = re.compile(r"(inv_freq|position_ids|cos_cached|sin_cached)$")
_SPECIAL_ROLES = ("cls_token", "bos_token", "eos_token", "sep_token", "pad_token", "unk_token")
_USUAL_SPECIALS = ("<s>", "</s>", "<pad>", "<unk>", "[CLS]", "[SEP]", "[PAD]", "[UNK]")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint read into memory.

    Attributes:
        folder: Where its files lie.
        config: The architecture.
        tokenizer: The tokenizer, without padding or truncation.
        special_ids: Ids of the cls, bos, eos, sep, pad and unk tokens; they never carry sparse weight.
        prompts: Text put before queries and documents: ``{"query": …, "document": …}``.
        weights: Parameters of `GTEModel` by name, in the file's dtype; those of 8 bits in the file are float16.
        sparse_head: Weight (1, C) and bias (1,) of the sparse head, or None.
        without_head: Why there is no sparse head, in words for an error message; empty when there is one.
        rerank_head: Weight (C, C) and bias (C,) of the pooler, weight (1, C) and bias (1,) of the classifier of a reranker,
            or None.
        without_rerank_head: Why there is no reranker's head, likewise.
    """

    folder: Path
    config: GTEConfig
    tokenizer: Tokenizer
    special_ids: frozenset[int]
    prompts: Mapping[str, str]
    weights: Mapping[str, Tensor]
    sparse_head: tuple[Tensor, Tensor] | None
    without_head: str
    rerank_head: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
    without_rerank_head: str = ""

    def fingerprint(self) -> str:
        """Return 16 hex characters that name this model: the same for every layout and dtype it was saved in.

        Covers the architecture, the vocabulary and 4,096 evenly spaced values of every parameter.
        """
        digest = hashlib.sha256()
        # Five digits are equal in every dialect.
        frequencies = [f"{frequency:.5g}" for frequency in self.config.inverse_frequencies().tolist()]
        digest.update(repr((self.config.num_heads, frequencies)).encode())
        head = dict(zip(("head.weight", "head.bias"), self.sparse_head or (), strict=False))
        head |= dict(zip(_RERANK_HEAD, self.rerank_head or (), strict=False))
        for name, tensor in sorted({**self.weights, **head}.items()):
            flat = tensor.reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)].float().numpy()
            digest.update(f"{name}{tuple(tensor.shape)}".encode() + sample.tobytes())
        for piece, index in sorted(self.tokenizer.get_vocab(with_added_tokens=True).items()):
            digest.update(f"{piece}\0{index}\0".encode())
        return digest.hexdigest()[:16]


def load_checkpoint(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Read a checkpoint.

    Args:
        name_or_path: ``"gte-mini"`` (bundled), a folder, a Hugging Face id such as
            ``"Alibaba-NLP/gte-multilingual-base"``, or a ModelScope id such as
            ``"modelscope:iic/gte_sentence-embedding_multilingual-base"``. Only an id causes network access.
        revision: Branch, tag or commit of an id.
        cache_dir: Where downloads are kept; by default the hub's own cache.
        local_files_only: Use what was downloaded before and never the network.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged or of another kind.
    """
    folder = find_folder(name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only)
    config = GTEConfig.from_dict(_read_json(folder / "config.json"))
    tokenizer = _read_tokenizer(folder, config)
    weights, extra = _bring_to_model_names(_read_tensors(folder), config, folder)
    sparse_head, without_head = _sparse_head(extra, config, folder)
    rerank_head, without_rerank_head = _rerank_head(extra, config, folder)
    return Checkpoint(
        folder=folder,
        config=config,
        tokenizer=tokenizer,
        special_ids=_special_ids(folder, tokenizer) | {config.pad_token_id},
        prompts=_prompts(folder),
        weights=weights,
        sparse_head=sparse_head,
        without_head=without_head,
        rerank_head=rerank_head,
        without_rerank_head=without_rerank_head,
    )


def find_folder(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """Return the folder that holds a checkpoint's ``config.json``, downloading the files of an id if necessary.

    Raises:
        CheckpointError: There is no such folder, or the id cannot be had.
        MissingExtraError: A ModelScope id is given and its client is not installed.
    """
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path is {type(name_or_path).__name__}; give a name, a folder or a Hugging Face id")
    name = os.fspath(name_or_path)
    if name in BUNDLED:
        return BUNDLED[name]
    folder = Path(os.path.expanduser(name)).absolute()  # saving reads it again, perhaps from another working directory
    if not folder.is_dir():
        if not re.fullmatch(_HUB_ID, name.removeprefix(_MODELSCOPE)) or folder.exists():
            raise CheckpointError(
                f"no checkpoint {name!r}: give {' or '.join(map(repr, BUNDLED))}, an existing folder, or a Hugging Face id "
                "such as 'Alibaba-NLP/gte-multilingual-base'; a ModelScope id takes 'modelscope:' before it, such as "
                "'modelscope:iic/gte_sentence-embedding_multilingual-base'"
            )
        cache = None if cache_dir is None else os.fspath(cache_dir)
        if name.startswith(_MODELSCOPE):
            folder = download(
                name.removeprefix(_MODELSCOPE),
                patterns=_HUB_FILES,
                revision=revision,
                cache_dir=cache,
                local_files_only=local_files_only,
            )
        else:
            folder = _fetch(name, revision=revision, cache_dir=cache, local_files_only=local_files_only)
    if not (folder / "config.json").is_file():
        nested = _first_module(folder)
        if nested is None:
            raise CheckpointError(f"{folder} has no config.json; give the folder that holds a checkpoint")
        folder = nested
    return folder


def convert(
    name_or_path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Write a checkpoint of any layout anew in the native layout, so that other tools load it without remote code.

    An encoder with a sparse head becomes a ``GteForTokenClassification``, a reranker a ``GteForSequenceClassification`` and
    everything else a ``GteModel``; a head that this package does not use, such as that of a masked language model, is left
    out.

    Args:
        name_or_path: What to read; see `load_checkpoint`.
        folder: Where to write: a folder that does not exist yet, or is empty.
        dtype: ``"float32"``, ``"float16"`` or ``"bfloat16"``; None keeps that of the checkpoint.
        revision: Branch, tag or commit of an id.
        cache_dir: Where downloads are kept; by default the hub's own cache.
        local_files_only: Use what was downloaded before and never the network.

    Returns:
        What was read.

    Raises:
        CheckpointError: There is no such checkpoint, or it is damaged or of another kind.
        ValueError: The folder is not empty, `dtype` is another one or too narrow for a weight, or the native layout cannot
            express the architecture.
    """
    if dtype is not None and dtype not in _SAVED_DTYPES:
        raise ValueError(f"dtype is {dtype!r}; accepted: {', '.join(map(repr, _SAVED_DTYPES))} and None")
    _check_target(folder)
    checkpoint = load_checkpoint(
        name_or_path, revision=revision, cache_dir=cache_dir, local_files_only=local_files_only
    )
    save_checkpoint(checkpoint, folder, dtype=None if dtype is None else _SAVED_DTYPES[dtype])
    return checkpoint


def save_checkpoint(
    checkpoint: Checkpoint,
    folder: str | os.PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    bytes_where_exact: bool = False,
) -> None:
    """Write a checkpoint in the native layout, which `transformers` and `sentence-transformers` load without remote code.

    The folder appears complete or not at all.

    Args:
        checkpoint: What to write.
        folder: A folder that does not exist yet, or is empty.
        dtype: Dtype of the weights in the file; None keeps each as it is.
        max_shard_bytes: Spread the weights over several files, each with at most so many bytes of them; a larger parameter gets
            a file of its own. None: one file.
        bytes_where_exact: Write a matrix as float8_e4m3fn if that holds every value of it as it is. Readers, `transformers`
            among them, bring it to the dtype of the others.

    Raises:
        ValueError: The folder is not empty, the dtype is too narrow for a weight, or the native layout cannot express the
            architecture.
    """
    target = _check_target(folder)
    raw = checkpoint.config.to_dict()
    raw["architectures"] = ["GteModel"]
    if checkpoint.rerank_head or checkpoint.sparse_head:
        task = "SequenceClassification" if checkpoint.rerank_head else "TokenClassification"
        raw["architectures"] = [f"GteFor{task}"]
        raw |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    tensors = {key: value.to(dtype or value.dtype).contiguous().cpu() for key, value in _native_names(checkpoint)}
    for key, tensor in tensors.items():
        if not _is_finite(tensor):
            raise ValueError(f"{key} has values that {tensor.dtype} cannot hold; save as float32 or bfloat16")
    raw["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if bytes_where_exact:
        tensors = {key: _in_bytes(tensor) for key, tensor in tensors.items()}
    files: dict[str, Any] = {"config.json": raw}
    if not checkpoint.rerank_head:  # a reranker makes no vectors: sentence-transformers must not take it for an encoder
        files |= _sentence_transformers_files(checkpoint)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
        draft = Path(temporary) / "draft"
        draft.mkdir()
        for name, content in files.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for name in _TOKENIZER_FILES:
            if name == "tokenizer.json" or (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, draft / name)
        _write_tensors(tensors, draft, max_shard_bytes)
        if target.exists():
            target.rmdir()  # checked above: empty
        draft.rename(target)


def _in_bytes(tensor: Tensor) -> Tensor:
    """Return a matrix in 8 bits if they hold every value; anything else as it is."""
    narrow = tensor.to(_BYTE) if tensor.ndim == 2 else tensor
    return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor


def _write_tensors(tensors: Mapping[str, Tensor], folder: Path, max_shard_bytes: int | None) -> None:
    """Write ``model.safetensors``, or shards and the index that names them."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if max_shard_bytes is not None and shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(shard, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_target(folder: str | os.PathLike[str]) -> Path:
    target = Path(os.path.expanduser(folder))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty folder; give a new one")
    return target


def _sentence_transformers_files(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
        "sentence_bert_config.json": {
            "max_seq_length": checkpoint.config.max_position_embeddings,
            "do_lower_case": False,
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": checkpoint.config.hidden_size,
            "pooling_mode_cls_token": True,
            "pooling_mode_mean_tokens": False,
        },
        _PROMPTS_FILE: {"prompts": dict(checkpoint.prompts), "similarity_fn_name": "cosine"},
    }


def _fetch(name: str, *, revision: str | None, cache_dir: str | None, local_files_only: bool) -> Path:
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                allow_patterns=_HUB_FILES,
            )
        )
    except _FETCH_ERRORS as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot fetch {name!r} from Hugging Face ({reason}). Check the name, the revision and the connection, or "
            "give the folder of a copy on this machine"
        ) from error


def _first_module(folder: Path) -> Path | None:
    """Return the transformer's subfolder in a `sentence-transformers` folder that keeps it apart, if there is one."""
    if not (folder / "modules.json").is_file():
        return None
    modules = _read_json(folder / "modules.json", kind=list)
    path = modules[0].get("path") if modules and isinstance(modules[0], dict) else None
    if not isinstance(path, str) or not _is_file_name(path):
        return None
    return folder / path if (folder / path / "config.json").is_file() else None


def _is_file_name(name: str) -> bool:
    """Whether a name from a checkpoint stays in its folder, on every system: no separator, no drive, not the parent."""
    return name == PureWindowsPath(name).name and name not in ("", "..")


def _read_json(path: Path, kind: type = dict) -> Any:  # noqa: ANN401  # JSON has no narrower type
    try:
        _check_size(path)
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read as JSON: it is nested too deeply") from None
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, kind):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected a {kind.__name__}")
    return content


def _check_unicode(text: str, where: str, path: Path) -> None:
    try:
        check_unicode(text, where)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def _check_size(path: Path) -> None:
    size, largest = path.stat().st_size, _LARGEST_FILES.get(path.name, _LARGEST_FILE)
    if size > largest:
        raise CheckpointError(f"{path} has {size:,} bytes; a file of this name in a checkpoint has {largest:,} at most")


def _read_tokenizer(folder: Path, config: GTEConfig) -> Tokenizer:
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json; save the tokenizer with transformers' "
            "AutoTokenizer.from_pretrained(…).save_pretrained(…) to get one"
        )
    _check_size(path)
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        empty = tokenizer.encode("")
        pair = tokenizer.encode("", _UNKNOWN)  # a template or a model that is not whole shows only when it is used
    except BaseException as error:
        # The Rust library raises bare Exception for a malformed file, and where it panics something beside Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{path} is not a tokenizer: {error}") from error
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    largest = max([*vocabulary.values(), *empty.ids, *pair.ids])
    if largest >= config.vocab_size:
        raise CheckpointError(
            f"{path} has token ids up to {largest} but config.json a vocabulary of {config.vocab_size}; "
            "these files do not belong together"
        )
    if len(empty.ids) != 2:
        raise CheckpointError(
            f"{path} does not put one special token before and one after a text; the dense vector is the first one's"
        )
    return tokenizer


def _special_ids(folder: Path, tokenizer: Tokenizer) -> frozenset[int]:
    names: set[str] = set(_USUAL_SPECIALS)
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / file).is_file():
            raw = _read_json(folder / file)
            for role in _SPECIAL_ROLES:
                token = raw.get(role)
                name = str(token.get("content", "")) if isinstance(token, dict) else str(token or "")
                _check_unicode(name, role, folder / file)
                names.add(name)
    return special_token_ids(tokenizer, sorted(names - {""}))


def _prompts(folder: Path) -> dict[str, str]:
    """Read the checkpoint's own prompts, under the names `sentence-transformers` gives them."""
    path = folder / _PROMPTS_FILE
    given = _read_json(path).get("prompts") or {} if path.is_file() else {}
    if not isinstance(given, dict) or not all(isinstance(prompt, str) for prompt in given.values()):
        raise CheckpointError(f"{path}: prompts must map names to strings")
    for name, prompt in given.items():
        if len(prompt) > _LONGEST_PROMPT:
            raise CheckpointError(
                f"{path}: prompt {name!r} has {len(prompt):,} characters; {_LONGEST_PROMPT:,} are accepted"
            )
        _check_unicode(prompt, f"prompt {name!r}", path)
    document = next((given[name] for name in ("document", "passage", "corpus") if name in given), "")
    return {"query": given.get("query", ""), "document": document}


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: the single one, or the shards its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index} has no weight_map from parameters to files")
        names = sorted(set(shards.values()))
        for name in names:
            if not _is_file_name(name) or not (folder / name).is_file():
                raise CheckpointError(f"{index} names {name}, which is not beside it; fetch the missing file")
        return [folder / name for name in names]
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickled:
        raise CheckpointError(
            f"{folder} has its weights only as pickle ({', '.join(pickled)}), which can run code when it is read; convert "
            "them to model.safetensors first"
        )
    raise CheckpointError(f"{folder} has no model.safetensors")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # not a mapping
                    tensors[key] = file.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is damaged or not a safetensors file ({error}); fetch it again") from error
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    """Tell whether no value is NaN or infinite, at a fifteenth of the time that isfinite takes: its extremes pass NaN on."""
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))


def _bring_to_model_names(
    tensors: dict[str, Tensor], config: GTEConfig, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rename, pack and check; return the network's parameters and whatever belongs to heads."""
    renamed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if _BUFFERS.search(key):
            continue
        name = key
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        if name in renamed:
            raise CheckpointError(f"{folder}: the weights hold {name!r} twice, under different prefixes")
        if tensor.dtype == _BYTE:
            tensor = tensor.to(torch.float16)
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{folder}: {key} is {tensor.dtype}; floating-point weights of 16, 32 or 64 bits, and float8_e4m3fn, are "
                "supported"
            )
        renamed[name] = tensor
    for layer in range(config.num_layers):
        for packed, parts in _PACKED:
            for kind in ("weight", "bias"):
                names = [f"layers.{layer}.{part}.{kind}" for part in parts]
                if all(name in renamed for name in names):
                    pieces = [renamed.pop(name) for name in names]
                    shapes = sorted({tuple(piece.shape) for piece in pieces})
                    if len(shapes) > 1 or shapes == [()]:
                        raise CheckpointError(
                            f"{folder}: {', '.join(names)} have shapes {', '.join(map(str, shapes))}; they must be equal"
                        )
                    renamed[f"layers.{layer}.{packed}.{kind}"] = torch.cat(pieces)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in GTEModel(config).state_dict().items()}
    heads = {
        name: renamed.pop(name) for name in list(renamed) if name.startswith(("classifier.", "pooler.", "lm_head."))
    }
    missing, unexpected = sorted(expected.keys() - renamed.keys()), sorted(renamed.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            f"{folder}: the weights do not fit config.json; missing: {_some(missing)}; unexpected: {_some(unexpected)}"
        )
    for name, tensor in renamed.items():
        if tuple(tensor.shape) != expected[name]:
            raise CheckpointError(
                f"{folder}: {name} has shape {tuple(tensor.shape)}; config.json makes it {expected[name]}"
            )
    for name, tensor in {**renamed, **heads}.items():
        if not _is_finite(tensor):
            raise CheckpointError(f"{folder}: {name} holds NaN or infinite values; the file is damaged")
    return renamed, heads


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "none"


def _sparse_head(heads: dict[str, Tensor], config: GTEConfig, folder: Path) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """Return the sparse head, or None and the reason why there is none."""
    if any(name.startswith("pooler.") for name in heads):
        return None, (
            "it has a pooler (GTEReranker scores pairs with it): it is a reranker, whose classifier scores pairs and not tokens"
        )
    if "classifier.weight" not in heads:
        kind = "a masked language model" if any(name.startswith("lm_head.") for name in heads) else "dense only"
        return None, f"it has no classifier.weight: it is {kind}"
    weight, bias = heads["classifier.weight"], heads.get("classifier.bias", torch.zeros(1))
    if tuple(weight.shape) != (1, config.hidden_size) or tuple(bias.shape) != (1,):
        raise CheckpointError(
            f"{folder}: classifier.weight has shape {tuple(weight.shape)} and classifier.bias {tuple(bias.shape)}; "
            f"a sparse head has (1, {config.hidden_size}) and (1,)"
        )
    return (weight, bias), ""


def _rerank_head(
    heads: dict[str, Tensor], config: GTEConfig, folder: Path
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor] | None, str]:
    """Return the reranker's pooler and classifier, or None and the reason why there are none."""
    absent = [name for name in ("pooler.dense.weight", "classifier.weight") if name not in heads]
    if absent:
        return None, f"it has no {' and no '.join(absent)}"
    size, classifier_shape = config.hidden_size, tuple(heads["classifier.weight"].shape)
    if classifier_shape[:1] != (1,):
        return None, f"its classifier.weight has shape {classifier_shape}, and that of a reranker (1, {size})"
    fallback = {"pooler.dense.bias": torch.zeros(size), "classifier.bias": torch.zeros(1)}
    pooler, pooler_bias, classifier, classifier_bias = (heads.get(name, fallback.get(name)) for name in _RERANK_HEAD)
    assert pooler is not None
    assert pooler_bias is not None
    assert classifier is not None
    assert classifier_bias is not None
    head = (pooler, pooler_bias, classifier, classifier_bias)
    for name, tensor, shape in zip(_RERANK_HEAD, head, ((size, size), (size,), (1, size), (1,)), strict=True):
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{folder}: {name} has shape {tuple(tensor.shape)}; config.json makes it {shape}")
    return head, ""


def _native_names(checkpoint: Checkpoint) -> list[tuple[str, Tensor]]:
    """Return the parameters under the names `transformers` gives them."""
    named: list[tuple[str, Tensor]] = []
    for name, tensor in checkpoint.weights.items():
        prefix, _, kind = name.rpartition(".")
        for packed, parts in _PACKED:
            if prefix.endswith(packed):
                pieces = zip(parts, tensor.chunk(len(parts)), strict=True)
                named += [(f"{prefix.removesuffix(packed)}{part}.{kind}", piece) for part, piece in pieces]
                break
        else:
            named.append((name, tensor))
    renamed = []
    for name, tensor in named:
        name = re.sub(r"^(word_embeddings|token_type_embeddings)\.", r"embeddings.\1.", name)
        name = re.sub(r"^embeddings_ln\.", "embeddings.LayerNorm.", name).replace(".attention.", ".self_attn.")
        name = name.replace(".attn_ln.", ".post_attention_layernorm.").replace(".mlp_ln.", ".post_mlp_layernorm.")
        renamed.append((f"gte.{name}", tensor))
    if checkpoint.rerank_head:
        names = (f"gte.{name}" if name.startswith("pooler.") else name for name in _RERANK_HEAD)
        renamed += zip(names, checkpoint.rerank_head, strict=True)
    elif checkpoint.sparse_head:
        renamed += zip(("classifier.weight", "classifier.bias"), checkpoint.sparse_head, strict=True)
    return renamed
