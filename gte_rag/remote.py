"""Encoders and a reranker that ask a service: the model family's cloud API (DashScope), or a server of your own.

Nothing is sent before a text is encoded, and nothing but the texts, the model's name and the options. The key goes into the
``Authorization`` header of requests to `base_url` and nowhere else: not into a representation, an error, a log or a pickle.

The cloud protocol is that of the service's reference ("text-embedding-synchronous-api", "text-rerank-api"); a server of your
own speaks OpenAI's ``/v1/embeddings``.
"""

from __future__ import annotations

import hashlib
import math
import threading
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from gte_rag.errors import CheckpointError, RemoteError
from gte_rag.interface import PROGRESS_DELAY_S, TextEncoder, TextReranker
from gte_rag.service import Key, Service
from gte_rag.tokenization import check_pairs, check_texts
from gte_rag.vectors import Encoding, FloatArray, SparseMatrix, SparseVector

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DASHSCOPE_URL = "https://dashscope.aliyuncs.com/api/v1"
DASHSCOPE_KEY = "DASHSCOPE_API_KEY"

# A service names no vocabulary size; its token ids are whole numbers that fit a SparseVector.
_VOCAB_SIZE = int(np.iinfo(np.int32).max)


class _Model(NamedTuple):
    """What the service's reference says of a model; the first dimension is the service's default."""

    dimensions: tuple[int, ...]
    batch_size: int
    max_length: int
    has_sparse: bool


_MODELS = {
    "text-embedding-v1": _Model((1536,), 25, 2048, False),
    "text-embedding-v2": _Model((1536,), 25, 2048, False),
    "text-embedding-v3": _Model((1024, 768, 512, 256, 128, 64), 10, 8192, True),
    "text-embedding-v4": _Model((1024, 2048, 1536, 768, 512, 256, 128, 64), 10, 8192, True),
}
# Documents of a rerank request, and its tokens: those of the documents plus those of the query for each document.
_RERANK_DOCUMENTS, _RERANK_TOKENS, _RERANK_LENGTH = 500, 30_000, 4_000


class _Asked(NamedTuple):
    """What a call wants of every text; `stop` is set once it wants nothing any more."""

    queries: bool
    dense: bool
    sparse: bool
    dimension: int
    stop: threading.Event


class _Vectors(NamedTuple):
    """What a service gave for one text."""

    dense: FloatArray | None
    sparse: SparseVector | None


def _check_count(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}; give a whole number")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    return int(value)


