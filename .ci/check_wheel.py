"""Check what a wheel and an sdist hold: the packages, the bundled model and the licence, nothing else, within 45 MB."""

import sys
import tarfile
import zipfile
from pathlib import Path

REQUIRED = (
    "gte_rag/py.typed",
    "gte_rag/gte_mini/config.json",
    "gte_rag/gte_mini/model.safetensors.index.json",
    "gte_rag/gte_mini/model-00001-of-00002.safetensors",
    "gte_rag/gte_mini/model-00002-of-00002.safetensors",
    "gte_rag/gte_mini/tokenizer.json",
    "gte_rag/gte_mini/MODEL_CARD.md",
    "gte_rag/demo_data/documents.jsonl",
    "langchain_gte/py.typed",
    "llama_index/embeddings/gte/py.typed",
    "llama_index/postprocessor/gte/py.typed",
    "llama_index/retrievers/gte/py.typed",
    "llama_index/sparse_embeddings/gte/py.typed",
    "llama_index/vector_stores/gte/py.typed",
)
# An __init__.py in these would hide llama_index.core.
FORBIDDEN = tuple(
    f"llama_index/{folder}__init__.py"
    for folder in ("", "embeddings/", "postprocessor/", "retrievers/", "sparse_embeddings/", "vector_stores/")
)
SOURCES = (
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "constraints.txt",
    "tests/conftest.py",
)
MAX_MEGABYTES = 45


def problems(wheel: Path) -> list[str]:
    """Return everything that is wrong with a wheel."""
    names = set(zipfile.ZipFile(wheel).namelist())
    found = [f"missing: {name}" for name in REQUIRED if name not in names]
    found += [f"must not be there: {name}" for name in FORBIDDEN if name in names]
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    found += [f"unexpected top level: {top}" for top in sorted(tops - {"gte_rag", "langchain_gte", "llama_index"})]
    found += [f"test or cache: {name}" for name in sorted(names) if "test_" in name or "__pycache__" in name]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        found.append("missing: the licence")
    return found + _too_large(wheel)


def sdist_problems(sdist: Path) -> list[str]:
    """Return everything that is wrong with a source distribution."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = (
        *SOURCES,
        *(name if name.startswith("gte_rag/") else f"integrations/{name}" for name in REQUIRED),
    )
    found = [f"missing: {name}" for name in wanted if name not in names]
    return found + [f"cache: {name}" for name in sorted(names) if "__pycache__" in name] + _too_large(sdist)


def differences(wheel: Path, other: Path) -> list[str]:
    """Return the files that two wheels do not have in common, or not with the same content."""
    contents = []
    for path in (wheel, other):
        archive = zipfile.ZipFile(path)
        contents.append({info.filename: info.CRC for info in archive.infolist()})
    return [f"differs: {name}" for name in sorted(dict(contents[0].items() ^ contents[1].items()))]


def _too_large(path: Path) -> list[str]:
    megabytes = path.stat().st_size / 1e6
    return [f"{megabytes:.1f} MB; the limit is {MAX_MEGABYTES}"] if megabytes >= MAX_MEGABYTES else []


if __name__ == "__main__":
    # A wheel; or a wheel from the tree, the sdist, and the wheel made from the sdist.
    paths = [Path(argument) for argument in sys.argv[1:]]
    wrong = problems(paths[0])
    if len(paths) == 3:
        wrong += sdist_problems(paths[1]) + problems(paths[2]) + differences(paths[0], paths[2])
    for path in paths:
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    sys.exit(bool(wrong))
