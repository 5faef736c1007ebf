"""How good an encoder's vectors are on labelled data: retrieval, bitext mining and sentence similarity.

Scores are exact, over all passages, and need no database. Every text is encoded once, whatever is measured with its vectors:
a smaller dimension is the full vector, cut and then normalised. Retrieval is judged by trec_eval's measures through
``ir-measures``. `as_mteb` wraps an encoder for the tasks of MTEB.

    from gte_rag import GTEEncoder
    from gte_rag.datasets import load
    from gte_rag.evaluation import evaluate

    for result in evaluate(GTEEncoder.from_pretrained(), load("DATA/scifact"), modes=["dense", "union"], dimensions=[128, 256]):
        print(result, result.scores["ndcg@10"])
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gte_rag.datasets import BitextSet, Dataset, RetrievalSet, SimilaritySet
from gte_rag.errors import missing_extra
from gte_rag.exact import ExactSearch, best_rows, calibrate, cut, fused, score_rows, weighted_fusions
from gte_rag.fusion import FUSIONS, default_sparse_weight, opening
from gte_rag.results import Result
from gte_rag.vectors import Encoding, FloatArray

if TYPE_CHECKING:
    from mteb.models.model_meta import ModelMeta

MODES = ("dense", "sparse", "hybrid", "rescore", "union")

_MEASURES = {"ndcg@10": "nDCG@10", "recall@20": "R@20", "recall@100": "R@100", "mrr@10": "RR@10"}
_DEPTH = 100  # the deepest measure looks at so many passages
_CALIBRATION_QUERIES = 64  # as many as HybridRetriever.calibrate samples


class TextEncoder(Protocol):
    """What an encoder must have to be evaluated; `GTEEncoder` has it, and a wrapper of another model needs no more."""

    @property
    def name(self) -> str:
        """Name of the model."""

    @property
    def has_sparse(self) -> bool:
        """Whether there are sparse vectors."""

    def encode_queries(self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True) -> Encoding:
        """Encode queries."""

    def encode_documents(
        self, texts: Sequence[str], *, dense: bool = True, sparse: bool = True, show_progress: bool = False
    ) -> Encoding:
        """Encode passages."""


def evaluate(
    encoder: TextEncoder,
    dataset: Dataset,
    *,
    modes: Sequence[str] | None = None,
    dimensions: Sequence[int] | None = None,
    fusions: Sequence[str] = ("weighted",),
    dense_weight: float = 1.0,
    sparse_weight: float | None = None,
    candidates: int = 100,
    skip_same_id: bool = False,
    show_progress: bool = False,
) -> list[Result]:
    """Measure an encoder on a data set.

    For bitext, both sides are encoded as queries, and a sentence's translation is sought among all of the other side by cosine.
    For similarity, both sides are encoded as queries, and the cosine of each pair is correlated with the judgement. Both
    are dense, whatever `modes` says.

    Args:
        encoder: A `GTEEncoder`, or anything with the methods of `TextEncoder`.
        dataset: From `gte_rag.datasets.load`, or made in memory; ``dataset.sample(400)`` takes fewer queries.
        modes: How passages are found. ``"dense"`` and ``"sparse"``: by one score. ``"rescore"``: the `candidates` nearest
            dense vectors, by both scores. ``"union"``: these and the `candidates` best sparse scores, by both scores.
            ``"hybrid"``: the same passages, but a passage gets a score only from the list it is in, as from two engines: the
            paper's evaluation (arXiv:2407.19669, appendix). None: all that the encoder can do.
        dimensions: Lengths of the dense vectors, each at most what the encoder gives. None: that one.
        fusions: Names from `gte_rag.fusion.FUSIONS` for the modes with two scores; ``"calibrated"`` is calibrated on the
            passages, as `HybridRetriever.calibrate` does, before.
        dense_weight: Weight of the dense side.
        sparse_weight: Weight of the sparse side; None is 0.3 for ``"weighted"``, else 1. The paper takes 0.001 to 0.01.
        candidates: How many passages each side contributes to the modes with two scores.
        skip_same_id: Leave out of a query's ranking the passage with the query's own id, as for ArguAna and Quora.
        show_progress: Show a progress bar on stderr while passages are encoded.

    Returns:
        One result per mode, dimension and fusion, in this order; ``"sparse"`` has no dimension.

    Raises:
        MissingExtraError: ``ir-measures`` is not installed.
        ValueError: A mode, dimension, fusion, weight or number is out of range, or the encoder has no sparse vectors.
    """
    modes = _check_modes(modes, encoder, dataset)
    for fusion in fusions:
        if fusion not in FUSIONS:
            raise ValueError(f"fusion is {fusion!r}; available: {', '.join(map(repr, FUSIONS))}")
    if isinstance(candidates, bool) or not isinstance(candidates, int):
        raise TypeError(f"candidates is {candidates!r}; give a whole number")
    if candidates < 1:
        raise ValueError(f"candidates is {candidates}; it must be at least 1")
    weights = {
        fusion: (dense_weight, default_sparse_weight(fusion) if sparse_weight is None else sparse_weight)
        for fusion in fusions
    }
    for pair in weights.values():
        if not all(math.isfinite(weight) and weight >= 0 for weight in pair):
            raise ValueError(f"the weights are {pair}; they must be finite and not negative")
    if isinstance(dataset, BitextSet):
        return _evaluate_bitext(encoder, dataset, dimensions)
    if isinstance(dataset, SimilaritySet):
        return _evaluate_similarity(encoder, dataset, dimensions)
    return _evaluate_retrieval(
        encoder, dataset, modes, dimensions, weights, candidates, skip_same_id=skip_same_id, show_progress=show_progress
    )


def judge(
    rankings: Mapping[str, Sequence[str]], dataset: RetrievalSet
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Measure rankings that somebody made, by whatever means.

    Args:
        rankings: For each query id the ids of the passages found, best first, each once; 100 are enough.
        dataset: What is searched and judged.

    Returns:
        The means of `Result.scores` over all queries of the set, a query without ranking counting 0, and the value of
        each query by measure.

    Raises:
        MissingExtraError: ``ir-measures`` is not installed.
        ValueError: A passage is found twice for a query.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise missing_extra("ir-measures", "eval") from error
    # trec_eval is C and reads ids as C strings: it gets numbers instead of them.
    queries = {query: str(number) for number, query in enumerate(dataset.queries)}
    passages: dict[str, str] = {}
    for ids in (*rankings.values(), *dataset.qrels.values()):
        for passage in ids:
            passages.setdefault(passage, str(len(passages)))
    run = {}
    for query, ranking in rankings.items():
        if len(set(ranking)) < len(ranking):
            raise ValueError(f"a passage is found more than once for the query {query!r}; give each once")
        if query in queries:
            # Scores that fall by 1 keep our order of passages that tie: trec_eval would sort them by their ids.
            falling = range(len(ranking), 0, -1)
            run[queries[query]] = {
                passages[passage]: float(score) for passage, score in zip(ranking, falling, strict=True)
            }
    names = {ir_measures.parse_measure(theirs): ours for ours, theirs in _MEASURES.items()}
    per_query = {ours: dict.fromkeys(dataset.queries, 0.0) for ours in _MEASURES}
    qrels = {
        number: {passages[passage]: grade for passage, grade in dataset.qrels[query].items()}
        for query, number in queries.items()
    }
    given = {number: query for query, number in queries.items()}
    for metric in ir_measures.iter_calc(list(names), qrels, run):
        per_query[names[metric.measure]][given[metric.query_id]] = float(metric.value)
    return {name: float(np.mean(list(values.values()))) for name, values in per_query.items()}, per_query


def judged(rankings: Mapping[str, Sequence[str]], dataset: RetrievalSet, *, model: str, mode: str = "sparse") -> Result:
    """Return `judge`'s figures as a `Result`, for systems that are no `TextEncoder`, such as BM25."""
    scores, per_query = judge(rankings, dataset)
    sizes = (len(dataset.queries), len(dataset.corpus), 0)
    return Result(dataset.name, "retrieval", model, None, mode, None, None, None, None, None, *sizes, scores, per_query)