class RemoteEncoder(TextEncoder):
    """An encoder behind a service; `DashScopeEncoder` and `OpenAIEncoder` say which one.

    Safe to share between threads. A pickle holds the options, not the key. Vectors are checked (one for each text, of the right
    length, finite) and brought to unit length.

    Attributes:
        name: The model's name.
        dimension: Length of the dense vectors when a call does not say otherwise.
        dimensions: All lengths that a call may ask for.
        max_length: Longest text in tokens, None where the service's limit is not known.
        query_prompt: Text put before every query.
        document_prompt: Text put before every document.
    """

    def __init__(
        self,
        model: str,
        service: Service,
        *,
        dimension: int,
        dimensions: Sequence[int],
        batch_size: int,
        concurrency: int,
        max_length: int | None,
        tokenizer: Tokenizer | None,
        query_prompt: str = "",
        document_prompt: str = "",
    ) -> None:
        """Set what to ask; use one of the subclasses."""
        if not isinstance(model, str) or not model:
            raise ValueError(f"model is {model!r}; give the name of a model")
        self.name = model
        self.dimensions = tuple(_check_count("dimensions", item) for item in (dimension, *dimensions))
        self.dimensions = tuple(dict.fromkeys(self.dimensions))
        self.dimension = self._check_dimension(dimension)
        self.max_length = max_length if max_length is None else _check_count("max_length", max_length)
        self.query_prompt, self.document_prompt = query_prompt, document_prompt
        self._service = service
        self._batch_size = _check_count("batch_size", batch_size)
        self._concurrency = _check_count("concurrency", concurrency)
        self._tokenizer = tokenizer
        if tokenizer is not None and max_length is None:
            raise ValueError("tokenizer is given without max_length; give the longest text in tokens as well")
        self._strings: dict[int, str] = {}

    def __repr__(self) -> str:
        """Return model, dimension and address."""
        return f"{type(self).__name__}({self.name!r}, dimension={self.dimension}, base_url={self._service.base_url!r})"

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self._service.close()

    @property
    def vocab_size(self) -> int:
        """Upper bound of the token ids: services do not say how many there are."""
        return _VOCAB_SIZE

    @property
    def fingerprint(self) -> str:
        """16 hex characters that name the model. They are made of its name: a service does not show its weights."""
        return _fingerprint(self, self.name)

    def encode_queries(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        """Encode search queries; see `TextEncoder.encode_queries`.

        Raises:
            RemoteError: The service cannot be reached, refuses, or gives something that is no answer.
            TypeError: `texts` is not a list of strings.
            ValueError: A text is not valid Unicode, `dimension` is not available, or neither vector is asked for.
            CheckpointError: Sparse vectors are asked for and the model gives none.
        """
        return self._encode(texts, True, dense, sparse, dimension, show_progress)

    def encode_documents(
        self,
        texts: Sequence[str],
        *,
        dense: bool = True,
        sparse: bool = True,
        dimension: int | None = None,
        show_progress: bool = False,
    ) -> Encoding:
        """Encode documents or passages; arguments, result and errors as for `encode_queries`."""
        return self._encode(texts, False, dense, sparse, dimension, show_progress)

    def token_strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token id as the service has written it since this object was made; one not seen yet as its number."""
        return [self._strings.get(int(token_id), str(int(token_id))) for token_id in ids]

    @abstractmethod
    def _ask(self, texts: list[str], asked: _Asked) -> list[_Vectors]:
        """Have one batch encoded."""

    def _encode(
        self, texts: Sequence[str], queries: bool, dense: bool, sparse: bool, dimension: int | None, show_progress: bool
    ) -> Encoding:
        checked = check_texts(texts)
        if not dense and not sparse:
            raise ValueError("dense and sparse are both False; ask for at least one of them")
        if sparse and not self.has_sparse:
            raise CheckpointError(
                f"{self.name} gives no sparse vectors; call with sparse=False (score_pairs: sparse_weight=0)"
            )
        wanted = self.dimension if dimension is None else self._check_dimension(dimension)
        asked = _Asked(queries, dense, sparse, wanted, threading.Event())
        prompt = self.query_prompt if queries else self.document_prompt
        prepared, truncated = self._cut([prompt + text for text in checked])
        first_row: dict[str, int] = {}
        rows = np.array([first_row.setdefault(text, len(first_row)) for text in prepared], dtype=np.int64)
        with tqdm(total=len(first_row), unit="text", delay=PROGRESS_DELAY_S, disable=not show_progress) as progress:
            vectors = self._ask_all(list(first_row), asked, progress.update)
        if truncated:
            warnings.warn(
                f"{truncated} of {len(checked)} texts are longer than max_length={self.max_length} tokens and were cut",
                stacklevel=3,
            )
        stacked = np.array([item.dense for item in vectors] if dense else [], dtype=np.float32).reshape(
            -1, asked.dimension
        )
        matrix = SparseMatrix.from_vectors([item.sparse for item in vectors if item.sparse is not None], _VOCAB_SIZE)
        return Encoding(stacked[rows] if dense else None, matrix.take(rows) if sparse else None, truncated)

    def _ask_all(self, texts: list[str], asked: _Asked, report: Callable[[int], object]) -> list[_Vectors]:
        """Have texts encoded in batches, several at a time; the first failure ends it."""
        batches = [texts[start : start + self._batch_size] for start in range(0, len(texts), self._batch_size)]
        if len(batches) < 2 or self._concurrency == 1:
            return [vectors for batch in batches for vectors in self._reported(batch, asked, report)]
        pool = ThreadPoolExecutor(min(self._concurrency, len(batches)), thread_name_prefix="gte-rag-remote")
        running = [pool.submit(self._reported, batch, asked, report) for batch in batches]
        try:
            for future in wait(running, return_when=FIRST_EXCEPTION).done:
                future.result()  # raises what went wrong
            return [vectors for future in running for vectors in future.result()]
        finally:
            asked.stop.set()
            pool.shutdown(wait=False, cancel_futures=True)  # a request on its way ends by itself, unheard

    def _reported(self, batch: list[str], asked: _Asked, report: Callable[[int], object]) -> list[_Vectors]:
        vectors = self._ask(batch, asked)
        if not asked.stop.is_set():
            report(len(batch))
        return vectors

    def _cut(self, texts: list[str]) -> tuple[list[str], int]:
        """Return texts of at most `max_length` tokens and how many were longer; without a tokenizer that is not known."""
        if self._tokenizer is None or self.max_length is None:
            return texts, 0
        kept = [_shortened(self._tokenizer, text, self.max_length) for text in texts]
        return kept, sum(len(short) < len(text) for short, text in zip(kept, texts, strict=True))

    def _check_dimension(self, dimension: int) -> int:
        if isinstance(dimension, bool) or not isinstance(dimension, (int, np.integer)):
            raise TypeError(f"dimension is {dimension!r}; give a whole number")
        if dimension not in self.dimensions:
            accepted = ", ".join(map(str, sorted(self.dimensions)))
            raise ValueError(f"dimension is {dimension}; {self.name} gives {accepted}")
        return int(dimension)

    def _vectors(self, items: object, asked: _Asked, count: int, index_name: str) -> list[_Vectors]:
        """Check what a service gave for a batch, and put it into the order of the texts."""
        rows = _in_order(items, count, index_name)
        return [
            _Vectors(
                self._unit(row.get("embedding"), asked.dimension) if asked.dense else None,
                self._weights(row.get("sparse_embedding")) if asked.sparse else None,
            )
            for row in rows
        ]

    def _unit(self, values: object, dimension: int) -> FloatArray:
        try:
            vector = np.asarray(values, dtype=np.float32)
        except (OverflowError, TypeError, ValueError):
            raise RemoteError(f"{self.name} gave a vector that is no list of numbers") from None
        if vector.ndim != 1 or len(vector) != dimension:
            given = len(vector) if vector.ndim == 1 else vector.shape
            raise RemoteError(f"{self.name} gave a vector of dimension {given}; asked for was {dimension}")
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if not math.isfinite(length) or length == 0:
            raise RemoteError(f"{self.name} gave a vector of length {length}")
        unit: FloatArray = (vector / length).astype(np.float32)
        return unit

    def _weights(self, tokens: object) -> SparseVector:
        weights: dict[int, float] = {}
        strings: dict[int, str] = {}
        try:
            for token in tokens:  # type: ignore[attr-defined]
                index, value = token["index"], float(token["value"])
                weights[index] = max(value, weights.get(index, value))
                if isinstance(token.get("token"), str):
                    strings[index] = token["token"]
            vector = SparseVector.from_dict(weights)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            raise RemoteError(f"{self.name} gave token weights that are no list of index and value") from None
        self._strings |= strings
        return vector


class DashScopeEncoder(RemoteEncoder):
    """The family's embedding models in the cloud, by the service's own protocol: dense and sparse vectors from one request.

    ```python
    encoder = DashScopeEncoder("text-embedding-v3", dimension=512)  # the key is in the environment: DASHSCOPE_API_KEY
    ```

    | model | dimensions | sparse | texts a request | tokens a text |
    |---|---|---|---|---|
    | text-embedding-v1, -v2 | 1536 | no | 25 | 2,048 |
    | text-embedding-v3 | 64, 128, 256, 512, 768, 1024 | yes | 10 | 8,192 |
    | text-embedding-v4 | 64, 128, 256, 512, 768, 1024, 1536, 2048 | yes | 10 | 8,192 |
    """

    def __init__(
        self,
        model: str = "text-embedding-v3",
        *,
        dimension: int | None = None,
        api_key: str | None = None,
        base_url: str = DASHSCOPE_URL,
        instruct: str | None = None,
        tokenizer: Tokenizer | None = None,
        concurrency: int = 4,
        timeout: float = 60.0,
        max_retries: int = 5,
    ) -> None:
        """Set what to ask; nothing is sent yet.

        Args:
            model: A model of the table above.
            dimension: Length of the dense vectors; None is the model's default, 1024 for v3 and v4.
            api_key: The key; None takes it from the environment variable ``DASHSCOPE_API_KEY`` at each request.
            base_url: The service's address; keys of Singapore go with ``"https://dashscope-intl.aliyuncs.com/api/v1"``.
            instruct: What the queries are for, an English sentence; only text-embedding-v4 reads it.
            tokenizer: The model's tokenizer, to cut texts over the limit here, where they are counted and warned about. Without
                one they are sent as they are, and the service decides.
            concurrency: Requests at the same time.
            timeout: Seconds to wait for a connection, and for each part of an answer.
            max_retries: How often a request is repeated after status 429 or 5xx.

        Raises:
            MissingExtraError: `httpx` is not installed.
            ValueError: There is no key, or an option is out of range.
        """
        if model not in _MODELS:
            raise ValueError(f"model is {model!r}; known: {', '.join(_MODELS)}")
        if instruct is not None and model != "text-embedding-v4":
            raise ValueError(f"instruct is given, which {model} does not read; text-embedding-v4 does")
        known = _MODELS[model]
        self._known = known
        self._instruct = instruct
        key = Key(api_key, None if api_key is not None else DASHSCOPE_KEY)
        super().__init__(
            model,
            Service(base_url, key, timeout=timeout, max_retries=max_retries),
            dimension=known.dimensions[0],
            dimensions=known.dimensions,
            batch_size=known.batch_size,
            concurrency=concurrency,
            max_length=known.max_length,
            tokenizer=tokenizer,
        )
        if dimension is not None:
            self.dimension = self._check_dimension(dimension)

    @property
    def has_sparse(self) -> bool:
        """Whether the model gives sparse vectors."""
        return self._known.has_sparse

    def _ask(self, texts: list[str], asked: _Asked) -> list[_Vectors]:
        parameters: dict[str, Any] = {"text_type": "query" if asked.queries else "document"}
        if self._known.has_sparse:
            parameters["output_type"] = "&".join(name for name in ("dense", "sparse") if getattr(asked, name))
        if len(self.dimensions) > 1:
            parameters["dimension"] = asked.dimension
        if self._instruct is not None and asked.queries:
            parameters["instruct"] = self._instruct
        body = {"model": self.name, "input": {"texts": texts}, "parameters": parameters}
        answer = self._service.post("services/embeddings/text-embedding/text-embedding", body, asked.stop)
        return self._vectors(_output(answer, "embeddings"), asked, len(texts), "text_index")


class OpenAIEncoder(RemoteEncoder):
    """A model behind a server that speaks OpenAI's ``/v1/embeddings``: dense vectors only, the protocol has no sparse ones.

    ```python
    encoder = OpenAIEncoder("http://127.0.0.1:8080/v1", "Alibaba-NLP/gte-multilingual-base", dimension=768)
    ```
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        dimension: int,
        dimensions: Sequence[int] = (),
        api_key: str | None = None,
        api_key_variable: str | None = None,
        query_prompt: str = "",
        document_prompt: str = "",
        query_fields: Mapping[str, Any] | None = None,
        document_fields: Mapping[str, Any] | None = None,
        batch_size: int = 32,
        max_length: int | None = None,
        tokenizer: Tokenizer | None = None,
        concurrency: int = 4,
        timeout: float = 60.0,
        max_retries: int = 5,
    ) -> None:
        """Set what to ask; nothing is sent yet.

        Args:
            base_url: The server's address up to and including ``/v1``.
            model: The model's name, as the server knows it.
            dimension: Length of its dense vectors.
            dimensions: Other lengths that it gives on request. If there are any, each request names the length in the field
                ``dimensions``, which many servers refuse for models of one length.
            api_key: The key, if the server wants one.
            api_key_variable: The environment variable that holds the key, which is then read at each request and survives
                pickling.
            query_prompt: Text put before every query, for models that were trained with one.
            document_prompt: Text put before every document.
            query_fields: Further fields of requests with queries, such as ``{"input_type": "query"}``.
            document_fields: Further fields of requests with documents.
            batch_size: Texts a request.
            max_length: Longest text in tokens; needed with `tokenizer`.
            tokenizer: The model's tokenizer, to cut longer texts here, where they are counted and warned about. Without one
                they are sent as they are, and the server decides.
            concurrency: Requests at the same time.
            timeout: Seconds to wait for a connection, and for each part of an answer.
            max_retries: How often a request is repeated after status 429 or 5xx.

        Raises:
            MissingExtraError: `httpx` is not installed.
            ValueError: An option is out of range.
        """
        own = {"model", "input", "encoding_format", "dimensions"}
        self._fields = {True: dict(query_fields or {}), False: dict(document_fields or {})}
        if taken := sorted(own & {name for fields in self._fields.values() for name in fields}):
            raise ValueError(f"query_fields and document_fields have {', '.join(taken)}, which other options decide")
        super().__init__(
            model,
            Service(base_url, Key(api_key, api_key_variable), timeout=timeout, max_retries=max_retries),
            dimension=dimension,
            dimensions=dimensions,
            batch_size=batch_size,
            concurrency=concurrency,
            max_length=max_length,
            tokenizer=tokenizer,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
        )

    @property
    def has_sparse(self) -> bool:
        """False: the protocol has no sparse vectors."""
        return False

    def _ask(self, texts: list[str], asked: _Asked) -> list[_Vectors]:
        body: dict[str, Any] = {
            "model": self.name,
            "input": texts,
            "encoding_format": "float",
            **self._fields[asked.queries],
        }
        if len(self.dimensions) > 1:
            body["dimensions"] = asked.dimension
        answer = self._service.post("embeddings", body, asked.stop)
        return self._vectors(answer.get("data"), asked, len(texts), "index")


