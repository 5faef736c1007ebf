"""Ray: joining or starting it, what room it has for workers, and Ray Data runs over a list of items."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from gte_rag.errors import BulkError, missing_extra

# On processors one worker is fastest with a few cores; more of them are better used by a second one.
_MOST_CPUS = 8
# Little above Ray's least: only descriptions of the work pass through its store, never texts or vectors.
_OBJECT_STORE_BYTES = 80 * 2**20
_TOO_SLOW = (
    "timed out during startup",
    "Timed out waiting for file",
)  # how Ray says that its own start has taken too long
# Ray's own switches: report nothing to its makers; in a Ray that is started here listen on the loopback interface only (it
# has an effect before Ray is first imported).
_SWITCHES = {"RAY_USAGE_STATS_ENABLED": "0"}
_LOCAL_SWITCHES = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}


class Cluster:
    """A Ray cluster and the size of a worker in it. Nothing is started before it is needed.

    Use it as a context manager: a Ray that it has started or joined ends with it, one that was there before stays.
    """

    def __init__(
        self, address: str | None, workers: int | None, cpus_per_worker: int | None, gpus_per_worker: float | None
    ) -> None:
        """Remember what is wanted; see `gte_rag.distributed.encode_files`."""
        self._address = address
        self._wanted = (workers, cpus_per_worker, gpus_per_worker)
        self._own = False

    def __enter__(self) -> Cluster:
        """Return the cluster."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave or stop the Ray that was joined or started here."""
        if self._own:
            import ray

            ray.shutdown()
            self._own = False

    def map(self, function: Callable[[dict[str, Any]], dict[str, Any]], items: Sequence[Any]) -> Iterator[Any]:
        """Call a function for every item, on any core of the cluster, and yield the results as they come.

        Args:
            function: A function of a module; takes ``{"item": JSON}`` and returns ``{"result": JSON}``.
            items: What JSON can write.
        """
        if items:
            self._connect()
            yield from _results(items, function)

    def pool(self, worker: type, arguments: tuple[Any, ...], items: Sequence[Any]) -> Iterator[Any]:
        """Call workers for every item and yield the results as they come; a worker that dies is replaced, its item repeated.

        Args:
            worker: A class of a module, made once in each worker with the numbers of its cores and GPUs and `arguments`;
                called like the function of `map`.
            arguments: Its arguments.
            items: What JSON can write.

        Raises:
            ValueError: The cluster has no room for the workers.
        """
        if not items:
            return
        self._connect()
        from ray.data import ActorPoolStrategy

        workers, cpus, gpus = self._room()
        yield from _results(
            items,
            worker,
            fn_constructor_args=(cpus, gpus, *arguments),
            compute=ActorPoolStrategy(size=min(workers, len(items)), max_tasks_in_flight_per_actor=1),
            num_cpus=cpus,
            num_gpus=gpus,
        )

    def _connect(self) -> None:
        address = self._address or os.environ.get("RAY_ADDRESS") or "local"
        for name, value in {**_SWITCHES, **(_LOCAL_SWITCHES if address == "local" else {})}.items():
            os.environ.setdefault(name, value)
        try:
            import ray
            import ray.data  # it has packages of its own, which may be missing
        except ImportError as error:
            raise missing_extra("ray[data]", "ray") from error
        if ray.is_initialized():
            return
        workers, cpus, _ = self._wanted
        local: dict[str, Any] = {
            "num_cpus": None if workers is None else workers * (cpus or 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        with _quiet():
            start_ray(address, **(local if address == "local" else {}))
        self._own = True

    def _room(self) -> tuple[int, int, float]:
        """Return number of workers, and cores and GPUs of each."""
        import ray

        workers, cpus, gpus = self._wanted
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
        if gpus is None:
            gpus = 1 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0
        most = int(max((node.get("CPU", 0) for node in nodes), default=0))
        if cpus is None:
            cpus = 1 if gpus or ((workers or 0) > 1 and len(nodes) == 1) else max(1, min(_MOST_CPUS, most))
        room = sum(
            int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) / gpus if gpus else float("inf"))) for node in nodes
        )
        if room < (workers or 1):
            raise ValueError(
                f"this Ray has room for {room} workers of {cpus} CPUs and {gpus:g} GPUs each, and {workers or 1} are wanted; "
                f"its machines have {', '.join(str(int(node.get('CPU', 0))) for node in nodes)} CPUs"
            )
        return workers or room, cpus, gpus


def start_ray(address: str, **options: Any) -> None:  # noqa: ANN401
    """Connect to a Ray, or start one, silently; options are those of `ray.init`.

    Ray allows its own start 30 seconds, too few where it is read from a busy disk; the second finds it in memory.

    Raises:
        BulkError: Both starts took too long.
    """
    import ray

    for attempt in (1, 2):
        try:
            ray.init(address, logging_level=logging.ERROR, log_to_driver=False, **options)
            return
        except Exception as error:  # Ray has no class of its own for it
            if not any(sign in str(error) for sign in _TOO_SLOW):
                raise
            ray.shutdown()  # what has started of it
            if attempt == 2:
                raise BulkError("Ray did not start within 30 seconds, twice; is this machine very busy?") from error


def _results(items: Sequence[Any], function: Any, **options: Any) -> Iterator[Any]:  # noqa: ANN401
    """Run one Ray Data operator over the items, a block each, so that each result is there when its item is done."""
    import ray.data

    with _quiet():
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        blocks = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=len(items))
        results = iter(blocks.map(function, **options).iter_rows())
        for row in results:
            yield json.loads(row["result"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Let Ray report what goes wrong and nothing else."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.data")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
