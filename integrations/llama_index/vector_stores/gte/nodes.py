"""The way of LlamaIndex's nodes and filters into a Chroma collection and back, in the form LlamaIndex's own store uses."""

from __future__ import annotations

from typing import Any

from gte_rag.errors import missing_extra
from gte_rag.records import Metadata

try:
    from llama_index.core.schema import BaseNode, MetadataMode, TextNode
    from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
    from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
except ImportError as error:
    raise missing_extra("llama-index-core", "llama-index") from error

# The keys under which LlamaIndex's stores keep a node; what they hold is not the user's metadata.
_NODE_KEYS = frozenset({"_node_content", "_node_type", "document_id", "doc_id", "ref_doc_id"})
_CONDITIONS = {FilterCondition.AND: "$and", FilterCondition.OR: "$or"}
_COMPARISONS = {
    FilterOperator.EQ: "$eq",
    FilterOperator.NE: "$ne",
    FilterOperator.GT: "$gt",
    FilterOperator.GTE: "$gte",
    FilterOperator.LT: "$lt",
    FilterOperator.LTE: "$lte",
    FilterOperator.CONTAINS: "$contains",
}
_MEMBERSHIPS = {FilterOperator.IN: "$in", FilterOperator.NIN: "$nin"}
# Asked of a list in the metadata: one clause for each value, combined.
_OF_LISTS = {FilterOperator.ANY: "$or", FilterOperator.ALL: "$and"}


def metadata_of(node: BaseNode) -> dict[str, Any]:
    """Return the metadata to store for a node: the node itself, and those of its values that Chroma can hold."""
    stored = node_to_metadata_dict(node, remove_text=True, flat_metadata=False)
    return {key: value for key, value in stored.items() if _is_storable(value)}


def node_of(record_id: str, text: str, metadata: Metadata) -> BaseNode:
    """Return the node of a record; one that something else wrote, or damaged, becomes a `TextNode`."""
    if "_node_content" not in metadata:
        return TextNode(id_=record_id, text=text, metadata=dict(metadata))
    try:
        node = metadata_dict_to_node(dict(metadata), text=text)
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError):  # whatever LlamaIndex makes of a forgery
        own = {key: value for key, value in metadata.items() if key not in _NODE_KEYS}
        return TextNode(id_=record_id, text=text, metadata=own)
    node.id_ = record_id
    # The record is the truth: a value changed there since the node was stored must not come back in its old form.
    node.metadata.update({key: value for key, value in metadata.items() if key not in _NODE_KEYS})
    return node


def embedded_text(text: str, metadata: Metadata) -> str:
    """Return what LlamaIndex embeds of a node: its text together with the metadata that is not excluded."""
    if "_node_content" not in metadata:
        return text
    return node_of("", text, metadata).get_content(metadata_mode=MetadataMode.EMBED)


def chroma_filter(filters: MetadataFilters) -> dict[str, Any] | None:
    """Return LlamaIndex's filters as Chroma's `where`; None when there is nothing to filter.

    Raises:
        ValueError: An operator, a condition or a value cannot be expressed in Chroma.
    """
    condition = filters.condition or FilterCondition.AND
    if condition not in _CONDITIONS:
        raise ValueError(f"filter condition {condition.name} is not known to Chroma; accepted here: AND, OR")
    clauses = [chroma_filter(item) if isinstance(item, MetadataFilters) else _clause(item) for item in filters.filters]
    return joined(_CONDITIONS[condition], clauses)


def joined(condition: str, clauses: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    """Return clauses combined by ``"$and"`` or ``"$or"``; Chroma itself combines two at least."""
    present = [clause for clause in clauses if clause]
    if len(present) < 2:
        return present[0] if present else None
    return {condition: present}


def _clause(item: MetadataFilter) -> dict[str, Any] | None:
    if item.key.startswith("$"):
        raise ValueError(f"filter key {item.key!r} starts with '$', which Chroma would take for an operator")
    given = f"filter on {item.key!r} uses {item.operator.name}"
    if item.operator in _COMPARISONS:
        if item.value is None or isinstance(item.value, list):
            raise ValueError(f"{given} with the value {item.value!r}; give one string or number")
        return {item.key: {_COMPARISONS[item.operator]: item.value}}
    if item.operator in _MEMBERSHIPS or item.operator in _OF_LISTS:
        if not isinstance(item.value, list) or not item.value:
            raise ValueError(f"{given} with the value {item.value!r}; give a non-empty list")
        if item.operator in _MEMBERSHIPS:
            return {item.key: {_MEMBERSHIPS[item.operator]: item.value}}
        return joined(_OF_LISTS[item.operator], [{item.key: {"$contains": value}} for value in item.value])
    accepted = ", ".join(operator.name for operator in (*_COMPARISONS, *_MEMBERSHIPS, *_OF_LISTS))
    raise ValueError(f"{given}; accepted here: {accepted}")


def _is_storable(value: object) -> bool:
    items: list[Any] = value if isinstance(value, list) else [value]
    if len({type(item) for item in items}) != 1:
        return False
    if isinstance(items[0], int):
        return all(-(2**63) <= item < 2**63 for item in items)  # Chroma's whole numbers have 64 bits
    return isinstance(items[0], (str, float))
