"""Where a run gets its processors: connecting to Ray, and the arithmetic that refuses what cannot fit beforehand."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import socket
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

import isoray
from isoray.config.base import Config
from isoray.errors import InfraError, UserError

HELPER_CPUS = 2
"""Logical CPUs that a Ray of our own has on top of its cores: readers and tokenisers of a Ray Data pipeline wait for
each other for ever when the actor pools hold every CPU. Workers that compute never use them (see :func:`plan`)."""

OBJECT_STORE_BYTES = 512 * 2**20
"""Upper limit of the object store of a Ray of our own; pages that nobody writes cost nothing."""

_PATIENCE = "RAY_gcs_server_port_wait_time_s"
_FOLDER_PREFIX = "isoray-ray-"
_TOKEN = secrets.token_hex(32)


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

    def slots(self, cpus: int, gpus: float) -> int:
        """How many workers of ``cpus`` and ``gpus`` fit; a worker never spans two nodes."""
        return sum(_slots(node, cpus, gpus) for node in self.nodes)

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


@dataclass(frozen=True)
class Cluster:
    """A connection to Ray; ``address`` is None for a Ray of our own."""

    address: str | None
    cores: int | None = None

    def resources(self) -> Resources:
        """The nodes alive now. Of a Ray of our own only the real cores count, not the CPUs set aside for helpers."""
        import ray

        nodes = []
        for entry in ray.nodes():  # type: ignore[no-untyped-call]
            if entry["Alive"]:
                amounts: Mapping[str, float] = entry["Resources"]
                cpus = int(amounts.get("CPU", 0)) if self.cores is None else self.cores
                memory = int(amounts.get("memory", 0))
                nodes.append(Node(entry["NodeManagerAddress"], cpus, float(amounts.get("GPU", 0)), memory))
        return Resources(tuple(nodes))


_open: list[Cluster] = []
"""The connection that :func:`connect` holds, if any: Ray has one for the whole process."""


def local_resources() -> Resources:
    """This machine without Ray: the cores that this process may use, and its memory. GPUs are left to torch."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Resources((Node("this machine", _cores(), 0.0, memory),))


