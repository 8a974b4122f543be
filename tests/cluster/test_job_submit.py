"""UnTrac as a job on a head that `ray start` started: the numbers of `isoray run`, a readable log, an honest status."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest
from untrac_runs import numbers, reference

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
CONFIG = "tests/configs/untrac.yaml"
BOUND_S = 240.0


@pytest.fixture(scope="module")
def head() -> Iterator[str]:
    """Address of the dashboard of a head with 4 CPUs; `ray stop` would end other people's heads, too."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(3)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        port, dashboard, agent = (str(free.getsockname()[1]) for free in sockets)
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="ray-", ignore_cleanup_errors=True) as folder:
        options = {
            "node-ip-address": "127.0.0.1",
            "port": port,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": dashboard,
            "dashboard-agent-listen-port": agent,
            "temp-dir": folder,
            "num-cpus": "4",
            "object-store-memory": str(100 * 2**20),
        }
        process = subprocess.Popen(
            [*RAY, "start", "--head", "--block", *(f"--{name}={value}" for name, value in options.items())],
            env=environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for_answer(int(dashboard), process)
            yield f"http://127.0.0.1:{dashboard}"
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.terminate()
            psutil.wait_procs([psutil.Process(process.pid)], timeout=10)
            for member in family:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            process.kill()
            process.wait()


def environment() -> dict[str, str]:
    """Without RAY_ADDRESS; jobs find this Python as `python`."""
    kept = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "PYTHONPATH")}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")])
    return kept | {"PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}


def wait_for_answer(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + BOUND_S
    while True:
        assert process.poll() is None, "`ray start` ended"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the head did not start"
            time.sleep(0.2)


def submit(head: str, *arguments: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """`ray job submit --working-dir .` as the README has it; what it showed, and the job's status afterwards."""
    from ray.job_submission import JobSubmissionClient

    name = f"job-{time.monotonic_ns()}"
    options = ["--address", head, "--working-dir", ".", "--submission-id", name]
    line = [*RAY, "job", "submit", *options, "--", "python", "jobs/untrac.py", CONFIG, *arguments]
    shown = subprocess.run(
        line, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=BOUND_S, check=False
    )
    return shown, JobSubmissionClient(head).get_job_status(name).value


def test_a_submitted_run_gives_the_same_numbers_and_a_readable_log(head: str, tmp_path: Path) -> None:
    shown, status = submit(head, "--out", str(tmp_path / "run"))
    assert (shown.returncode, status) == (0, "SUCCEEDED"), shown.stdout + shown.stderr
    assert numbers(tmp_path / "run") == reference()
    assert (tmp_path / "run" / "report.html").exists()
    for phase in ("corpora", "training", "leave-one-out", "unlearning", "gradients", "Hessians"):
        assert f"{phase}: done in" in shown.stdout
    log = shown.stdout.partition("Tailing logs")[2].splitlines()
    assert str(tmp_path / "run") in shown.stdout
    assert "\r" not in shown.stdout and "\x1b[" not in "".join(log[:-4]), "no progress bar redraws itself in a log"
    assert len(log) < 120


def test_a_failing_run_ends_as_failed_with_its_message_in_the_log(head: str, tmp_path: Path) -> None:
    """It is kept in a folder that outlives the job, whose working folder is a copy that Ray removes."""
    relative = f"{os.path.relpath(tmp_path, Path.home())}/runs"
    shown, status = submit(head, "corpora.train.1.generator=accounting", f"storage.path={relative}")
    assert (shown.returncode, status) == (1, "FAILED")
    assert "error: synthetic corpus 'accounting' is unknown" in shown.stdout
    assert "Traceback" not in shown.stdout
    said = re.findall(r"^run [0-9a-f]+ in (.+)$", shown.stdout, flags=re.MULTILINE)
    assert len(set(said)) == 1, shown.stdout
    folder = Path(said[0])
    assert folder.resolve().parent == tmp_path / "runs"
    assert (folder / "config.json").exists()