# --- retrieval ---------------------------------------------------------------------------------------------------------


def _evaluate_retrieval(
    encoder: TextEncoder,
    dataset: RetrievalSet,
    modes: Sequence[str],
    dimensions: Sequence[int] | None,
    weights: Mapping[str, tuple[float, float]],
    candidates: int,
    *,
    skip_same_id: bool,
    show_progress: bool,
) -> list[Result]:
    wants = {"dense": any(mode != "sparse" for mode in modes), "sparse": any(mode != "dense" for mode in modes)}
    two_scores = [mode for mode in modes if mode in ("hybrid", "rescore", "union")]
    ids = list(dataset.corpus)
    documents = encoder.encode_documents(list(dataset.corpus.values()), show_progress=show_progress, **wants)
    asked = encoder.encode_queries(list(dataset.queries.values()), **wants)
    pseudo: Encoding | None = None
    picked = [row * len(ids) // _CALIBRATION_QUERIES for row in range(_CALIBRATION_QUERIES)]
    picked = picked if len(ids) > _CALIBRATION_QUERIES else list(range(len(ids)))
    if two_scores and "calibrated" in weights:
        pseudo = encoder.encode_queries([opening(dataset.corpus[ids[row]]) for row in picked])
    row_of = {passage: row for row, passage in enumerate(ids)} if skip_same_id else {}
    own = [row_of.get(query, -1) for query in dataset.queries]
    depth = max(candidates, _DEPTH)
    lexical: list[NDArray[np.int64]] = []
    whole = ExactSearch(None, documents.sparse)
    if asked.sparse is not None:
        found = [whole.lexical(query, depth + 1)[0] for query in asked.sparse]
        lexical = [rows[rows != row][:depth] for rows, row in zip(found, own, strict=True)]

    def result(rankings: Sequence[NDArray[np.int64]], mode: str, dimension: int | None, fusion: str | None) -> Result:
        named = {query: [ids[row] for row in rows] for query, rows in zip(dataset.queries, rankings, strict=True)}
        scores, per_query = judge(named, dataset)
        weight = (None, None) if fusion is None else weights[fusion]
        return Result(
            dataset=dataset.name,
            task="retrieval",
            model=encoder.name,
            precision=getattr(encoder, "precision", None),
            mode=mode,
            dimension=dimension,
            fusion=fusion,
            dense_weight=weight[0],
            sparse_weight=weight[1],
            candidates=None if fusion is None else candidates,
            queries=len(dataset.queries),
            passages=len(ids),
            truncated=documents.truncated + asked.truncated,
            scores=scores,
            per_query=per_query,
        )

    results: dict[tuple[str, int | None, str | None], Result] = {}
    if "sparse" in modes:
        results["sparse", None, None] = result([rows[:_DEPTH] for rows in lexical], "sparse", None, None)
    for dimension in _check_dimensions(dimensions, documents) if documents.dense is not None else ():
        assert documents.dense is not None
        assert asked.dense is not None
        corpus = ExactSearch(cut(documents.dense, dimension), documents.sparse)
        fuse = weighted_fusions(weights, calibrate(corpus, pseudo, picked, candidates, dimension), two_scores)
        rankings: dict[tuple[str, str | None], list[NDArray[np.int64]]] = {}
        for place, scores in enumerate(score_rows(cut(asked.dense, dimension), corpus.dense)):
            if own[place] >= 0:
                scores[own[place]] = -np.inf
            nearest = best_rows(scores, depth)
            nearest = nearest[nearest != own[place]]
            if "dense" in modes:
                rankings.setdefault(("dense", None), []).append(nearest[:_DEPTH])
            if asked.sparse is None or not two_scores:
                continue
            pool = corpus.found(scores, nearest[:candidates], lexical[place][:candidates], asked.sparse[place])
            for mode in two_scores:
                for name, function in fuse.items():
                    rankings.setdefault((mode, name), []).append(fused(pool, mode, name, function)[0][:_DEPTH])
        for (mode, fusion), rows in rankings.items():
            results[mode, dimension, fusion] = result(rows, mode, dimension, fusion)
    return sorted(results.values(), key=lambda one: modes.index(one.mode))


# --- bitext and similarity ---------------------------------------------------------------------------------------------


def _evaluate_bitext(encoder: TextEncoder, dataset: BitextSet, dimensions: Sequence[int] | None) -> list[Result]:
    sources = encoder.encode_queries(list(dataset.sources), dense=True, sparse=False)
    targets = encoder.encode_queries(list(dataset.targets), dense=True, sparse=False)
    assert sources.dense is not None
    assert targets.dense is not None
    results = []
    for dimension in _check_dimensions(dimensions, sources):
        one, other = cut(sources.dense, dimension), cut(targets.dense, dimension)
        scores: dict[str, float] = {}
        per_query: dict[str, dict[str, float]] = {}
        for suffix, queries, sought, texts in (
            ("", one, other, dataset.targets),
            ("_back", other, one, dataset.sources),
        ):
            nearest = np.array([int(row.argmax()) for row in score_rows(queries, sought)])
            right, f1 = _translations(nearest, texts)
            scores |= {f"f1{suffix}": float(f1.mean()), f"accuracy{suffix}": float(right.mean())}
            per_query[f"accuracy{suffix}"] = {str(row): float(value) for row, value in enumerate(right)}
            per_query[f"f1{suffix}"] = {str(row): float(value) for row, value in enumerate(f1)}
        truncated = sources.truncated + targets.truncated
        results.append(_dense_result(encoder, dataset, "bitext", dimension, truncated, scores, per_query))
    return results


def _translations(nearest: NDArray[np.int64], texts: Sequence[str]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return for each pair whether the right text was found, and that text's F1 as a class.

    The mean of the latter is what MTEB's Tatoeba reports: the mean over texts, weighted by how often each is right. Texts
    that are equal are one class: either is right.
    """
    classes = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    gold = np.array([classes[text] for text in texts])
    found = gold[nearest]
    right = found == gold
    count = len(classes)
    hits = np.bincount(gold[right], minlength=count)
    f1 = 2 * hits / (np.bincount(gold, minlength=count) + np.bincount(found, minlength=count))
    return right, f1[gold]


def _evaluate_similarity(
    encoder: TextEncoder, dataset: SimilaritySet, dimensions: Sequence[int] | None
) -> list[Result]:
    firsts = encoder.encode_queries(list(dataset.firsts), dense=True, sparse=False)
    seconds = encoder.encode_queries(list(dataset.seconds), dense=True, sparse=False)
    assert firsts.dense is not None
    assert seconds.dense is not None
    results = []
    for dimension in _check_dimensions(dimensions, firsts):
        cosines = np.einsum("nd,nd->n", cut(firsts.dense, dimension), cut(seconds.dense, dimension)).astype(np.float64)
        gold = np.array(dataset.scores, dtype=np.float64)
        scores = {"spearman": _correlation(ranks(cosines), ranks(gold)), "pearson": _correlation(cosines, gold)}
        truncated = firsts.truncated + seconds.truncated
        results.append(_dense_result(encoder, dataset, "similarity", dimension, truncated, scores, {}))
    return results


def ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the rank of each value from 1; equal values share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    averages: NDArray[np.float64] = (last - (counts - 1) / 2)[place]
    return averages


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """Return Pearson's correlation; 0 if one side never differs."""
    one, other = one - one.mean(), other - other.mean()
    size = math.sqrt(float(one @ one) * float(other @ other))
    return float(one @ other) / size if size else 0.0


def _dense_result(
    encoder: TextEncoder,
    dataset: BitextSet | SimilaritySet,
    task: str,
    dimension: int,
    truncated: int,
    scores: Mapping[str, float],
    per_query: Mapping[str, Mapping[str, float]],
) -> Result:
    precision = getattr(encoder, "precision", None)
    sizes = (len(dataset), 0, truncated)
    names = (dataset.name, task, encoder.name, precision, "dense", dimension)
    return Result(*names, None, None, None, None, *sizes, scores, per_query)


def _check_modes(modes: Sequence[str] | None, encoder: TextEncoder, dataset: Dataset) -> list[str]:
    if isinstance(modes, str):
        raise TypeError(f"modes is the string {modes!r}; give a list of names")
    if modes is None:
        return list(MODES) if encoder.has_sparse else ["dense"]
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; available: {', '.join(map(repr, MODES))}")
    sparse = [mode for mode in modes if mode != "dense"]
    if sparse and not encoder.has_sparse and isinstance(dataset, RetrievalSet):
        raise ValueError(f"{encoder.name} has no sparse vectors; mode {sparse[0]!r} needs them, 'dense' does not")
    return list(dict.fromkeys(modes))


def _check_dimensions(dimensions: Sequence[int] | None, encoding: Encoding) -> list[int]:
    assert encoding.dense is not None
    width = encoding.dense.shape[1]
    if dimensions is None:
        return [width]
    for dimension in dimensions:
        if isinstance(dimension, bool) or not isinstance(dimension, int):
            raise TypeError(f"dimension is {dimension!r}; give a whole number up to {width}")
        if not 1 <= dimension <= width:
            raise ValueError(f"dimension is {dimension}; this encoder gives vectors of {width}, which can only be cut")
    return list(dict.fromkeys(dimensions))


# --- MTEB --------------------------------------------------------------------------------------------------------------


def as_mteb(
    encoder: TextEncoder,
    *,
    mode: str = "dense",
    dimension: int | None = None,
    fusion: str = "weighted",
    dense_weight: float = 1.0,
    sparse_weight: float | None = None,
    candidates: int = 100,
) -> MTEBEncoder:
    """Wrap an encoder for MTEB 2, whose tasks include MIRACL, MLDR, MKQA and BEIR.

        import mteb

        model = as_mteb(GTEEncoder.from_pretrained("Alibaba-NLP/gte-multilingual-base"), mode="hybrid", sparse_weight=0.01)
        mteb.evaluate(model, mteb.get_tasks(tasks=["MIRACLRetrievalHardNegatives"]))

    Queries and passages are encoded as such; the texts of all other tasks as passages, without a query prompt. Nothing is
    fetched here; MTEB fetches the data of the tasks it is given.

    Args:
        encoder: A `GTEEncoder`, or anything with the methods of `TextEncoder`.
        mode: ``"dense"`` for every task of MTEB. Another of `MODES` lets retrieval and reranking use sparse scores;
            tasks that need vectors get the dense ones all the same.
        dimension: Length of the dense vectors; None is what the encoder gives.
        fusion: As for `evaluate`.
        dense_weight: As for `evaluate`.
        sparse_weight: As for `evaluate`.
        candidates: As for `evaluate`; at least as many as MTEB asks for are taken.

    Returns:
        A model for ``mteb.evaluate``.

    Raises:
        MissingExtraError: ``mteb`` is not installed.
        ValueError: `mode` or `fusion` is unknown, or the encoder has no sparse vectors.
    """
    try:
        from mteb.models.model_meta import ModelMeta, ScoringFunction
    except ImportError as error:
        raise missing_extra("mteb", "eval") from error
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; available: {', '.join(map(repr, MODES))}")
    if fusion not in FUSIONS:
        raise ValueError(f"fusion is {fusion!r}; available: {', '.join(map(repr, FUSIONS))}")
    if mode != "dense" and not encoder.has_sparse:
        raise ValueError(f"{encoder.name} has no sparse vectors; mode {mode!r} needs them, 'dense' does not")
    sparse_weight = default_sparse_weight(fusion) if sparse_weight is None else sparse_weight
    search: dict[str, Any] = {"mode": mode, "dimension": dimension}
    if mode not in ("dense", "sparse"):
        search |= {"fusion": fusion, "dense_weight": dense_weight, "sparse_weight": sparse_weight}
        search |= {"candidates": candidates}
    name = encoder.name if encoder.name.count("/") == 1 and not os.path.exists(encoder.name) else None
    config = getattr(encoder, "config", None)
    meta = ModelMeta(
        loader=None,
        name=name or f"gte-rag/{os.path.basename(os.path.normpath(encoder.name))}",
        revision=getattr(encoder, "fingerprint", None),
        release_date=None,
        languages=None,
        n_parameters=getattr(encoder, "num_parameters", None),
        memory_usage_mb=None,
        max_tokens=getattr(encoder, "max_length", None),
        embed_dim=dimension or getattr(config, "hidden_size", None),
        license=None,
        open_weights=None,
        public_training_code=None,
        public_training_data=None,
        framework=["PyTorch"],
        similarity_fn_name=ScoringFunction("cosine"),
        use_instructions=bool(getattr(encoder, "query_prompt", "")),
        training_datasets=None,
        experiment_kwargs={key: value for key, value in search.items() if value is not None},
    )
    if mode == "dense":
        return MTEBEncoder(encoder, meta, dimension)
    return MTEBSearch(encoder, meta, dimension, mode, fusion, (dense_weight, sparse_weight), candidates)


class MTEBEncoder:
    """An encoder with the methods of MTEB's ``EncoderProtocol``; made by `as_mteb`.

    Attributes:
        mteb_model_meta: What MTEB writes down about the model.
    """

    def __init__(self, encoder: TextEncoder, meta: ModelMeta, dimension: int | None) -> None:
        self.mteb_model_meta = meta
        self._encoder = encoder
        self._dimension = dimension

    def encode(
        self,
        inputs: Iterable[Mapping[str, Any]],
        *,
        task_metadata: object,
        hf_split: str,
        hf_subset: str,
        prompt_type: object = None,
        **options: Any,  # noqa: ANN401  # MTEB passes batch sizes and the like, and more with each version
    ) -> FloatArray:
        """Return dense vectors of all texts of the batches: unit length, float32, shape (texts, dimension)."""
        texts = [text for batch in inputs for text in batch["text"]]
        encode = self._encoder.encode_queries if prompt_type == "query" else self._encoder.encode_documents
        encoding = encode(texts, dense=True, sparse=False)
        assert encoding.dense is not None
        return cut(
            encoding.dense, _check_dimensions(None if self._dimension is None else [self._dimension], encoding)[0]
        )

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Any:  # noqa: ANN401  # MTEB's arrays: numpy or torch
        """Return the cosine of each of one with each of the other."""
        from mteb.similarity_functions import cos_sim

        return cos_sim(embeddings1, embeddings2)

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Any:  # noqa: ANN401
        """Return the cosine of each pair."""
        from mteb.similarity_functions import pairwise_cos_sim

        return pairwise_cos_sim(embeddings1, embeddings2)


class MTEBSearch(MTEBEncoder):
    """The same with the methods of MTEB's ``SearchProtocol``: retrieval by sparse or by both scores."""

    def __init__(
        self,
        encoder: TextEncoder,
        meta: ModelMeta,
        dimension: int | None,
        mode: str,
        fusion: str,
        weights: tuple[float, float],
        candidates: int,
    ) -> None:
        super().__init__(encoder, meta, dimension)
        self._mode, self._fusion, self._weights, self._candidates = mode, fusion, weights, candidates
        self._ids: list[str] = []
        self._corpus: ExactSearch | None = None

    def index(
        self,
        corpus: Iterable[Mapping[str, Any]],
        *,
        task_metadata: object,
        hf_split: str,
        hf_subset: str,
        encode_kwargs: Mapping[str, Any],
        num_proc: int | None = None,
        **options: Any,  # noqa: ANN401
    ) -> None:
        """Encode the passages and keep them in memory, in place of those of the task before."""
        rows = list(corpus)
        texts = [f"{row.get('title') or ''} {row['text']}".strip() for row in rows]
        encoding = self._encoder.encode_documents(texts)
        assert encoding.dense is not None
        width = _check_dimensions(None if self._dimension is None else [self._dimension], encoding)[0]
        self._ids = [row["id"] for row in rows]
        self._corpus = ExactSearch(cut(encoding.dense, width), encoding.sparse)
        calibration = None
        if self._mode != "sparse" and self._fusion == "calibrated":
            count = min(_CALIBRATION_QUERIES, len(texts))
            picked = [number * len(texts) // count for number in range(count)]
            pseudo = self._encoder.encode_queries([opening(texts[row]) for row in picked])
            calibration = calibrate(self._corpus, pseudo, picked, self._candidates, width)
        two_scores = [] if self._mode == "sparse" else [self._mode]
        self._fuse = weighted_fusions({self._fusion: self._weights}, calibration, two_scores).get(self._fusion)

    def search(
        self,
        queries: Iterable[Mapping[str, Any]],
        *,
        task_metadata: object,
        hf_split: str,
        hf_subset: str,
        top_k: int,
        encode_kwargs: Mapping[str, Any],
        top_ranked: Mapping[str, Sequence[str]] | None = None,
        num_proc: int | None = None,
        **options: Any,  # noqa: ANN401
    ) -> dict[str, dict[str, float]]:
        """Return the ids and scores of the best `top_k` passages of each query; of `top_ranked` ones where they are given.

        Raises:
            TypeError: A query is a conversation, not a text.
        """
        assert self._corpus is not None
        rows = list(queries)
        texts = [
            f"{row['text']} {row.get('instruction') or ''}".strip() for row in rows if isinstance(row["text"], str)
        ]
        if len(texts) < len(rows):
            raise TypeError("a query is a conversation; this model searches with texts")
        asked = self._encoder.encode_queries(texts)
        assert asked.dense is not None
        assert asked.sparse is not None
        assert self._corpus.dense is not None
        row_of = {passage: row for row, passage in enumerate(self._ids)} if top_ranked is not None else {}
        depth = max(self._candidates, top_k)
        answers: dict[str, dict[str, float]] = {}
        dense = cut(asked.dense, self._corpus.dense.shape[1])
        for row, scores, sparse in zip(rows, score_rows(dense, self._corpus.dense), asked.sparse, strict=True):
            if top_ranked is None:
                lexical, lexical_scores = self._corpus.lexical(sparse, depth)
                found = self._corpus.found(scores, best_rows(scores, depth), lexical, sparse)
            else:
                allowed = np.array([row_of[passage] for passage in top_ranked[row["id"]]], dtype=np.int64)
                found = self._corpus.found(scores, allowed, allowed, sparse)
                order = np.argsort(-found.sparse, kind="stable")
                lexical, lexical_scores = found.rows[order], found.sparse[order]
            if self._fuse is None:
                best, values = lexical, lexical_scores
            else:
                best, values = fused(found, self._mode, self._fusion, self._fuse)
            pairs = zip(best[:top_k].tolist(), values[:top_k].tolist(), strict=True)
            answers[row["id"]] = {self._ids[place]: score for place, score in pairs}
        return answers
