"""Check what a wheel holds: the packages and the bundled model, no tests, and less than 40 MB."""

import sys
import zipfile
from pathlib import Path

REQUIRED = (
    "gte_rag/py.typed",
    "gte_rag/gte_mini/model.safetensors",
    "gte_rag/gte_mini/MODEL_CARD.md",
    "gte_rag/demo_data/documents.jsonl",
    "langchain_gte/py.typed",
    "llama_index/embeddings/gte/py.typed",
    "llama_index/retrievers/gte/py.typed",
    "llama_index/vector_stores/gte/py.typed",
)
# An __init__.py in these would hide llama_index.core.
FORBIDDEN = tuple(f"llama_index/{folder}__init__.py" for folder in ("", "embeddings/", "retrievers/", "vector_stores/"))
MAX_MEGABYTES = 40


def problems(wheel: Path) -> list[str]:
    """Return everything that is wrong with a wheel."""
    names = set(zipfile.ZipFile(wheel).namelist())
    found = [f"missing: {name}" for name in REQUIRED if name not in names]
    found += [f"must not be there: {name}" for name in FORBIDDEN if name in names]
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    found += [f"unexpected top level: {top}" for top in sorted(tops - {"gte_rag", "langchain_gte", "llama_index"})]
    megabytes = wheel.stat().st_size / 1e6
    if megabytes >= MAX_MEGABYTES:
        found.append(f"{megabytes:.1f} MB; the limit is {MAX_MEGABYTES}")
    return found


if __name__ == "__main__":
    path = Path(sys.argv[1])
    wrong = problems(path)
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB", *wrong, sep="\n")
    sys.exit(bool(wrong))
