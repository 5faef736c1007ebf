"""The code is laid out as CONTRIBUTING.md says: imports point one way, optional packages stay optional."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A module of gte_rag imports only from modules above it.
LAYERS = (
    "errors",
    "vectors",
    "config",
    "tokenization",
    "interface",
    "service",
    "remote",
    "model",
    "precision",
    "kernels",
    "instructions",
    "few_rows",
    "fused",
    "heads",
    "modelscope",
    "checkpoint",
    "encoder",
    "reranker",
    "highlighting",
    "explanation",
    "shared",
    "fusion",
    "tuning",
    "lexical",
    "lexical_view",
    "records",
    "segments",
    "chroma",
    "neighbours",
    "repair",
    "embedding_functions",
    "retriever",
    "reranking",
    "indexing",
    "demo",
    "datasets",
    "results",
    "exact",
    "evaluation",
    "corpus",
    "sinks",
    "cluster",
    "distributed",
    "cli",
    "__main__",
)
# Kinds of adapters under integrations/llama_index.
ADAPTERS = ("embeddings", "postprocessor", "retrievers", "sparse_embeddings", "vector_stores")
# Optional packages and the only modules of gte_rag that may import them.
OPTIONAL = {
    "ir_measures": {"evaluation"},
    "mteb": {"evaluation"},
    "httpx": {"service", "sinks"},
    "chromadb": {"segments", "chroma", "repair", "embedding_functions", "demo", "sinks", "cli"},
    "modelscope_hub": {"modelscope"},
    "pyarrow": {"corpus", "sinks", "distributed"},
    "pymilvus": {"sinks"},
    "qdrant_client": {"sinks"},
    "ray": {"cluster"},
    "llvmlite": {"instructions"},
    "numba": {"kernels", "instructions"},
    "rich": {"cli"},
    "semantic_text_splitter": {"indexing"},
    "transformers": set(),
    "langchain_core": set(),
    "llama_index": set(),
}


def imported(path: Path) -> set[str]:
    """Return the full names of all modules that a file imports, at its top or inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_every_module_has_its_place_in_the_layers() -> None:
    modules = {path.stem for path in (ROOT / "gte_rag").glob("*.py")} - {"__init__"}
    assert modules == set(LAYERS)


@pytest.mark.parametrize("module", LAYERS)
def test_imports_point_upwards_only(module: str) -> None:
    own = {name.split(".")[1] for name in imported(ROOT / "gte_rag" / f"{module}.py") if name.startswith("gte_rag.")}
    assert own <= set(LAYERS[: LAYERS.index(module)])


@pytest.mark.parametrize("module", LAYERS)
def test_optional_packages_are_imported_only_where_they_belong(module: str) -> None:
    tops = {name.split(".")[0] for name in imported(ROOT / "gte_rag" / f"{module}.py")}
    assert {package for package in tops & OPTIONAL.keys() if module not in OPTIONAL[package]} == set()
    assert "langchain_gte" not in tops


def test_importing_the_package_loads_neither_torch_nor_chroma() -> None:
    code = "import sys, gte_rag; assert gte_rag.__version__; print(sorted({'torch', 'chromadb'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


def test_no_pickle_and_no_remote_code() -> None:
    for path in (*(ROOT / "gte_rag").rglob("*.py"), *(ROOT / "integrations").rglob("*.py")):
        tops = {name.split(".")[0] for name in imported(path)}
        assert not tops & {"pickle", "dill", "joblib", "cloudpickle"}, path
        assert "torch.load(" not in path.read_text(encoding="utf-8"), path


def test_namespace_packages_have_no_init() -> None:
    for folder in ("llama_index", *(f"llama_index/{name}" for name in ADAPTERS)):
        assert not (ROOT / "integrations" / folder / "__init__.py").exists()


def test_every_import_package_is_typed() -> None:
    packages = ("gte_rag", "integrations/langchain_gte", *(f"integrations/llama_index/{name}/gte" for name in ADAPTERS))
    for package in packages:
        assert (ROOT / package / "py.typed").is_file(), package


@pytest.mark.parametrize(
    ("module", "framework", "extra"),
    [
        ("langchain_gte", "langchain_core", "langchain"),
        ("langchain_gte.milvus", "langchain_milvus", "langchain-milvus"),
        ("langchain_gte.qdrant", "langchain_qdrant", "langchain-qdrant"),
        ("llama_index.embeddings.gte", "llama_index.core", "llama-index"),
        ("llama_index.postprocessor.gte", "llama_index.core", "llama-index"),
        ("llama_index.retrievers.gte", "llama_index.core", "llama-index"),
        ("llama_index.sparse_embeddings.gte", "llama_index.core", "llama-index"),
        ("llama_index.sparse_embeddings.gte.milvus", "llama_index.vector_stores.milvus", "llama-index-milvus"),
        ("llama_index.vector_stores.gte", "llama_index.core", "llama-index"),
    ],
)
def test_a_missing_framework_is_named_with_its_extra(module: str, framework: str, extra: str) -> None:
    code = f"import sys; sys.modules[{framework!r}] = None; import {module}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stderr.splitlines()[-1].startswith("gte_rag.errors.MissingExtraError")
    assert f"pip install 'gte-rag[{extra}]'" in result.stderr


def test_the_version_has_one_place() -> None:
    import gte_rag

    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version\s*=", project, flags=re.MULTILINE)
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:(?:a|b|rc|\.dev)\d+)?", gte_rag.__version__)
    assert metadata.version("gte-rag") == gte_rag.__version__, "install the package anew: pip install -e ."
    command = [sys.executable, "-m", "gte_rag", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["gte-rag", gte_rag.__version__]
    for name in ("README.md", "CITATION.cff", "mkdocs.yml"):
        assert gte_rag.__version__ not in (ROOT / name).read_text(encoding="utf-8"), f"{name} repeats the version"
