"""Why a text scores as it does for a query: the tokens both share, and what each adds. For terminal, HTML page and chatbot."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from gte_rag.encoder import GTEEncoder
from gte_rag.highlighting import weighted_spans
from gte_rag.interface import TextEncoder
from gte_rag.vectors import SparseVector

# A token that adds less than this share of the sparse score is not marked in a text: articles, commas, single letters.
_MARKED_SHARE = 0.03
# Characters that HTML does not allow, or that would reach a terminal by way of the clipboard.
_CONTROLS = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


@dataclass(frozen=True)
class TokenMatch:
    """A token that query and document share.

    Attributes:
        token: The token as text.
        query_weight: Its weight in the query.
        document_weight: Its weight in the document.
    """

    token: str
    query_weight: float
    document_weight: float

    @property
    def weight(self) -> float:
        """What the token adds to the sparse score."""
        return self.query_weight * self.document_weight


@dataclass(frozen=True)
class Mark:
    """A part of a text that matches.

    Attributes:
        start: Where it starts, in characters.
        end: Where it ends.
        share: The largest share of the sparse score, 0 to 1, among the matching tokens in it.
    """

    start: int
    end: int
    share: float


class Scored(Protocol):
    """What `explain_hit` needs of a hit; `gte_rag.Hit` has it."""

    @property
    def text(self) -> str: ...  # noqa: D102

    @property
    def score(self) -> float: ...  # noqa: D102

    @property
    def dense_score(self) -> float: ...  # noqa: D102

    @property
    def sparse_score(self) -> float: ...  # noqa: D102

    @property
    def matches(self) -> tuple[TokenMatch, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Explanation:
    """Why a text has its score for a query.

    Attributes:
        query: The query.
        text: The text.
        model: Name of the model.
        score: The hybrid score, or what a hit was ranked by.
        dense_score: Cosine of the dense vectors, -1 to 1.
        sparse_score: Sum over shared tokens of the products of their weights, 0 or more.
        dense_weight: Weight of the cosine in the hybrid score; None if the score is no such sum.
        sparse_weight: Weight of the sparse score in it; None if the score is no such sum.
        matches: The shared tokens, the one that adds most first.
        unmatched: Tokens of the query that the text lacks, with their weights, the largest first; None if not known.
        query_marks: Where the query shows the shared tokens.
        text_marks: Where the text shows them.
    """

    query: str
    text: str
    model: str
    score: float
    dense_score: float
    sparse_score: float
    dense_weight: float | None
    sparse_weight: float | None
    matches: tuple[TokenMatch, ...]
    unmatched: tuple[tuple[str, float], ...] | None
    query_marks: tuple[Mark, ...]
    text_marks: tuple[Mark, ...]

    def share(self, match: TokenMatch) -> float:
        """Return which part of the sparse score a match adds, 0 to 1."""
        return match.weight / self.sparse_score if self.sparse_score > 0 else 0.0

    @property
    def formula(self) -> str:
        """The score and how it comes about, in one line."""
        dense, sparse = f"dense {self.dense_score:.3f}", f"sparse {self.sparse_score:.3f}"
        if self.dense_weight is None or self.sparse_weight is None:
            return f"{self.score:.3f}, from {dense} and {sparse}"
        return f"{self.score:.3f} = {self.dense_weight:g} × {dense} + {self.sparse_weight:g} × {sparse}"

    def to_html(self) -> str:
        """Return a whole page for a browser, without script and without anything from elsewhere.

        Query, text, tokens and model name are escaped, and the page's policy allows nothing but its own style.
        """
        rows = "".join(
            f"<tr><th scope=row><bdi>{_escaped(shown_token(match.token))}</bdi><td>{match.query_weight:.3f}"
            f"<td>{match.document_weight:.3f}<td>{match.weight:.3f}<td>{self.share(match):.0%}"
            f'<td class=bar><meter min=0 max=1 value="{self.share(match):.4f}"></meter></tr>\n'
            for match in self.matches
        )
        table = (
            "<table>\n<caption>Shared tokens: query weight × text weight = product; together the sparse score</caption>\n"
            "<tr><th>token<th>query<th>text<th>product<th colspan=2>share of sparse</tr>\n" + rows + "</table>"
            if rows
            else "<p>Query and text share no token.</p>"
        )
        lacking = "".join(
            f"<li><bdi>{_escaped(shown_token(token))}</bdi> {weight:.3f}</li>" for token, weight in self.unmatched or ()
        )
        return _PAGE.format(
            title=_escaped(_shortened(self.query)),
            query=marked_html(self.query, self.query_marks),
            text=marked_html(self.text, self.text_marks),
            formula=_escaped(self.formula),
            model=_escaped(self.model),
            table=table,
            lacking=f"<h2>Only in the query</h2><ul class=tokens>{lacking}</ul>" if lacking else "",
        )


def explain(
    encoder: GTEEncoder, query: str, text: str, *, dense_weight: float = 1.0, sparse_weight: float = 0.3
) -> Explanation:
    """Score a text for a query and say which tokens make the sparse score.

    Args:
        encoder: A model with a sparse head.
        query: The question or search words.
        text: The document or passage.
        dense_weight: Weight of the cosine; the defaults are those of the model card's example.
        sparse_weight: Weight of the sparse score.

    Raises:
        TypeError: `query` or `text` is not a string, or a weight is not a number.
        ValueError: A text is not valid Unicode, or a weight is negative or not finite.
        CheckpointError: The model has no sparse head.
    """
    for name, weight in (("dense_weight", dense_weight), ("sparse_weight", sparse_weight)):
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            raise TypeError(f"{name} is {weight!r}; give a number")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"{name} is {weight}; it must be finite and not negative")
    queries, documents = encoder.encode_queries([query]), encoder.encode_documents([text])
    assert queries.dense is not None and documents.dense is not None  # noqa: PT018
    assert queries.sparse is not None and documents.sparse is not None  # noqa: PT018
    asked, held = queries.sparse[0], documents.sparse[0]
    matches = token_matches(encoder, asked, held)
    dense_score, sparse_score = (
        float(queries.dense[0] @ documents.dense[0]),
        math.fsum(match.weight for match in matches),
    )
    lacking = ~np.isin(asked.indices, held.indices)
    unmatched = zip(encoder.token_strings(asked.indices[lacking].tolist()), asked.values[lacking].tolist(), strict=True)
    return Explanation(
        query=query,
        text=text,
        model=encoder.name,
        score=dense_weight * dense_score + sparse_weight * sparse_score,
        dense_score=dense_score,
        sparse_score=sparse_score,
        dense_weight=float(dense_weight),
        sparse_weight=float(sparse_weight),
        matches=matches,
        unmatched=tuple(sorted(unmatched, key=lambda item: -item[1])),
        query_marks=_marks(encoder, query, matches, sparse_score),
        text_marks=_marks(encoder, text, matches, sparse_score),
    )


def explain_hit(encoder: GTEEncoder, query: str, hit: Scored) -> Explanation:
    """Explain a hit of a `HybridRetriever` with the scores it was ranked by; nothing is encoded again.

    Args:
        encoder: The model of the collection.
        query: The query that was searched.
        hit: The hit.
    """
    return Explanation(
        query=query,
        text=hit.text,
        model=encoder.name,
        score=hit.score,
        dense_score=hit.dense_score,
        sparse_score=hit.sparse_score,
        dense_weight=None,
        sparse_weight=None,
        matches=hit.matches,
        unmatched=None,
        query_marks=_marks(encoder, query, hit.matches, hit.sparse_score),
        text_marks=_marks(encoder, hit.text, hit.matches, hit.sparse_score),
    )


def token_matches(encoder: TextEncoder, query: SparseVector, document: SparseVector) -> tuple[TokenMatch, ...]:
    """Return the tokens that two sparse vectors share, the one that adds most to their product first."""
    shared, mine, theirs = np.intersect1d(query.indices, document.indices, assume_unique=True, return_indices=True)
    tokens = encoder.token_strings(shared.tolist())
    matches = map(TokenMatch, tokens, query.values[mine].tolist(), document.values[theirs].tolist())
    return tuple(sorted(matches, key=lambda match: -match.weight))


def marked_html(text: str, marks: Sequence[Mark]) -> str:
    """Return a text as HTML, escaped, its marks as ``<mark>``: the larger the share, the stronger the colour.

    Args:
        text: Any text; what looks like HTML in it is shown, not obeyed.
        marks: Parts of it, in order and apart from each other.
    """
    parts, place = [], 0
    strongest = max((mark.share for mark in marks), default=0.0)
    for mark in marks:
        strength = 0.25 + 0.6 * (mark.share / strongest if strongest else 0.0)
        parts += [
            _escaped(text[place : mark.start]),
            f'<mark style="background:rgba(255,190,0,{strength:.2f});color:inherit" '
            f'title="{mark.share:.0%} of the sparse score">{_escaped(text[mark.start : mark.end])}</mark>',
        ]
        place = mark.end
    return "".join([*parts, _escaped(text[place:])])


def shown_token(token: str) -> str:
    """Return a token as people can see it."""
    return token if token.strip() else "␣"


def _marks(encoder: GTEEncoder, text: str, matches: Sequence[TokenMatch], sparse_score: float) -> tuple[Mark, ...]:
    shares: dict[str, float] = {}
    for match in matches:
        if match.weight >= _MARKED_SHARE * sparse_score > 0:
            shares[match.token] = max(match.weight / sparse_score, shares.get(match.token, 0.0))
    return tuple(Mark(*span) for span in weighted_spans(encoder, text, shares))


def _escaped(text: str) -> str:
    return html.escape(text.translate(_CONTROLS))


def _shortened(text: str) -> str:
    return text if len(text) <= 60 else text[:59] + "…"


_PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem }}
h1 {{ font-size: 1.3rem; margin-bottom: .2rem }}
h2 {{ font-size: 1rem; margin: 1.5rem 0 .3rem }}
p.text {{ white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; margin: .3rem 0 }}
p.small {{ opacity: .7; margin: 0 }}
mark {{ border-radius: .2em; padding: 0 .1em }}
table {{ border-collapse: collapse; margin-top: 1.5rem }}
caption {{ text-align: start; opacity: .7; padding-bottom: .3rem }}
th, td {{ padding: .15rem .8rem .15rem 0; text-align: end; font-variant-numeric: tabular-nums }}
th:first-child {{ text-align: start }}
th {{ font-weight: 600; overflow-wrap: anywhere }}
meter {{ width: 8rem }}
ul.tokens {{ padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: 0 }}
</style>
</head>
<body>
<h1>{formula}</h1>
<p class=small>Model {model}. Marked: what query and text share; the stronger the colour, the more it adds.</p>
<h2>Query</h2>
<p class=text>{query}</p>
<h2>Text</h2>
<p class=text>{text}</p>
{table}
{lacking}
</body>
</html>
"""