class DashScopeReranker(TextReranker):
    """The family's reranker in the cloud.

    Safe to share between threads. A pickle holds the options, not the key.
    """

    def __init__(
        self,
        model: str = "gte-rerank-v2",
        *,
        api_key: str | None = None,
        base_url: str = DASHSCOPE_URL,
        timeout: float = 60.0,
        max_retries: int = 5,
    ) -> None:
        """Set what to ask; nothing is sent yet.

        Args:
            model: ``"gte-rerank-v2"``, ``"gte-rerank"``, or another model of the same protocol.
            api_key: The key; None takes it from the environment variable ``DASHSCOPE_API_KEY`` at each request.
            base_url: The service's address.
            timeout: Seconds to wait for a connection, and for each part of an answer.
            max_retries: How often a request is repeated after status 429 or 5xx.

        Raises:
            MissingExtraError: `httpx` is not installed.
            ValueError: There is no key, or an option is out of range.
        """
        if not isinstance(model, str) or not model:
            raise ValueError(f"model is {model!r}; give the name of a model")
        self.name = model
        key = Key(api_key, None if api_key is not None else DASHSCOPE_KEY)
        self._service = Service(base_url, key, timeout=timeout, max_retries=max_retries)

    def __repr__(self) -> str:
        """Return model and address."""
        return f"DashScopeReranker({self.name!r}, base_url={self._service.base_url!r})"

    @property
    def fingerprint(self) -> str:
        """16 hex characters that name the model, made of its name: a service does not show its weights."""
        return _fingerprint(self, self.name)

    def close(self) -> None:
        """Close the connections; a later call opens new ones."""
        self._service.close()

    def score_pairs(self, pairs: Sequence[tuple[str, str]]) -> FloatArray:
        """Score query-text pairs.

        Pairs of the same query share requests of at most 500 texts, and of as many tokens as the service accepts; a text counts
        with its bytes, which are never fewer. The service itself cuts queries and texts over 4,000 tokens.

        Args:
            pairs: (query, text) tuples; ``[]`` gives an empty array.

        Returns:
            float32, shape (number of pairs,), between 0 and 1, higher is better.

        Raises:
            RemoteError: The service cannot be reached, refuses, or gives something that is no answer.
            TypeError: `pairs` is not a list of pairs of strings.
            ValueError: A text is not valid Unicode.
        """
        checked = check_pairs(pairs)
        scores = np.empty(len(checked), dtype=np.float32)
        positions: dict[str, list[int]] = {}
        for position, (query, _) in enumerate(checked):
            positions.setdefault(query, []).append(position)
        for query, places in positions.items():
            for batch in _batches(query, [checked[place][1] for place in places], places):
                scores[batch] = self._ask(query, [checked[place][1] for place in batch])
        return scores

    def _ask(self, query: str, texts: list[str]) -> list[float]:
        body = {
            "model": self.name,
            "input": {"query": query, "documents": texts},
            "parameters": {"top_n": len(texts), "return_documents": False},
        }
        answer = self._service.post("services/rerank/text-rerank/text-rerank", body)
        scores = [row.get("relevance_score") for row in _in_order(_output(answer, "results"), len(texts), "index")]
        try:
            numbers = [float(score) for score in scores if isinstance(score, (int, float))]
        except OverflowError:  # a whole number that no float holds
            numbers = []
        if len(numbers) < len(texts) or not all(map(math.isfinite, numbers)):
            raise RemoteError(f"{self.name} gave a score that is no number")
        return numbers


