"""An explanation adds up to the score, marks what matched, and shows untrusted text without obeying it."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gte_rag import GTEEncoder, explain, explain_hit
from gte_rag.cli import main
from gte_rag.explanation import Mark, TokenMatch, marked_html
from gte_rag.retriever import Hit

QUERY, TEXT = "What is ECONNREFUSED?", "ECONNREFUSED means that nothing listens on that port."
HOSTILE = "<script>alert(1)</script> ECONNREFUSED <img src=x onerror=alert(1)> \"'&\x1b[31m"


class Elements(HTMLParser):
    """Collects what a browser would see of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_score_is_that_of_score_pairs_and_products_add_up_to_the_sparse_score(encoder: GTEEncoder) -> None:
    explanation = explain(encoder, QUERY, TEXT, dense_weight=0.5, sparse_weight=0.25)
    expected = encoder.score_pairs([(QUERY, TEXT)], dense_weight=0.5, sparse_weight=0.25)[0]
    assert explanation.score == pytest.approx(expected, rel=1e-5)  # float32 sums in another order
    assert math.fsum(match.weight for match in explanation.matches) == pytest.approx(explanation.sparse_score)
    assert math.fsum(map(explanation.share, explanation.matches)) == pytest.approx(1)
    weights = [match.weight for match in explanation.matches]
    assert weights == sorted(weights, reverse=True)


def test_shared_word_is_marked_in_query_and_text(encoder: GTEEncoder) -> None:
    explanation = explain(encoder, QUERY, TEXT)
    for text, marks in ((QUERY, explanation.query_marks), (TEXT, explanation.text_marks)):
        assert "ECONNREFUSED" in [text[mark.start : mark.end] for mark in marks]
        assert all(0 < mark.share <= 1 for mark in marks)


def test_query_tokens_are_either_matched_or_unmatched(encoder: GTEEncoder) -> None:
    explanation = explain(encoder, QUERY, TEXT)
    queries = encoder.encode_queries([QUERY]).sparse
    assert queries is not None
    assert explanation.unmatched is not None
    assert len(explanation.matches) + len(explanation.unmatched) == len(queries[0])


def test_texts_without_a_shared_token_have_sparse_score_0(encoder: GTEEncoder) -> None:
    explanation = explain(encoder, "Brot", "北京")
    assert (explanation.matches, explanation.sparse_score, explanation.text_marks) == ((), 0.0, ())
    assert "share no token" in explanation.to_html()


def test_hit_is_explained_with_its_own_scores(encoder: GTEEncoder) -> None:
    match = TokenMatch("port", 2.0, 3.0)
    explanation = explain_hit(encoder, "port", Hit("1", "a port here", {}, 9.5, 0.5, 6.0, (match,)))
    assert (explanation.score, explanation.dense_score, explanation.sparse_score) == (9.5, 0.5, 6.0)
    assert explanation.share(match) == 1
    assert explanation.text_marks == (Mark(2, 6, 1.0),)


def test_page_shows_hostile_text_and_obeys_none_of_it(encoder: GTEEncoder) -> None:
    page = explain(encoder, f"ECONNREFUSED </title>{HOSTILE}", HOSTILE).to_html()
    elements = Elements(page)
    assert not {"script", "img", "a", "link", "iframe"} & set(elements.tags)
    assert not {name for name in elements.attributes if name.startswith("on") or name in ("src", "href")}
    assert "<script>alert(1)</script>" in elements.text
    assert "\x1b" not in page
    assert "default-src 'none'" in page
    assert "http:" not in page and "https:" not in page  # noqa: PT018


def test_marked_html_escapes_inside_and_outside_marks() -> None:
    found = Elements(marked_html("<b>&<i>", [Mark(3, 7, 1.0)]))
    assert (found.tags, found.text) == (["mark"], "<b>&<i>")


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf])
def test_impossible_weight_is_refused(encoder: GTEEncoder, weight: float) -> None:
    with pytest.raises(ValueError, match=r"sparse_weight is .*finite and not negative"):
        explain(encoder, "a", "b", sparse_weight=weight)


def test_command_prints_score_words_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", QUERY, TEXT + "\x1b[31m"]) == 0
    output = capsys.readouterr().out
    assert "dense" in output and "share" in output and "Only in the query" in output  # noqa: PT018
    assert "\x1b" not in output


def test_command_writes_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", QUERY, TEXT, "--json"]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert sum(match["product"] for match in explained["matches"]) == pytest.approx(explained["sparse_score"])


def test_command_writes_a_page_whole_or_not_at_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["explain", QUERY, TEXT, "--html", str(page)]) == 0
    assert "ECONNREFUSED" in page.read_text(encoding="utf-8")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert main(["explain", QUERY, TEXT, "--html", str(tmp_path / "absent" / "page.html")]) == 2
    assert "absent" in capsys.readouterr().err
