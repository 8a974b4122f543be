"""How many workers a run takes: what is asked for, what there is, and the arithmetic between them.

What cannot fit is refused with the sum before anything starts. Nothing here needs Ray.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from isoray.config.base import Config
from isoray.errors import UserError


class ScalingConfig(Config):
    """How many workers a run uses, and what it does when some are lost."""

    executor: Literal["ray", "inprocess"] = "ray"
    """`ray`: workers are Ray actors, on this machine or on a cluster. `inprocess`: everything runs one after the other
    in the process that was started, without Ray."""
    workers: PositiveInt = 1
    """Data-parallel workers of a single training."""
    lanes: PositiveInt | Literal["auto"] = "auto"
    """Worker groups that take short trainings from a queue, side by side. `auto`: as many as fit, no more than jobs."""
    workers_per_lane: PositiveInt = 1
    """Data-parallel workers of each lane."""
    cpus_per_worker: PositiveInt | Literal["auto"] = "auto"
    """CPUs, and therefore compute threads, of each worker. `auto`: as many as fill the machine. The number of threads
    may change the last bits of a result; set it to compare numbers between machines."""
    gpus_per_worker: NonNegativeFloat | Literal["auto"] = "auto"
    """GPUs of each worker; a fraction lets several lanes share one. `auto`: one if the cluster has any, else none."""
    max_failures: NonNegativeInt = 3
    """How often one job, or one training, is started again after its workers were lost. Lanes also give up after this
    many losses per lane in a row in which no job finishes."""
    start_timeout_s: PositiveFloat = 180.0
    """Seconds to wait for the first workers to be placed and started."""
    hang_timeout_s: PositiveFloat = 1800.0
    """Seconds without any progress after which a worker group counts as hung and is replaced."""
    collective_timeout_s: PositiveFloat = 300.0
    """Seconds after which a collective operation whose peers do not answer fails."""


@dataclass(frozen=True)
class Node:
    """One machine as the scheduler sees it. ``memory`` is in bytes."""

    name: str
    cpus: int
    gpus: float = 0.0
    memory: int = 0


@dataclass(frozen=True)
class Resources:
    """What may be used: the nodes that are alive, with the CPUs that compute may take."""

    nodes: tuple[Node, ...]

    @property
    def cpus(self) -> int:
        return sum(node.cpus for node in self.nodes)

    @property
    def gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def slots(self, cpus: int, gpus: float, memory: int = 0) -> int:
        """How many workers of ``cpus``, ``gpus`` and ``memory`` bytes fit; a worker never spans two nodes."""
        return sum(_slots(node, cpus, gpus, memory) for node in self.nodes)

    def __str__(self) -> str:
        return _amount(self.cpus, self.gpus) + f" on {len(self.nodes)} node" + ("s" if len(self.nodes) != 1 else "")


@dataclass(frozen=True)
class Placement:
    """Worker groups that fit: ``lanes`` groups of ``workers`` workers, each with ``cpus`` and ``gpus``."""

    executor: Literal["ray", "inprocess"]
    lanes: int
    workers: int
    cpus: int
    gpus: float

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for one worker."""
        return {"CPU": float(self.cpus)} | ({"GPU": self.gpus} if self.gpus else {})

    def __str__(self) -> str:
        groups = f"{_count(self.lanes, 'lane')} x " if self.lanes > 1 else ""
        total = _amount(self.lanes * self.workers * self.cpus, self.lanes * self.workers * self.gpus)
        return f"{groups}{_count(self.workers, 'worker')} x {_amount(self.cpus, self.gpus)} = {total}"


def local_resources() -> Resources:
    """This machine without Ray: the cores that this process may use, and its memory. GPUs are left to torch."""
    return Resources((Node("this machine", usable_cores(), 0.0, usable_memory()),))


