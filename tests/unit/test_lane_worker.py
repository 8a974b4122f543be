"""How a worker's failures travel to the driver, without Ray."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from isoray.errors import DataError, InfraError, IsorayError, NumericError, PolicyError, UserError
from isoray.training.lane_worker import RemoteTraceback, as_json, failed

sys.path.insert(0, str(Path(__file__).parents[1]))
from lane_doubles import LocalError


class Unbuildable(DataError):
    """An error of ours that pickle cannot build again, because it wants more than a message."""

    def __init__(self, file: str, line: int) -> None:
        super().__init__(f"{file}:{line} is broken")


def caught(error: Exception) -> Exception:
    try:
        raise error
    except Exception as raised:  # noqa: BLE001 - any is what this is about
        return failed(raised).error()


@pytest.mark.parametrize("kind", [UserError, DataError, PolicyError, NumericError, InfraError, KeyError, OSError])
def test_an_error_keeps_its_class_message_and_traceback(kind: type[Exception]) -> None:
    error = caught(kind("what it says"))
    assert type(error) is kind
    assert error.args == ("what it says",)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in caught" in str(error.__cause__)


def test_an_error_that_cannot_be_pickled_becomes_the_nearest_that_can() -> None:
    assert type(caught(Unbuildable("a.jsonl", 3))) is DataError
    assert str(caught(Unbuildable("a.jsonl", 3))) == "a.jsonl:3 is broken"
    assert type(caught(LocalError("this", "that"))) is IsorayError

    class Foreign(Exception):
        pass

    assert str(caught(Foreign("boo"))) == "Foreign: boo"


def test_only_broken_collectives_are_taken_for_an_echo() -> None:
    closed = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]")
    assert failed(closed).peer
    assert not failed(RuntimeError("mat1 and mat2 shapes cannot be multiplied")).peer
    assert not failed(NumericError("loss is NaN")).peer


def test_results_are_given_as_they_read_back() -> None:
    assert as_json("job", {"pair": (1, 2.5), 3: Path("a")}) == {"pair": [1, 2.5], "3": "a"}
    with pytest.raises(NumericError, match="job job ended"):
        as_json("job", {"losses": [1.0, float("inf")]})
