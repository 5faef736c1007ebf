"""What the documents show is run: Python blocks, marked commands, examples. Their links lead somewhere, and the site builds."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import build, find_variant
from gte_rag import GTEReranker

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
DOCUMENTS = (
    *PAGES,
    *(ROOT / name for name in ("CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "benchmarks/README.md")),
)
# ```python, and before it, if it cannot run here, <!-- skip: the reason -->
BLOCKS = [
    (page.relative_to(ROOT).as_posix(), *found.groups())
    for page in PAGES
    for found in re.finditer(
        r"(?:<!-- skip: ([^\n]+) -->\n+)?```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL
    )
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.fixture(autouse=True)
def _no_download(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let a small random reranker stand in for the one that the documents name: there is none in the package."""
    folder = build(find_variant("multilingual-reranker"), tmp_path_factory.mktemp("reranker"))
    load = GTEReranker.from_pretrained
    monkeypatch.setattr(GTEReranker, "from_pretrained", lambda name: load(folder))


@pytest.mark.usefixtures("bundled_once")
@pytest.mark.parametrize(
    ("page", "skipped", "block"),
    BLOCKS,
    ids=[f"{page}: {code.strip().splitlines()[0][:40]}" for page, _, code in BLOCKS],
)
def test_python_block_runs(
    page: str, skipped: str | None, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = compile(block, page, "exec")
    if skipped:
        pytest.skip(skipped)
    exec(code, {"__name__": "__main__"})


def test_readme_has_python_blocks_and_both_commands() -> None:
    assert len([page for page, _, _ in BLOCKS if page == "README.md"]) >= 5
    for page in PAGES:
        assert "```py\n" not in page.read_text(encoding="utf-8"), f"{page}: write ```python, so that the block is run"
    for name in ("demo", "test"):
        assert re.search(rf"<!-- command: {name} -->\n+```bash\n[^\n]+\n```", README), name


@pytest.mark.usefixtures("bundled_once")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_example_runs_offline_and_prints_an_answer(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [example.name])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


def test_documents_name_no_path_of_a_machine_and_no_registry() -> None:
    tracked = [
        *DOCUMENTS,
        *ROOT.glob("*.yml"),
        *ROOT.glob("*.cff"),
        *ROOT.glob("*.toml"),
        *ROOT.glob("*.txt"),
        *EXAMPLES,
    ]
    for path in tracked:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.])/(root|work|tmp)/|file:///", text), path


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files_and_headings_that_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


def test_the_threat_note_names_tests_that_exist() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)", (ROOT / "docs/security.md").read_text(encoding="utf-8"))
    assert len(named) >= 20
    assert [name for name in named if f"def {name}" not in tests] == []


def test_the_site_builds_without_warnings_and_asks_no_other_host(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the extra 'docs' is not installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for page in (tmp_path / "site").rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        fetched = re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//|<link[^>]+href=\"?(?:https?:)?//", html)
        assert not fetched, (page, fetched)
    for style in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", style.read_text(encoding="utf-8")), style
    reference = (tmp_path / "site/reference/encoder/index.html").read_text(encoding="utf-8")
    assert "encode_documents" in reference
    assert "_encode_window" not in reference, "the reference shows the public interface only"