def plan(scaling: ScalingConfig, resources: Resources, *, jobs: int | None = None, memory: int = 0) -> Placement:
    """Lanes for ``jobs`` short trainings on ``resources``; ``auto`` fills the machine and never oversubscribes it.

    Pass the number of all jobs, not of those still missing: the plan, and with it the threads of a worker, must not
    depend on what an earlier run finished. ``memory`` is about what a CPU worker will hold, in bytes, if that is known:
    ``auto`` opens fewer lanes (but one) when it would not suffice for more; lanes that were asked for stay as they are.
    Raises UserError with the sum when the lanes cannot fit.
    """
    if scaling.executor == "inprocess":
        return _inprocess(scaling, resources)
    gpus = _gpus(scaling, resources, ranks=scaling.workers_per_lane)
    if scaling.lanes == "auto":
        cpus = 1 if scaling.cpus_per_worker == "auto" else scaling.cpus_per_worker
        lanes = max(1, resources.slots(cpus, gpus, 0 if gpus else memory) // scaling.workers_per_lane)
        lanes = min(lanes, jobs) if jobs else lanes
    else:
        lanes = scaling.lanes
    return _fit(scaling, resources, lanes=lanes, workers=scaling.workers_per_lane, gpus=gpus)


def plan_training(scaling: ScalingConfig, resources: Resources) -> Placement:
    """The workers of one training on ``resources``. Raises UserError with the sum when they cannot fit."""
    if scaling.executor == "inprocess":
        return _inprocess(scaling, resources)
    gpus = _gpus(scaling, resources, ranks=scaling.workers)
    return _fit(scaling, resources, lanes=1, workers=scaling.workers, gpus=gpus)


def _inprocess(scaling: ScalingConfig, resources: Resources) -> Placement:
    cpus = resources.cpus if scaling.cpus_per_worker == "auto" else scaling.cpus_per_worker
    gpus = 0.0 if scaling.gpus_per_worker == "auto" else scaling.gpus_per_worker
    if max(scaling.workers, scaling.workers_per_lane) > 1 or scaling.lanes not in (1, "auto"):
        raise UserError("scaling.executor is `inprocess`, which runs one worker; several workers or lanes need `ray`")
    return Placement("inprocess", 1, 1, cpus, gpus)


def _gpus(scaling: ScalingConfig, resources: Resources, *, ranks: int) -> float:
    gpus = scaling.gpus_per_worker
    if gpus == "auto":
        return 1.0 if any(node.gpus >= 1 for node in resources.nodes) else 0.0
    if ranks > 1 and 0 < gpus < 1:
        raise UserError(
            f"scaling.gpus_per_worker is {gpus:g}, but {ranks} workers of one group cannot share a GPU "
            "(NCCL refuses it); use 1, or one worker per lane"
        )
    if gpus > 1 and not gpus.is_integer():
        raise UserError(f"scaling.gpus_per_worker is {gpus:g}; above 1 it must be a whole number")
    return gpus


def _fit(scaling: ScalingConfig, resources: Resources, *, lanes: int, workers: int, gpus: float) -> Placement:
    largest = max((node.cpus for node in resources.nodes), default=0)
    sizes = range(largest, 0, -1) if scaling.cpus_per_worker == "auto" else (scaling.cpus_per_worker,)
    for cpus in sizes:
        if resources.slots(cpus, gpus) >= lanes * workers:
            return Placement("ray", lanes, workers, cpus, gpus)
    wanted = Placement("ray", lanes, workers, sizes[-1] if sizes else 1, gpus)
    per_node = ", ".join(f"{node.name}: {_amount(node.cpus, node.gpus)}" for node in resources.nodes) or "no node"
    where = "a worker stands on one node; " if len(resources.nodes) > 1 else ""
    levers = "scaling.lanes, scaling.workers_per_lane" if lanes > 1 else "the number of workers"
    raise UserError(
        f"{wanted} asked for, but only {_count(resources.slots(wanted.cpus, gpus), 'such worker')} can be placed: "
        f"there are {resources} ({where}{per_node}). Lower {levers} or scaling.cpus_per_worker"
        f"{' or scaling.gpus_per_worker' if gpus else ''}, or add nodes"
    )


def _slots(node: Node, cpus: int, gpus: float, memory: int = 0) -> int:
    by_cpu = node.cpus // cpus
    if memory and node.memory:
        by_cpu = min(by_cpu, node.memory // memory)
    if not gpus:
        return by_cpu
    # Ray never splits one worker's fraction over two GPUs: 2 GPUs hold 2 workers of 0.6, not 3.
    by_gpu = int(node.gpus) * int(1 / gpus + 1e-9) if gpus < 1 else int(node.gpus / gpus)
    return min(by_cpu, by_gpu)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _amount(cpus: int, gpus: float) -> str:
    return _count(cpus, "CPU") + (f" and {gpus:g} GPU" + ("s" if gpus != 1 else "") if gpus else "")


def usable_cores() -> int:
    """Cores that this process may really use: its affinity, cut down by a cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def usable_memory() -> int:
    """Bytes of memory that this process may use, also by others now: the machine's, cut down by a cgroup's limit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return memory
    return memory if limit == "max" else min(memory, int(limit))
