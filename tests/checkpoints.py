"""Small random checkpoints in every layout of the model family, and their oracle in ``transformers``.

`build` writes what a model repository would hold, with seeded weights: the same seed, shape and dtype give
the same network whatever the layout. `native_twin` rewrites a checkpoint for ``transformers`` and
`transformers_vectors` runs it there. Nothing here uses the package under test.
"""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

Layout = Literal["legacy", "legacy-bare", "legacy-unpacked", "native", "native-bare"]
Weights = dict[str, torch.Tensor]

VOCAB_SIZE = 640
"""Rows of the embedding table: more than either tokenizer has, as in the published models."""

LONG_TEXT = " ".join(
    f"Paragraph {number}: the capital of country {number} is the city where the government sits."
    for number in range(18)
)

TEXTS: tuple[str, ...] = (
    "what is the capital of China?",
    "how to implement quick sort in python?",
    "the cat and the dog and the bird",
    "",
    "北京",
    "中国的首都在哪儿",
    "Где находится столица Китая?",
    "ما هي عاصمة الصين؟",
    "Çà et là, déjà vu: naïve café",
    "line one\nline two\t tabbed",
    "🙂",
    LONG_TEXT,
)
"""Texts in several scripts: repeated words, nothing at all, only an unknown token, several hundred tokens."""

_NTK_FACTOR_64 = 8.0 ** (2 / 64)


@dataclass(frozen=True)
class Variant:
    """What distinguishes one checkpoint from another.

    Attributes:
        name: Unique name, fit for a folder.
        layout: Names and packing of the tensors; ``bare`` layouts lack the prefix of a head class.
        dtype: How the tensors are stored.
        theta: Rotary base.
        scaling: ``rope_scaling`` of a legacy layout, or what ``rope_parameters`` holds beside the base.
        type_vocab: Rows of the token-type table; 0 means that there is no table.
        tokenizer: ``xlmr`` (unigram, pad 1) or ``bert`` (lower-case word pieces, pad 0).
        head: Whether there is a classifier with one output: the sparse head, or with `pooler` a reranker's.
        shards: Number of weight files; above 1 with an index file.
        pooler: Whether there is a pooler in front of the classifier, as in a reranker.
        lm_head: Whether there is a masked-language-model head.
        hidden: Size of the hidden states.
        layers: Number of layers.
        heads: Number of attention heads.
        ffn: Size of the gated layer.
        custom_gte: Whether the legacy layout calls itself ``gte`` and writes switches as the string "true".
        query_prompt: Prompt of queries in ``config_sentence_transformers.json``; None leaves the file out.
        saved_limits: Whether ``tokenizer.json`` carries a truncation to 128 tokens and padding.
    """

    name: str
    layout: Layout = "legacy"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    theta: float = 20000
    scaling: dict[str, Any] | None = None
    type_vocab: Literal[0, 1, 2] = 1
    tokenizer: Literal["xlmr", "bert"] = "xlmr"
    head: bool = True
    shards: int = 1
    pooler: bool = False
    lm_head: bool = False
    hidden: int = 64
    layers: int = 2
    heads: int = 4
    ffn: int = 128
    custom_gte: bool = False
    query_prompt: str | None = None
    saved_limits: bool = False

    @property
    def native(self) -> bool:
        """Whether the layout is that of ``transformers``."""
        return self.layout.startswith("native")

    @property
    def mixed(self) -> bool:
        """Whether the rotary scaling is the mixed one, which ``transformers`` cannot express."""
        return self.scaling is not None and "mixed_b" in self.scaling


_NTK_8 = {"type": "ntk", "factor": 8.0}
_NTK_2 = {"type": "ntk", "factor": 2.0}

