"""What the documents show is run: README's Python blocks, its marked commands and every file in examples/."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

from checkpoints import build, find_variant
from gte_rag import GTEReranker

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let a small random reranker stand in for the one that README names: there is none in the package."""
    folder = build(find_variant("multilingual-reranker"), tmp_path_factory.mktemp("reranker"))
    load = GTEReranker.from_pretrained
    monkeypatch.setattr(GTEReranker, "from_pretrained", lambda name: load(folder))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.strip().splitlines()[0][:40])
def test_readme_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


def test_readme_has_python_blocks_and_both_commands() -> None:
    assert len(BLOCKS) >= 5
    assert not re.findall(r"```py\n", README), "write ```python, so that the block is run"
    for name in ("demo", "test"):
        assert re.search(rf"<!-- command: {name} -->\n+```bash\n[^\n]+\n```", README), name


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_offline_and_prints_an_answer(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example.name])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_documents_name_no_path_of_a_machine_and_no_registry() -> None:
    tracked = [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), *EXAMPLES]
    for path in tracked:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(root|work|tmp)/|file:///", text), path


def test_readme_links_to_files_that_exist() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", README):
        assert (ROOT / target).exists(), target
