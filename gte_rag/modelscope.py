"""Checkpoints from ModelScope, through its own client (extra ``modelscope``).

The client gives the user's cache, login and resumed downloads. What it does not check is done here: only the files of a
checkpoint are fetched, none under a name that leads out of the folder, and each must have the listed size.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from gte_rag.errors import CheckpointError, missing_extra

if TYPE_CHECKING:
    from modelscope_hub import FileInfo, HubApi

_BRANCH = "master"


def download(
    model_id: str, *, patterns: Sequence[str], revision: str | None, cache_dir: str | None, local_files_only: bool
) -> Path:
    """Return a folder with the files of a ModelScope repository that match a pattern, fetching those that are not there.

    Args:
        model_id: ``owner/name``.
        patterns: What to fetch, as for `fnmatch.fnmatch` on the path in the repository.
        revision: Branch, tag or commit; None is ``"master"``.
        cache_dir: Where downloads are kept; None is the client's own cache (``MODELSCOPE_CACHE``).
        local_files_only: Use what was downloaded before and never the network.

    Raises:
        CheckpointError: The repository cannot be had, or has no checkpoint, or lists a file outside its folder.
        MissingExtraError: The client is not installed.
    """
    try:
        from modelscope_hub import HubApi, HubConfig, HubError
    except ImportError as error:
        raise missing_extra("modelscope-hub", "modelscope") from error
    revision = revision or _BRANCH
    if not re.fullmatch(r"\w[\w./-]*", revision) or ".." in revision:
        raise CheckpointError(f"revision is {revision!r}; give a branch, a tag or a commit of {model_id!r}")
    hub = HubApi(HubConfig())  # reads the environment now, where the client's default would remember an earlier one
    try:
        if local_files_only:
            return hub.download_repo(
                model_id, "model", revision=revision, cache_dir=cache_dir, local_files_only=True
            ).absolute()
        listed = hub.list_repo_files(model_id, "model", revision=revision)
        wanted = [
            file for file in listed if not file.is_dir and any(fnmatch(file.path, pattern) for pattern in patterns)
        ]
        for file in wanted:
            _check_path(file.path, model_id)
        if not any(file.path == "config.json" for file in wanted):
            raise CheckpointError(f"{model_id!r} on ModelScope has no config.json: it holds no checkpoint")
        folders = [_fetch(hub, file, model_id, revision, cache_dir) for file in wanted]
    except (HubError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"cannot fetch {model_id!r} at revision {revision!r} from ModelScope ({reason}). Check the name, the revision and "
            "the connection, or give the folder of a copy on this machine"
        ) from error
    return folders[0]


def _check_path(path: str, model_id: str) -> None:
    """Refuse a path that would be written outside the repository's folder: the client joins it as it is."""
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or any(character in path for character in "\\:\0"):
        raise CheckpointError(f"{model_id!r} on ModelScope lists the file {path!r}, which leads out of its folder")


def _fetch(hub: HubApi, file: FileInfo, model_id: str, revision: str, cache_dir: str | None) -> Path:
    """Fetch one file, which the client compares with the listed digest, and return the repository's folder."""
    path = hub.download_file(
        model_id, "model", file.path, revision=revision, cache_dir=cache_dir, expected_sha256=file.sha256
    ).absolute()
    if file.size and path.stat().st_size != file.size:  # 0 is what the client makes of a size that is not listed
        path.unlink()
        raise CheckpointError(
            f"{model_id!r} on ModelScope lists {file.path} with {file.size} bytes and delivered another number; try again"
        )
    return path.parents[len(PurePosixPath(file.path).parts) - 1]