VARIANTS: tuple[Variant, ...] = (
    Variant("multilingual-base", dtype="float16", scaling=_NTK_8, hidden=128, heads=2),
    Variant(
        "multilingual-native",
        layout="native",
        dtype="float16",
        theta=160000,
        scaling={"rope_type": "linear", "factor": _NTK_FACTOR_64},
        hidden=128,
        heads=2,
    ),
    Variant("multilingual-mlm", theta=160000, head=False, lm_head=True),
    Variant("multilingual-reranker", dtype="float16", scaling=_NTK_8, pooler=True),
    Variant(
        "base-en",
        layout="legacy-bare",
        theta=500000,
        scaling=_NTK_2,
        type_vocab=0,
        tokenizer="bert",
        head=False,
        saved_limits=True,
    ),
    Variant(
        "large-en",
        layout="legacy-bare",
        theta=160000,
        scaling=_NTK_2,
        type_vocab=2,
        tokenizer="bert",
        head=False,
        hidden=96,
        layers=3,
        heads=3,
        ffn=160,
    ),
    Variant(
        "arctic",
        layout="legacy-bare",
        theta=160000,
        head=False,
        custom_gte=True,
        query_prompt="query: ",
    ),
    Variant("bare-with-head", layout="legacy-bare", scaling=_NTK_8, type_vocab=2),
    Variant("unpacked-bfloat16", layout="legacy-unpacked", dtype="bfloat16", scaling=_NTK_8),
    Variant("mixed-ntk", scaling={"type": "ntk", "factor": 8.0, "mixed_b": 0.625}),
    Variant("linear", theta=10000, scaling={"type": "linear", "factor": 4.0}, type_vocab=0),
    Variant("sharded", dtype="float16", scaling=_NTK_8, shards=3),
    Variant("native-default", layout="native", theta=160000, tokenizer="bert", type_vocab=2),
    Variant("native-bare", layout="native-bare", theta=500000, type_vocab=0, head=False),
    Variant(
        "native-sharded-bfloat16",
        layout="native",
        dtype="bfloat16",
        theta=160000,
        scaling={"rope_type": "linear", "factor": 1.5},
        shards=2,
    ),
)
"""One variant for each published configuration, and for each layout, dtype and scaling beyond those."""


def find_variant(name: str) -> Variant:
    """Finds a variant of `VARIANTS` by its name."""
    return next(candidate for candidate in VARIANTS if candidate.name == name)


def build(variant: Variant, folder: Path, *, seed: int = 0) -> Path:
    """Writes a checkpoint with random weights.

    Args:
        variant: What to write.
        folder: Where to; created if it does not exist.
        seed: Of the weights.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = _random_weights(variant, np.random.default_rng(seed))
    if not variant.native:
        weights = _legacy_names(weights, packed=variant.layout != "legacy-unpacked")
    if not variant.layout.endswith("bare"):
        weights = _with_prefix(weights, "gte." if variant.native else "new.")
    dtype = getattr(torch, variant.dtype)
    _save_weights({key: w.to(dtype) for key, w in weights.items()}, folder, variant.shards)
    config = _native_config(variant) if variant.native else _legacy_config(variant)
    _write_json(folder / "config.json", config)
    _save_tokenizer(variant, folder)
    if variant.query_prompt is not None:
        _write_json(
            folder / "config_sentence_transformers.json",
            {
                "prompts": {"query": variant.query_prompt},
                "default_prompt_name": None,
                "similarity_fn_name": "cosine",
            },
        )
    return folder


def read_config(folder: Path) -> dict[str, Any]:
    """Reads a checkpoint's ``config.json``."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def read_weights(folder: Path) -> dict[str, NDArray[np.float64]]:
    """Reads all tensors of a checkpoint, from one file or several, as float64."""
    return {key: w.to(torch.float64).numpy() for key, w in _load_tensors(folder).items()}


