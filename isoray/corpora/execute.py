"""Carrying out tasks: in this process, or as a Ray Data pipeline with a pool of actors."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, Protocol

import isoray.errors
from isoray.errors import InfraError, IsorayError

Executor = Literal["auto", "ray", "inprocess"]
Progress = Callable[[str, int, int], None]
"""Called with the phase, how many of its tasks are done, and how many there are."""


class Work(Protocol):
    """What is done for each item; pickled to the workers, each of which keeps its copy. The result must be a string."""

    def __call__(self, item: int) -> str: ...


def carry_out(
    work: Work,
    items: int,
    *,
    phase: str,
    executor: Literal["ray", "inprocess"],
    workers: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
    progress: Progress | None = None,
) -> list[str]:
    """The results of ``work(0)`` ... ``work(items - 1)``, in that order.

    With `ray`, Ray must be connected; each of ``workers`` actors (default: one per CPU) takes ``cpus`` and ``gpus``. An
    :class:`IsorayError` of a task is raised here as it was there; InfraError when workers cannot be kept alive.
    """
    results: dict[int, str] = {}
    for item, result in as_done(work, items, phase=phase, executor=executor, workers=workers, cpus=cpus, gpus=gpus):
        results[item] = result
        if progress is not None:
            progress(phase, len(results), items)
    assert len(results) == items, f"{phase}: {items - len(results)} of {items} tasks brought no result"
    return [results[item] for item in range(items)]


def as_done(
    work: Work,
    items: int,
    *,
    phase: str,
    executor: Literal["ray", "inprocess"],
    workers: int | None = None,
    cpus: float = 1,
    gpus: float = 0,
) -> Iterator[tuple[int, str]]:
    """``(item, work(item))`` as they come, in any order; as :func:`carry_out` otherwise."""
    if executor == "ray":
        return _in_ray(work, items, phase, workers, cpus, gpus)
    return ((item, work(item)) for item in range(items))


class _Actor:
    """Does the work of one item at a time."""

    def __init__(self, work: Work) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.work = work

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (item,) = batch["item"].tolist()
        try:
            return {"item": [item], "result": [self.work(item)], "error": [""]}
        except IsorayError as error:
            return {"item": [item], "result": [str(error)], "error": [type(error).__name__]}


def _in_ray(
    work: Work, items: int, phase: str, workers: int | None, cpus: float, gpus: float
) -> Iterator[tuple[int, str]]:
    import ray
    import ray.data
    import ray.exceptions

    if workers is None:
        workers = max(1, int(ray.cluster_resources().get("CPU", 1)))  # type: ignore[no-untyped-call]
    with _quiet():
        # Many small blocks: one item each, so that a lost worker costs one task and all workers stay busy to the end.
        tasks = ray.data.from_items([{"item": item} for item in range(items)], override_num_blocks=min(items, 4096))
        pool = ray.data.ActorPoolStrategy(size=min(workers, items))
        done = tasks.map_batches(
            _Actor,
            fn_constructor_args=(work,),
            compute=pool,
            batch_size=1,
            batch_format="numpy",
            num_cpus=cpus,
            num_gpus=gpus,
        )
        try:
            for row in done.iter_rows():
                if row["error"]:
                    raise getattr(isoray.errors, row["error"])(row["result"])
                yield int(row["item"]), str(row["result"])
        except ray.exceptions.RayTaskError:
            raise  # our own code failed there: a bug, shown with its traceback
        except ray.exceptions.RayError as error:
            raise InfraError(f"{phase} failed on the cluster ({error}); run it again to go on") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray Data's own progress bars and messages."""
    import ray.data

    context = ray.data.DataContext.get_current()
    bars, logger = context.enable_progress_bars, logging.getLogger("ray.data")
    level = logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


def choose(executor: Executor, total_bytes: int, threshold: int) -> Literal["ray", "inprocess"]:
    """What `auto` means: Ray Data where it is connected and the input is large enough to earn its fixed cost."""
    if executor != "auto":
        return executor
    if total_bytes < threshold:
        return "inprocess"
    import ray

    return "ray" if ray.is_initialized() else "inprocess"


def chunks(sizes: Sequence[int], target: int) -> list[range]:
    """Consecutive ranges of ``sizes``, each closed as soon as it holds ``target`` or more."""
    ranges, first, held = [], 0, 0
    for index, size in enumerate(sizes):
        held += size
        if held >= target:
            ranges.append(range(first, index + 1))
            first, held = index + 1, 0
    if first < len(sizes):
        ranges.append(range(first, len(sizes)))
    return ranges
