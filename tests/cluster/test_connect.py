"""A Ray of our own: closed to others, gone afterwards; and joining clusters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from isoray.cluster import Cluster, connect
from isoray.errors import InfraError

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]

ALONE = """
import json, os, subprocess, sys
from pathlib import Path
import psutil, ray
from isoray.cluster import connect

@ray.remote(num_cpus=1)
def imports():
    import isoray, users_own
    return isoray.__file__, users_own.ANSWER

seen = {"before": dict(os.environ)}
me = psutil.Process()
for turn in range(2):  # a second Ray in one process must not trip over the first one's token
    with connect(cores=2) as cluster:
        seen["cpus"] = cluster.resources().cpus
        seen["isoray"], seen["answer"] = ray.get(imports.remote())
        seen["temp"] = ray._private.worker._global_node.get_temp_dir_path()
        family = me.children(recursive=True)
        with connect() as again:
            seen["nested"] = again.resources().cpus
        seen["open_after_nested"] = ray.is_initialized()
        address = ray.get_runtime_context().gcs_address
        if turn == 1:
            program = f"from isoray.cluster import connect\\nwith connect({address!r}): pass"
            stranger = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
            told = subprocess.run([sys.executable, "-c", program], env=stranger, capture_output=True, text=True).stderr
            seen["stranger"] = told
    seen["family"] = len(family)
    seen["left"] = [p.name() for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
seen["temp_left"] = Path(seen["temp"]).exists()
seen["after"] = dict(os.environ)
print(json.dumps(seen))
"""


def test_a_ray_of_our_own_is_closed_to_others_and_leaves_nothing(tmp_path: Path) -> None:
    home, elsewhere, code = tmp_path / "home", tmp_path / "elsewhere", tmp_path / "code"
    for folder in (home, elsewhere, code):
        folder.mkdir()
    (code / "users_own.py").write_text("ANSWER = 42\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PYTHONPATH": f"{ROOT}{os.pathsep}{code}"}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["cpus"] == seen["nested"] == 2
    assert Path(seen["isoray"]).is_relative_to(ROOT)
    assert seen["answer"] == 42
    assert seen["open_after_nested"]
    assert "InfraError: no Ray cluster answers" in seen["stranger"]
    assert "token" in seen["stranger"]
    assert seen["family"] > 3
    assert seen["left"] == []
    assert not seen["temp_left"]
    assert not (home / ".ray").exists()
    assert seen["after"] == seen["before"]


def test_folders_of_killed_runs_are_removed_and_those_of_live_ones_are_not(tmp_path: Path) -> None:
    program = "from isoray.cluster import connect\nwith connect(cores=1):\n print('up', flush=True); input()"
    killed = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert killed.stdout is not None
        assert killed.stdout.readline() == "up\n"
        abandoned = folder_of(killed.pid)
        with connect(cores=1):
            own = folder_of(os.getpid())
            assert abandoned.is_dir()
            assert own.is_dir()
            assert own != abandoned
        assert not own.exists()
        assert abandoned.is_dir()
    finally:
        killed.kill()
        killed.wait()
    with connect(cores=1):
        assert not (abandoned / "owner.lock").exists()


def folder_of(pid: int) -> Path:
    """The folder whose lock a process holds open."""
    links = (os.readlink(link) for link in Path(f"/proc/{pid}/fd").iterdir() if link.is_symlink())
    return next(Path(link).parent for link in links if link.endswith("owner.lock"))


def test_an_address_where_no_cluster_answers_is_a_named_error() -> None:
    started = time.monotonic()
    with pytest.raises(InfraError, match=r"no Ray cluster answers at '127.0.0.1:1'"), connect("127.0.0.1:1"):
        pass
    assert time.monotonic() - started < 60


def test_auto_without_a_cluster_is_a_named_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if subprocess.run(["pgrep", "gcs_server"], check=False, capture_output=True).returncode == 0:
        pytest.skip("another Ray is running on this machine; `auto` would join it")
    with pytest.raises(InfraError, match="no Ray cluster answers at 'auto'"), connect("auto"):
        pass


def test_a_cluster_sees_only_nodes_that_are_alive_and_cores_that_are_real() -> None:
    with connect(cores=3) as cluster:
        assert cluster.address is None
        assert cluster.resources().cpus == 3
        assert [node.cpus for node in Cluster("joined").resources().nodes] == [5]  # with those for helpers