def _fingerprint(client: object, model: str) -> str:
    return hashlib.sha256(f"{type(client).__name__}:{model}".encode()).hexdigest()[:16]


def _batches(query: str, texts: Sequence[str], places: Sequence[int]) -> Iterator[list[int]]:
    """Cut a query's texts, known by their places, into requests that the service accepts."""
    batch: list[int] = []
    tokens = 0
    of_query = min(len(query.encode()), _RERANK_LENGTH)
    for place, text in zip(places, texts, strict=True):
        more = of_query + min(len(text.encode()), _RERANK_LENGTH)
        if batch and (len(batch) == _RERANK_DOCUMENTS or tokens + more > _RERANK_TOKENS):
            yield batch
            batch, tokens = [], 0
        batch.append(place)
        tokens += more
    if batch:
        yield batch


def _output(answer: Mapping[str, Any], name: str) -> object:
    output = answer.get("output")
    return output.get(name) if isinstance(output, dict) else None


def _in_order(items: object, count: int, index_name: str) -> list[dict[str, Any]]:
    """Return the objects of an answer in the order of the texts they belong to; services need not keep it.

    Raises:
        RemoteError: They are not one for each text.
    """
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RemoteError("the answer has no list of results")
    rows = {item.get(index_name): item for item in items if isinstance(item.get(index_name), int)}
    if len(items) != count:
        raise RemoteError(f"the answer has {len(items)} results for {count} texts")
    if rows.keys() != set(range(count)):
        raise RemoteError(f"the answer's {index_name} are not those of {count} texts, 0 to {count - 1}, each once")
    return [rows[position] for position in range(count)]


def _shortened(tokenizer: Tokenizer, text: str, max_length: int) -> str:
    """Return as much of the beginning of a text as has at most `max_length` tokens, special tokens included."""
    while True:
        encoding = tokenizer.encode(text)
        surplus = len(encoding.ids) - max_length
        if surplus <= 0 or not text:
            return text
        ends = [
            end for (_, end), special in zip(encoding.offsets, encoding.special_tokens_mask, strict=True) if not special
        ]
        kept = ends[: max(0, len(ends) - surplus)]
        text = text[: min(kept[-1], len(text) - 1)] if kept else ""
