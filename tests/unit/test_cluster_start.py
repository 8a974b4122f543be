"""A Ray of our own that does not start."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from isoray import cluster
from isoray.errors import InfraError


def test_a_start_that_fails_is_told_in_one_message_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def make(**_: object) -> str:
        made.append(tmp_path / "own")
        made[-1].mkdir()
        return str(made[-1])

    def fail(**_: object) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(cluster.tempfile, "mkdtemp", make)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    told = r"did not start .* timed out during startup\. Run the same command again"
    with pytest.raises(InfraError, match=told), cluster.connect(cores=1):
        pytest.fail("there is no Ray")
    assert made and not made[0].exists()
