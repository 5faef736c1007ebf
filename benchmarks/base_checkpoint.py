"""A checkpoint of the size of gte-multilingual-base with seeded random weights, so that speed can be measured anywhere.

12 layers of 768, 250,048 vocabulary rows, float16, the native layout. The tokenizer is the bundled model's Unigram tokenizer
with pieces added up to XLM-R's number. Random weights cost the same time as trained ones.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from gte_rag.checkpoint import BUNDLED

VOCABULARY, HIDDEN, LAYERS, FFN = 250_048, 768, 12, 3072
_PIECES = 250_000


def write(folder: str | os.PathLike[str]) -> Path:
    """Write the checkpoint unless it is there already, and return its folder."""
    target = Path(folder)
    if (target / "modules.json").is_file():  # written last
        return target
    target.mkdir(parents=True, exist_ok=True)
    bundled = BUNDLED["gte-mini"]
    tokenizer = json.loads((bundled / "tokenizer.json").read_text(encoding="utf-8"))
    pieces = tokenizer["model"]["vocab"]
    known, random = {piece for piece, _ in pieces}, np.random.default_rng(0)
    words = [piece for piece, _ in pieces[1000:]]
    lowest = min(score for _, score in pieces)
    while len(pieces) < _PIECES:
        left, right = (words[place] for place in random.integers(len(words), size=2))
        piece = left + right.lstrip("▁")
        if piece not in known and len(piece) < 16:
            known.add(piece)
            pieces.append([piece, lowest - 1.0])
    (target / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (target / "tokenizer_config.json").write_bytes((bundled / "tokenizer_config.json").read_bytes())
    config = json.loads((bundled / "config.json").read_text(encoding="utf-8"))
    config |= {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HIDDEN // 64,
        "intermediate_size": FFN,
        "max_position_embeddings": 8192,
        "dtype": "float16",
        "architectures": ["GteForTokenClassification"],
        "rope_parameters": {"rope_type": "linear", "rope_theta": 160000, "factor": 8.0 ** (2 / 64)},
    }
    config.pop("matryoshka_dimensions", None)
    config.pop("head_dim", None)
    (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.02).half()

    weights = {
        "gte.embeddings.word_embeddings.weight": normal(VOCABULARY, HIDDEN),
        "classifier.weight": normal(1, HIDDEN),
        "classifier.bias": normal(1),
    }
    if config.get("type_vocab_size", 1):
        weights["gte.embeddings.token_type_embeddings.weight"] = normal(config.get("type_vocab_size", 1), HIDDEN)
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (HIDDEN, HIDDEN),
        "self_attn.v_proj": (HIDDEN, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.up_proj": (FFN, HIDDEN),
        "mlp.gate_proj": (FFN, HIDDEN),
        "mlp.down_proj": (HIDDEN, FFN),
    }
    norms = ["gte.embeddings.LayerNorm"]
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"gte.layers.{layer}.{name}.weight"] = normal(*shape)
            if name not in ("mlp.up_proj", "mlp.gate_proj"):
                weights[f"gte.layers.{layer}.{name}.bias"] = normal(shape[0])
        norms += [f"gte.layers.{layer}.{name}" for name in ("post_attention_layernorm", "post_mlp_layernorm")]
    for name in norms:
        weights[f"{name}.weight"], weights[f"{name}.bias"] = 1 + normal(HIDDEN), normal(HIDDEN)
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    files = {
        "sentence_bert_config.json": {"max_seq_length": 8192, "do_lower_case": False},
        "1_Pooling/config.json": {"word_embedding_dimension": HIDDEN, "pooling_mode_cls_token": True},
        "modules.json": [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
            {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
        ],
    }
    for name, content in files.items():
        (target / name).parent.mkdir(exist_ok=True)
        (target / name).write_text(json.dumps(content), encoding="utf-8")
    return target


if __name__ == "__main__":
    sys.stdout.write(f"{write(sys.argv[1])}\n")
