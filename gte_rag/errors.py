"""The few errors a caller would want to catch by class.

Wrong arguments raise the built-in `TypeError` and `ValueError`; only situations a program can react to have a class of
their own, and each is a subclass of the built-in it specialises.
"""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint cannot be loaded; the message names the file or key, the reason and what to do."""


class CollectionMismatchError(ValueError):
    """A collection was made by another model, with another dimension, or with another distance."""


class DamagedCollectionError(RuntimeError):
    """The graph of a collection is damaged, or its repair has not ended; the message names the command that mends it."""


class RemoteError(RuntimeError):
    """A service could not be reached, refused a request, or gave an answer that does not fit it.

    Attributes:
        status: The HTTP status, None where there was no answer.
        code: The service's own name for the error, if it gave one.
        request_id: The service's name for the request, to be quoted to its support, if it gave one.
    """

    def __init__(
        self, message: str, *, status: int | None = None, code: str | None = None, request_id: str | None = None
    ) -> None:
        """Say what happened; the key is in none of the arguments."""
        super().__init__(message)
        self.status, self.code, self.request_id = status, code, request_id


class BulkError(RuntimeError):
    """A bulk run cannot start in its folder or has stopped; the message says why and how it goes on."""


class MissingExtraError(ImportError):
    """A feature needs a package that is not installed; the message names the extra and the command."""


def missing_extra(package: str, extra: str) -> MissingExtraError:
    """Return the error for an optional package that is not installed.

    Args:
        package: The distribution that could not be imported, for example ``"chromadb"``.
        extra: The extra of ``gte-rag`` that installs it, for example ``"chroma"``.

    Returns:
        The exception, ready to be raised from the `ImportError` it explains.
    """
    return MissingExtraError(
        f"this needs the package {package!r}, which is not installed: run  pip install 'gte-rag[{extra}]'",
        name=package,
    )