def plan(scaling: ScalingConfig, resources: Resources, *, jobs: int | None = None) -> Placement:
    """Lanes for ``jobs`` short trainings on ``resources``; ``auto`` fills the machine and never oversubscribes it.

    Pass the number of all jobs, not of those still missing: the plan, and with it the threads of a worker, must not
    depend on what an earlier run finished. Raises UserError with the sum when the lanes cannot fit.
    """
    if scaling.executor == "inprocess":
        return _inprocess(scaling, resources)
    gpus = _gpus(scaling, resources, ranks=scaling.workers_per_lane)
    if scaling.lanes == "auto":
        cpus = 1 if scaling.cpus_per_worker == "auto" else scaling.cpus_per_worker
        lanes = max(1, resources.slots(cpus, gpus) // scaling.workers_per_lane)
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


def _slots(node: Node, cpus: int, gpus: float) -> int:
    by_cpu = node.cpus // cpus
    if not gpus:
        return by_cpu
    # Ray never splits one worker's fraction over two GPUs: 2 GPUs hold 2 workers of 0.6, not 3.
    by_gpu = int(node.gpus) * int(1 / gpus + 1e-9) if gpus < 1 else int(node.gpus / gpus)
    return min(by_cpu, by_gpu)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("s" if number != 1 else "")


def _amount(cpus: int, gpus: float) -> str:
    return _count(cpus, "CPU") + (f" and {gpus:g} GPU" + ("s" if gpus != 1 else "") if gpus else "")


def _cores() -> int:
    """Cores that this process may really use: its affinity, cut down by a cgroup's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


@contextmanager
def connect(address: str | None = None, *, cores: int | None = None) -> Iterator[Cluster]:
    """Connect to Ray for the length of a ``with`` block, and leave nothing running that was started for it.

    ``address`` None starts a Ray of our own on ``cores`` cores (default: all this process may use) and never joins
    another one on the machine; ``"auto"`` joins the cluster of the ``ray job submit`` this process runs in, or the one
    that ``RAY_ADDRESS`` names; anything else is a cluster's address. Inside an open connection it is used again and
    left open. Raises InfraError when Ray cannot be started or reached.
    """
    import ray

    if ray.is_initialized():
        yield _open[-1] if _open else Cluster("connected by others")
        return
    with _own_ray(cores or _cores()) if address is None else _joined(address) as cluster:
        _open.append(cluster)
        try:
            yield cluster
        finally:
            _open.pop()


@contextmanager
def _joined(address: str) -> Iterator[Cluster]:
    import ray

    wait = os.environ.get(_PATIENCE, "1")  # by default Ray tries for a quarter of an hour
    try:
        _check_listens(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
        with _environment({_PATIENCE: wait}):
            ray.init(address=address, runtime_env=_shipped_code(), logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise InfraError(
            f"no Ray cluster answers at {address!r}: {error}. Start one (`ray start --head`), correct the address, "
            "or leave it out to run on this machine"
        ) from error
    try:
        yield Cluster(address)
    finally:
        ray.shutdown()


def _check_listens(address: str) -> None:
    """Raise OSError when nobody listens at an address of the form ``host:port`` or ``scheme://host:port``."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextmanager
def _own_ray(cores: int) -> Iterator[Cluster]:
    # Unix sockets lie below the folder and their paths may have 107 characters, so a long TMPDIR cannot be used.
    base = Path(tempfile.gettempdir() if len(tempfile.gettempdir()) <= 24 else "/tmp")
    _remove_abandoned(base)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX, dir=base))
    lock = _lock(folder)
    settings = {
        # Ray listens on all interfaces and asks for a token, which it would write into the home folder: there it would
        # switch authentication on for every later `ray start`. A token of this process's own is never written.
        "RAY_AUTH_TOKEN": os.environ.get("RAY_AUTH_TOKEN", _TOKEN),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "MALLOC_ARENA_MAX": "1",  # actors compute outside the main thread: see training.memory.keep_freed_memory
        "PYTHONPATH": os.pathsep.join(_import_paths()),
    }
    with _environment(settings):
        import ray

        try:
            ray.init(
                address="local",
                num_cpus=cores + HELPER_CPUS,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
                _temp_dir=str(folder),
            )
            yield Cluster(None, cores)
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _lock(folder: Path) -> int:
    """Hold an flock in ``folder`` for as long as this process lives; raises BlockingIOError while another does."""
    handle = os.open(folder / "owner.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_abandoned(base: Path) -> None:
    """Remove the folders of runs that were killed before they could do it."""
    for file in base.glob(f"{_FOLDER_PREFIX}*/owner.lock"):
        try:
            lock = _lock(file.parent)
        except OSError:  # in use, or somebody else's
            continue
        shutil.rmtree(file.parent, ignore_errors=True)
        os.close(lock)


@contextmanager
def _environment(settings: Mapping[str, str]) -> Iterator[None]:
    set_by_ray = ("RAY_AUTH_MODE", "PYTHONBREAKPOINT")
    before = {name: os.environ.get(name) for name in (*settings, *set_by_ray)}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _import_paths() -> list[str]:
    """Folders from which this process imports beyond the installation: a checkout of isoray, a user's components."""
    installed = {Path(path).resolve() for path in sysconfig.get_paths().values()}
    paths = [_package_folder().parent] if not _is_installed() else []
    for entry in sys.path:
        path = Path(entry or ".").resolve()
        standard = any(path == root or root in path.parents for root in installed)
        if path.is_dir() and not standard and path not in paths:
            paths.append(path)
    return [str(path) for path in paths]


def _shipped_code() -> dict[str, Any] | None:
    """Runtime environment that takes a checkout's package along to another cluster's nodes, where it is needed."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ  # there the submitted working directory is on every node
    return None if in_job or _is_installed() else {"py_modules": [str(_package_folder())]}


def _package_folder() -> Path:
    assert isoray.__file__ is not None
    return Path(isoray.__file__).resolve().parent


def _is_installed() -> bool:
    places = (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    return any(Path(place).resolve() in _package_folder().parents for place in places)
