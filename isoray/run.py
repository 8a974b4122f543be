"""One run: a folder with its config, steps that are skipped when done, metrics, and results.

The recovery from anything is to run again: a step counts as done only when its marker is there, everything that is
read back is written beside its place and renamed, and a lock keeps a second process out of the folder.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from isoray import __version__
from isoray.config.base import Config, digest_of
from isoray.errors import InfraError, UserError
from isoray.linking import copy_linked
from isoray.progress import Phase

Reporter = Callable[[int, Mapping[str, float]], None]
"""What :meth:`Run.report` hands (step, metrics) to; it may raise :class:`StopEarly`."""

STORAGE_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE, errno.EFBIG})
UNUSABLE_ERRNOS = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EEXIST,
        errno.ENAMETOOLONG,
        errno.ELOOP,
        errno.EINVAL,
    }
)
"""What the choice of a folder that cannot be made or written is answered with."""
MARKER = "step.json"


class StopEarly(BaseException):
    """Raised by a reporter out of :meth:`Run.report`: the run is to end here, though nothing is wrong with it.

    Not an Exception, so that no recipe that handles errors takes it for one.
    """


class FolderInUse(UserError):
    """Another process is at work in the run folder."""


class Run:
    """The folder of one run; open it with :meth:`Run.open` and leave it as a context manager.

    Beside what its methods write: ``checkpoints/`` and whatever else the recipe keeps there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        recipe: str,
        seed: int,
        digest: str,
        address: str | None,
        lock: int,
        reuse: Sequence[Path] = (),
        reporter: Reporter | None = None,
    ) -> None:
        self.folder = folder
        """Absolute path."""
        self.recipe = recipe
        self.seed = seed
        self.digest = digest
        """Digest of the resolved config."""
        self.address = address
        """Address of the Ray cluster to use; None = a local one."""
        self._lock = lock
        self._reuse = tuple(path.absolute() for path in reuse)
        self._reporter = reporter
        self._started = datetime.now(UTC)
        self._clock = time.perf_counter()

    @classmethod
    def open(
        cls,
        folder: str | Path,
        config: Config,
        *,
        recipe: str,
        address: str | None = None,
        reuse: Sequence[Path] = (),
        reporter: Reporter | None = None,
    ) -> Self:
        """Open (or create) the run folder for ``config`` and write ``config.json``.

        A folder that holds a run of another config is taken over: steps whose inputs are unchanged are kept, its
        results and report are removed.

        Args:
            reuse: folders of other runs whose finished steps are taken over instead of being repeated, see
                :meth:`step`. They need not exist yet.
            reporter: is handed what :meth:`report` gets.

        Raises:
            UserError: the folder is not a run folder, or another process is at work in it (FolderInUse).
            InfraError: it cannot be written.
        """
        path = Path(folder).absolute()
        if re.match(r"[A-Za-z][\w+.-]+:/", str(folder)):  # pathlib makes one slash of two
            raise UserError(f"{str(folder)!r}: a run folder must be on a file system; expected a path, not a URI")
        with storage_errors(path, forbidden=True):
            _check_run_folder(path)
            path.mkdir(parents=True, exist_ok=True)
            lock = _lock(path)
            digest = config.digest()
            if _read_digest(path / "config.json") != digest:
                for stale in ("results.json", "report.html"):
                    (path / stale).unlink(missing_ok=True)
            write_json(path / "config.json", {"config_digest": digest, **config.model_dump(mode="json")})
            _cut_torn_line(path / "metrics.jsonl")
            (path / "steps").mkdir(exist_ok=True)
        seed = int(getattr(config, "seed", 0))
        return cls(
            path, recipe=recipe, seed=seed, digest=digest, address=address, lock=lock, reuse=reuse, reporter=reporter
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let the next process into the folder."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def step_folder(self, name: str) -> Path:
        """Where the files of the finished step ``name`` are."""
        assert re.fullmatch(r"\w[\w.=+-]*", name), f"step name {name!r} is no plain file name"
        return self.folder / "steps" / name

    def step(self, name: str, inputs: object, work: Callable[[Path], object], *, resumable: bool = False) -> Any:
        """Do ``work(folder)`` unless the step ``name`` was done with the same ``inputs``; give back its result.

        ``inputs`` (JSON-able) is everything the result depends on; with isoray's version it decides whether a step that
        is already there is used. ``work`` writes its files into the folder it is given, which is renamed to
        ``step_folder(name)`` when it returns, so its result (JSON-able) must not hold that folder's path. The result is
        what JSON makes of it, whether the step was done now or before.

        A step that broke off starts again from an empty folder; with ``resumable``, from what was left there by an
        attempt with the same inputs. A step that a run of ``reuse`` has finished with the same inputs is taken over:
        its large files are hard links where the file system has them, so a finished step's files must never be changed
        in place.
        """
        done, partial = self.step_folder(name), self.folder / "steps" / f".{name}.partial"
        digest = digest_of([to_json(inputs), __version__])
        marker = read_step(done)
        if marker is not None and marker["inputs"] == digest:
            return marker["result"]
        with storage_errors(done):
            if (taken := self._take_over(name, digest)) is not None:
                return taken["result"]
            if not (resumable and _read_digest(partial / "inputs.json") == digest):
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
                write_json(partial / "inputs.json", {"config_digest": digest})
            clock = time.perf_counter()
            result = to_json(work(partial))
            (partial / "inputs.json").unlink()
            seconds = round(time.perf_counter() - clock, 3)
            _sync_tree(partial)
            write_json(partial / MARKER, {"inputs": digest, "seconds": seconds, "result": result}, strict=False)
            shutil.rmtree(done, ignore_errors=True)
            partial.rename(done)
            _sync(done.parent)
        return result

    def _take_over(self, name: str, digest: str) -> dict[str, Any] | None:
        """The marker of step ``name`` if a run of ``reuse`` had it with the inputs ``digest``; it is then ours, too."""
        done, partial = self.step_folder(name), self.folder / "steps" / f".{name}.taken"
        for run in self._reuse:
            source = run / "steps" / name
            marker = read_step(source)
            if run == self.folder or marker is None or marker["inputs"] != digest:
                continue
            shutil.rmtree(partial, ignore_errors=True)
            try:
                copy_linked(source, partial, leave_out=MARKER)
            except FileNotFoundError:  # its run is just replacing or removing it
                marker = None
            if marker is None or read_step(source) != marker:
                shutil.rmtree(partial, ignore_errors=True)
                continue
            _sync_tree(partial)
            write_json(partial / MARKER, marker, strict=False)
            shutil.rmtree(done, ignore_errors=True)
            shutil.rmtree(done.with_name(f".{name}.partial"), ignore_errors=True)
            partial.rename(done)
            _sync(done.parent)
            return marker
        return None

    def is_done(self, name: str, inputs: object) -> bool:
        """Whether :meth:`step` would skip the work; a step that another run has finished is taken over at once."""
        digest, done = digest_of([to_json(inputs), __version__]), self.step_folder(name)
        marker = read_step(done)
        if marker is not None and marker["inputs"] == digest:
            return True
        with storage_errors(done):
            return self._take_over(name, digest) is not None

    def phase(self, name: str, *, jobs: int) -> Phase:
        """Show the progress of a phase: ``with run.phase("leave-one-out", jobs=9) as phase: phase.done("a")``."""
        return Phase(name, jobs=jobs)

    def log(self, **row: object) -> None:
        """Append one row to ``metrics.jsonl``, in one write."""
        line = json.dumps(to_json(row, strict=True), ensure_ascii=False, allow_nan=False) + "\n"
        with storage_errors(self.folder / "metrics.jsonl"):
            handle = os.open(self.folder / "metrics.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                os.write(handle, line.encode())
            finally:
                os.close(handle)

    def report(self, step: int, **metrics: float) -> None:
        """Append intermediate ``metrics`` to ``metrics.jsonl`` and hand them to the run's reporter, if it has one.

        ``step`` grows from report to report, also over a kill and a resume. May raise :class:`StopEarly`: a search
        ends runs that fall behind here.
        """
        self.log(step=step, **metrics)
        if self._reporter is not None:
            self._reporter(step, metrics)

    def finish(
        self,
        *,
        metrics: Mapping[str, float],
        tables: Mapping[str, Sequence[Mapping[str, Any]]],
        artifacts: Mapping[str, str | Path] | None = None,
        lineage: Mapping[str, Any] | None = None,
    ) -> None:
        """Write ``results.json``.

        ``metrics`` must be the same for every run of this config: times and memory belong into a table. NaN and
        infinity become null. ``artifacts`` are paths within the run folder, written relative to it.
        """
        relative = {name: _within(self.folder, Path(path)) for name, path in (artifacts or {}).items()}
        results = {
            "recipe": self.recipe,
            "config_digest": self.digest,
            "seed": self.seed,
            "started": self._started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._clock, 3),
            "environment": environment(),
            "metrics": metrics,
            "tables": tables,
            "artifacts": relative,
            "lineage": lineage or {},
        }
        write_json(self.folder / "results.json", results)


def environment() -> dict[str, str]:
    """Versions of what a run's numbers may depend on, and the machine of the driver."""
    packages = ("ray", "torch", "transformers", "tokenizers", "datasets", "pyarrow", "numpy", "peft")
    versions = {name: importlib.metadata.version(name) for name in packages}
    machine = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    return {"isoray": __version__, "python": platform.python_version()} | versions | {"machine": machine}


def read_step(folder: Path) -> dict[str, Any] | None:
    """The marker of a finished step (``inputs``, ``seconds``, ``result``), or None when there is none."""
    marker = read_json(folder / MARKER)
    return marker if marker is not None and {"inputs", "seconds", "result"} <= marker.keys() else None


def read_json(path: Path) -> dict[str, Any] | None:
    """The JSON object in a file that :func:`write_json` wrote; None when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: Path, value: object, *, strict: bool = True) -> None:
    """Write ``value`` so that a reader sees the old file or all of the new one, also after a power cut.

    With ``strict``, NaN and infinity become null (JSON has no such numbers). Raises InfraError when the disk is full.
    """
    text = json.dumps(to_json(value, strict=strict), indent=1, ensure_ascii=False, allow_nan=not strict)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with storage_errors(path):
        try:
            with partial.open("w", encoding="utf-8") as file:
                file.write(text + "\n")
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync(path.parent)


def to_json(value: object, *, strict: bool = False) -> Any:
    """``value`` made of JSON's types: numpy and torch scalars and arrays, tuples, paths and models are converted.

    With ``strict``, NaN and infinity become None. Raises TypeError for anything else.
    """
    if value is None or type(value) in (str, bool, int):
        return value
    if isinstance(value, float):
        return None if strict and not math.isfinite(value) else float(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item, strict=strict) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value) if isinstance(value, set | frozenset) else value
        return [to_json(item, strict=strict) for item in items]
    if isinstance(value, Config):
        return to_json(value.model_dump(mode="json"), strict=strict)
    if isinstance(value, str | os.PathLike):
        return str(value)
    if hasattr(value, "tolist"):  # arrays and scalars of numpy, tensors of torch, without importing either
        return to_json(value.tolist(), strict=strict)
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r:.80}")


@contextmanager
def storage_errors(path: Path, *, forbidden: bool = False) -> Iterator[None]:
    """Turn a full or broken disk (with ``forbidden``, also a folder that cannot be) into an error for people."""
    try:
        yield
    except OSError as error:
        told: UserError | InfraError | None = storage_error(error, path)
        if forbidden and error.errno in UNUSABLE_ERRNOS:
            told = UserError(f"cannot write {path}: {error.strerror}; choose another folder with --out")
        if told is None:
            raise
        raise told from error


def storage_error(error: OSError, path: Path | None = None) -> InfraError | None:
    """The error to tell a person for an OSError that is the fault of a full or broken disk; None when it is not."""
    where = error.filename or path or "the run folder"
    if error.errno in STORAGE_ERRNOS:
        return InfraError(f"cannot write {where}: {error.strerror}; make room, then run the same command again")
    return None


def _check_run_folder(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} is a file; expected a run folder: choose another with --out")
    if path.is_dir() and not (path / "config.json").exists() and any(p.name[0] != "." for p in path.iterdir()):
        raise UserError(f"{path} holds other files and no run (no config.json); choose a new folder with --out")


def _lock(folder: Path) -> int:
    """Hold an flock on the folder's lock file: the kernel lets go of it whatever way this process ends."""
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        told = f"{folder} is in use by {holder or 'another process'}; wait for it or choose --out"
        raise FolderInUse(told) from None
    except OSError as error:
        # Some network file systems have no locks; there, keeping two runs apart is up to the user.
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP):
            os.close(handle)
            raise
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
    return handle


def _read_digest(path: Path) -> str | None:
    value = read_json(path)
    return None if value is None else value.get("config_digest")


def _cut_torn_line(path: Path) -> None:
    """Drop the last line of a file when a kill left it half written."""
    if path.exists():
        content = path.read_bytes()
        if content and not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)


def _within(folder: Path, path: Path) -> str:
    return str(path.absolute().relative_to(folder)) if path.is_absolute() else str(path)


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