def token_ids(folder: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, special tokens included, neither truncated nor padded."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]


def special_ids(folder: Path) -> set[int]:
    """Ids that no sparse vector holds: those of the cls, sep, pad and unk tokens."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    names = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    names_to_ids = tokenizer.get_vocab()
    roles = ("cls_token", "sep_token", "pad_token", "unk_token")
    return {names_to_ids[names[role]] for role in roles}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


# Weights


def _random_weights(variant: Variant, rng: np.random.Generator) -> Weights:
    """Draws the network under native names without a prefix, the encoder before the heads."""
    weights: Weights = {}

    def draw(key: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> None:
        weights[key] = torch.from_numpy(rng.normal(mean, std, shape).astype(np.float32))

    def linear(name: str, rows: int, columns: int, *, bias: bool = True) -> None:
        draw(f"{name}.weight", rows, columns, std=columns**-0.5)
        if bias:
            draw(f"{name}.bias", rows)

    def layer_norm(name: str) -> None:
        draw(f"{name}.weight", variant.hidden, mean=1.0)
        draw(f"{name}.bias", variant.hidden)

    # Scales that keep the tokens of a text, and the texts, well apart; much sharper attention would only
    # magnify the rounding of float32.
    hidden, ffn = variant.hidden, variant.ffn
    draw("embeddings.word_embeddings.weight", VOCAB_SIZE, hidden, std=0.5)
    if variant.type_vocab:
        draw("embeddings.token_type_embeddings.weight", variant.type_vocab, hidden)
    layer_norm("embeddings.LayerNorm")
    for i in range(variant.layers):
        for projection in ("q_proj", "k_proj", "v_proj", "o_proj"):
            linear(f"layers.{i}.self_attn.{projection}", hidden, hidden)
        linear(f"layers.{i}.mlp.up_proj", ffn, hidden, bias=False)
        linear(f"layers.{i}.mlp.gate_proj", ffn, hidden, bias=False)
        linear(f"layers.{i}.mlp.down_proj", hidden, ffn)
        layer_norm(f"layers.{i}.post_attention_layernorm")
        layer_norm(f"layers.{i}.post_mlp_layernorm")
    if variant.head:
        linear("classifier", 1, hidden)
    if variant.pooler:
        linear("pooler.dense", hidden, hidden)
    if variant.lm_head:  # its decoder's weight is tied to the embeddings and not stored
        linear("lm_head.dense", hidden, hidden)
        layer_norm("lm_head.layer_norm")
        draw("lm_head.decoder.bias", VOCAB_SIZE)
    return weights


def _legacy_names(weights: Weights, *, packed: bool) -> Weights:
    """Renames and packs native tensors into the legacy layout."""
    legacy: Weights = {}
    for key, w in weights.items():
        if ".q_proj." in key and packed:
            parts = [weights[key.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")]
            key, w = key.replace("q_proj", "qkv_proj"), torch.cat(parts)
        elif (".k_proj." in key or ".v_proj." in key) and packed:
            continue
        elif ".up_proj." in key:
            w = torch.cat([w, weights[key.replace("up_proj", "gate_proj")]])
            key = key.replace("up_proj", "up_gate_proj")
        elif ".gate_proj." in key:
            continue
        for old, new in (
            ("layers.", "encoder.layer."),
            (".self_attn.", ".attention."),
            (".post_attention_layernorm.", ".attn_ln."),
            (".post_mlp_layernorm.", ".mlp_ln."),
            ("lm_head.layer_norm.", "lm_head.norm."),
        ):
            key = key.replace(old, new)
        legacy[key] = w
    return legacy


def _with_prefix(weights: Weights, prefix: str) -> Weights:
    heads = ("classifier.", "lm_head.")
    return {key if key.startswith(heads) else prefix + key: w for key, w in weights.items()}


def _save_weights(weights: Weights, folder: Path, shards: int) -> None:
    if shards == 1:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return
    keys = list(weights)
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        part = keys[shard::shards]
        save_file({key: weights[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, name))
    size = sum(w.numel() * w.element_size() for w in weights.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)


def _load_tensors(folder: Path) -> Weights:
    weights: Weights = {}
    for path in sorted(folder.glob("*.safetensors")):
        weights.update(load_file(path))
    return weights


# Configurations


def _shared_config(variant: Variant) -> dict[str, Any]:
    config: dict[str, Any] = {
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "hidden_size": variant.hidden,
        "initializer_range": 0.02,
        "intermediate_size": variant.ffn,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 8192,
        "num_attention_heads": variant.heads,
        "num_hidden_layers": variant.layers,
        "pad_token_id": 1 if variant.tokenizer == "xlmr" else 0,
        "type_vocab_size": variant.type_vocab,
        "vocab_size": VOCAB_SIZE,
    }
    if variant.head:
        config |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    return config


def _legacy_config(variant: Variant) -> dict[str, Any]:
    code = "hf_alibaba_nlp_gte" if variant.custom_gte else "new"
    prefix = "Gte" if variant.custom_gte else "New"
    return _shared_config(variant) | {
        "architectures": [prefix + _architecture(variant)],
        "auto_map": {
            "AutoConfig": f"configuration_{code}.{prefix}Config",
            "AutoModel": f"modeling_{code}.{prefix}Model",
        },
        "layer_norm_type": "layer_norm",
        "logn_attention_clip1": False,
        "logn_attention_scale": False,
        "model_type": "gte" if variant.custom_gte else "new",
        "pack_qkv": variant.layout != "legacy-unpacked",
        "position_embedding_type": "rope",
        "rope_scaling": variant.scaling,
        "rope_theta": variant.theta,
        "torch_dtype": variant.dtype,
        "transformers_version": "4.39.1",
        "unpad_inputs": "true" if variant.custom_gte else False,
        "use_memory_efficient_attention": "true" if variant.custom_gte else False,
    }


def _native_config(variant: Variant) -> dict[str, Any]:
    return _shared_config(variant) | {
        "architectures": ["Gte" + _architecture(variant)],
        "dtype": variant.dtype,
        "model_type": "gte",
        "rope_parameters": {"rope_theta": variant.theta, **(variant.scaling or {"rope_type": "default"})},
        "transformers_version": "5.23.0",
    }


def _architecture(variant: Variant) -> str:
    if variant.lm_head:
        return "ForMaskedLM"
    if variant.pooler:
        return "ForSequenceClassification"
    return "ForTokenClassification" if variant.head else "Model"


# Tokenizers

_CHARACTERS = (
    string.digits
    + string.ascii_letters
    + string.punctuation
    + "".join(chr(c) for c in range(0x00C0, 0x0100))  # accented Latin letters
    + "".join(chr(c) for c in range(0x0410, 0x0450))  # Cyrillic
    + "ёЁ"
    + "".join(chr(c) for c in range(0x0621, 0x063B))  # Arabic
    + "".join(chr(c) for c in range(0x0641, 0x064B))
    + "؟"
    + "北京中国的首都在哪儿快排算法介绍人大学日本語東"
)
_WORDS = """
the of and to in is what how where who when which not with for on as by at from quick sort python implement
capital country city china government paragraph cat dog bird line one two query search model text token
где находится столица китая
"""
_SUFFIXES = "the ing ed s er tion ment ly or ia ты ия 首都 中国 北京"


def _save_tokenizer(variant: Variant, folder: Path) -> None:
    tokenizer, names = _xlmr_tokenizer() if variant.tokenizer == "xlmr" else _bert_tokenizer()
    assert tokenizer.get_vocab_size() < VOCAB_SIZE
    if variant.saved_limits:
        tokenizer.enable_truncation(128)
        pad = names["pad_token"]
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {**names, "model_max_length": 8192, "tokenizer_class": "PreTrainedTokenizerFast"},
    )


def _xlmr_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [word for lower in _WORDS.split() for word in ("▁" + lower, "▁" + lower.capitalize())]
    pieces = list(dict.fromkeys([*words, *_SUFFIXES.split(), "▁", *_CHARACTERS]))
    scored = [(special, 0.0) for special in specials]
    # A piece costs more the later it comes, a single character more than any word.
    scored += [(piece, -(12.0 if len(piece) == 1 else 4.0) - 0.001 * i) for i, piece in enumerate(pieces)]
    scored.append(("<mask>", 0.0))
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=3, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")],
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    tokenizer.add_special_tokens([*specials, "<mask>"])
    return tokenizer, {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "mask_token": "<mask>",
        "pad_token": "<pad>",
        "sep_token": "</s>",
        "unk_token": "<unk>",
    }


def _bert_tokenizer() -> tuple[Tokenizer, dict[str, str]]:
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    unused = [f"[unused{i}]" for i in range(10)]  # only [PAD] comes before these in the published vocabulary
    characters = list(dict.fromkeys(_CHARACTERS.lower()))
    continuations = ["##" + piece for piece in (*_SUFFIXES.split(), *characters) if piece.isalnum()]
    pieces = [specials[0], *unused, *specials[1:], *_WORDS.split(), *characters, *continuations]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    tokenizer.add_special_tokens(specials)
    return tokenizer, {
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
        "pad_token": "[PAD]",
        "sep_token": "[SEP]",
        "unk_token": "[UNK]",
    }


# The oracle in transformers

_NATIVE_KEYS = """
attention_probs_dropout_prob classifier_dropout hidden_act hidden_dropout_prob hidden_size id2label
initializer_range intermediate_size label2id layer_norm_eps max_position_embeddings num_attention_heads
num_hidden_layers pad_token_id type_vocab_size vocab_size
"""


def native_twin(folder: Path, out: Path) -> Path:
    """Rewrites a checkpoint as native float32, for ``transformers`` to load.

    A masked-language-model head is left out; classifier, pooler and tokenizer stay.

    Args:
        folder: A checkpoint of any layout.
        out: Where to write; created if it does not exist.

    Returns:
        `out`.

    Raises:
        ValueError: The checkpoint's rotary scaling has no native counterpart (``mixed_b``).
    """
    out.mkdir(parents=True, exist_ok=True)
    config = read_config(folder)
    native: Weights = {}
    for key, w in _load_tensors(folder).items():
        key = key.removeprefix("new.").removeprefix("gte.")
        if not key.startswith("lm_head."):
            native |= _native_tensors(key, w.to(torch.float32))
    _save_weights({k: w.contiguous() for k, w in _with_prefix(native, "gte.").items()}, out, shards=1)

    twin = {key: value for key, value in config.items() if key in _NATIVE_KEYS.split()}
    if "pooler.dense.weight" in native:
        architecture = "GteForSequenceClassification"
    else:
        architecture = "GteForTokenClassification" if "classifier.weight" in native else "GteModel"
    twin |= {"architectures": [architecture], "dtype": "float32", "model_type": "gte"}
    twin["rope_parameters"] = config.get("rope_parameters") or _native_rope(config)
    _write_json(out / "config.json", twin)
    for name in ("tokenizer.json", "tokenizer_config.json", "config_sentence_transformers.json"):
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
    return out


def _native_tensors(key: str, w: torch.Tensor) -> Weights:
    """Splits and renames one tensor; a native one stays as it is."""
    names = [key]
    if ".qkv_proj." in key:
        names = [key.replace("qkv_proj", projection) for projection in ("q_proj", "k_proj", "v_proj")]
    elif ".up_gate_proj." in key:
        names = [key.replace("up_gate_proj", projection) for projection in ("up_proj", "gate_proj")]
    renamed = [
        name.replace("encoder.layer.", "layers.")
        .replace(".attention.", ".self_attn.")
        .replace(".attn_ln.", ".post_attention_layernorm.")
        .replace(".mlp_ln.", ".post_mlp_layernorm.")
        for name in names
    ]
    return dict(zip(renamed, w.chunk(len(names)), strict=True))


def _native_rope(config: dict[str, Any]) -> dict[str, Any]:
    theta, scaling = config["rope_theta"], config["rope_scaling"]
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    if scaling is None:
        return {"rope_type": "default", "rope_theta": theta}
    factor = scaling["factor"]
    if scaling["type"] == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": factor}
    if scaling["type"] == "ntk" and "mixed_b" not in scaling:
        return {"rope_type": "linear", "rope_theta": theta * factor, "factor": factor ** (2 / head_dim)}
    raise ValueError(f"rope_scaling is {scaling}; only plain 'ntk' and 'linear' have a native counterpart")


def transformers_vectors(
    native_folder: Path, token_id_lists: Sequence[Sequence[int]]
) -> tuple[list[NDArray[np.float32]], list[NDArray[np.float32]]]:
    """Encodes texts with ``transformers``, one at a time and without padding, in float32.

    Args:
        native_folder: A checkpoint of a native layout.
        token_id_lists: Token ids of each text, special tokens included.

    Returns:
        The unit dense vector of each text, shape (hidden_size,), and the weight of each of its tokens, at
        least 0, shape (n,). The second list is empty for a checkpoint without a classifier.
    """
    from transformers import GteModel
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # errors only: a classifier that the base model does not want is no news here
    try:
        loaded: Any = GteModel.from_pretrained(
            native_folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    finally:
        logging.set_verbosity(verbosity)
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{native_folder} does not fill the model: {report}")
    model.eval()
    tensors = _load_tensors(native_folder)
    dense: list[NDArray[np.float32]] = []
    weights: list[NDArray[np.float32]] = []
    with torch.inference_mode():
        for ids in token_id_lists:
            hidden = model(torch.tensor([list(ids)])).last_hidden_state[0]  # (n, hidden_size)
            dense.append(torch.nn.functional.normalize(hidden[0], dim=0).numpy())
            if "classifier.weight" in tensors:
                weight, bias = tensors["classifier.weight"].float(), tensors["classifier.bias"].float()
                weights.append(torch.nn.functional.linear(hidden, weight, bias)[:, 0].relu().numpy())
    return dense, weights


def transformers_scores(native_folder: Path, pairs: Sequence[tuple[str, str]], max_length: int) -> NDArray[np.float32]:
    """Score pairs as the reranker's model card does: with the tokenizer of ``transformers``, padded, in float32.

    Args:
        native_folder: A reranker of a native layout.
        pairs: Queries and texts.
        max_length: Longest pair in tokens.

    Returns:
        The logits, shape (number of pairs,).
    """
    from transformers import AutoTokenizer, GteForSequenceClassification

    tokenizer: Any = AutoTokenizer.from_pretrained(native_folder)
    loaded: Any = GteForSequenceClassification.from_pretrained(
        native_folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    model, report = loaded
    if report["missing_keys"] or report["mismatched_keys"]:
        raise ValueError(f"{native_folder} does not fill the model: {report}")
    model.eval()
    inputs = tokenizer(
        [list(pair) for pair in pairs],
        padding=True,
        truncation=True,
        max_length=max_length,
        return_token_type_ids=model.config.type_vocab_size > 1,  # as the tokenizer classes of BERT do, not of XLM-R
        return_tensors="pt",
    )
    with torch.inference_mode():
        scores: NDArray[np.float32] = model(**inputs).logits.view(-1).numpy()
    return scores
