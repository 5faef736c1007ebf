"""Last stage: the finished run as a checkpoint in the native layout, its weights on a coarse grid.

A wheel deflates its files. float16 weights do not deflate: their low bytes are noise. Rounded to whole multiples of a step, at
most three significant bits each, every low byte is zero and a weight takes four to five bits, for a loss this stage prints.

    python training/export.py --start start.pt --state run/state.pt --out gte-mini/
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zlib
from pathlib import Path

import torch
from distil import DIMENSIONS
from grid import EMBEDDING_STEPS, STEPS, coarse, round_words
from student import FIRST, config_from
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import SPECIALS

from gte_rag.checkpoint import Checkpoint, save_checkpoint
from gte_rag.config import GTEConfig

TOKENIZER_CONFIG = {
    "backend": "tokenizers",
    "bos_token": "<s>",
    "cls_token": "<s>",
    "eos_token": "</s>",
    "model_max_length": 8192,
    "pad_token": "<pad>",
    "sep_token": "</s>",
    "tokenizer_class": "TokenizersBackend",
    "unk_token": "<unk>",
}


def deflated(folder: Path) -> int:
    """Return the bytes that a folder's files take in a wheel."""
    return sum(len(zlib.compress(path.read_bytes(), 6)) for path in folder.iterdir() if path.is_file())


def main() -> None:
    """Write the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--state", type=Path, help="state.pt of distil.py; without it, the start as it is")
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--steps", type=float, default=STEPS, help="of the grid of the layers, to a standard deviation")
    parser.add_argument(
        "--embedding-steps", type=float, default=EMBEDDING_STEPS, help="the same of the word embeddings"
    )
    parser.add_argument(
        "--sparse-scale", type=float, default=1.0, help="what the sparse weights are multiplied by: balance.py"
    )
    args = parser.parse_args()

    start = torch.load(args.start, weights_only=True)
    trained: dict[str, Tensor] = torch.load(args.state or args.start, weights_only=True)["weights"]
    head = (args.sparse_scale * trained.pop("classifier.weight"), args.sparse_scale * trained.pop("classifier.bias"))
    for number in range(start["shape"]["num_layers"]):
        # A pooling layer that was never trained has an MLP that says nothing: spare the wheel its noise.
        if not bool(trained[f"layers.{number}.mlp.down_proj.weight"].any()):
            trained[f"layers.{number}.mlp.up_gate_proj.weight"].zero_()
    noise = []
    for name, tensor in trained.items():
        if tensor.ndim == 2:
            if name == "word_embeddings.weight":
                trained[name] = round_words(tensor, start["weights"][name], args.embedding_steps)
                continue
            if name.startswith("layers.") and int(name.split(".")[1]) < FIRST:
                continue  # it is nearly empty
            trained[name] = coarse(tensor, args.steps)
            noise.append(float((trained[name] - tensor).norm() / tensor.norm().clamp(min=1e-9)))
    config: GTEConfig = config_from({**start["shape"], "matryoshka_dimensions": (64, *DIMENSIONS)})
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        tokenizer = Tokenizer.from_str(start["tokenizer"])
        tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
        (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG, indent=2) + "\n")
        checkpoint = Checkpoint(folder, config, tokenizer, frozenset(range(len(SPECIALS))), {}, trained, head, "")
        save_checkpoint(checkpoint, args.out, dtype=torch.float16, max_shard_bytes=90_000_000, bytes_where_exact=True)
    print(
        f"{args.out}: {deflated(args.out) / 1e6:.1f} MB deflated; a layer's matrix is rounded by at most {max(noise):.3f}"
    )


if __name__ == "__main__":
    main()
