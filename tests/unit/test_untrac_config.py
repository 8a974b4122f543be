"""What cannot be asked of UnTrac together is refused with the reason, before anything is read."""

from __future__ import annotations

import pytest

from isoray.config.load import load
from isoray.errors import UserError
from isoray.recipes.untrac import UnTrac


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corpora.test=[]"], "at least one corpus each"),
        (["truth=null", "untrac=null", "untrac_inv=null", "baselines.gradient=null"], "nothing to estimate"),
        (["corpora.length=4096"], r"corpora.length \(4096\) exceeds model.create.context"),
        (["training=null"], "`truth` needs the training that it repeats"),
        (["training=null", "truth=null", "baselines.tracin={checkpoint_every: 8}"], "`baselines.tracin` needs"),
        (["compute.parallel=fsdp", "scaling.workers_per_lane=2"], "`baselines` take gradients of a whole model"),
    ],
)
def test_impossible_together(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("untrac/quickstart", overrides)


def test_sharding_is_for_trainings_and_lanes_of_one_worker_whatever_the_baselines() -> None:
    for more in (["scaling.workers=2"], ["scaling.workers_per_lane=2", "baselines.gradient=null"]):
        config = load("untrac/quickstart", ["compute.parallel=fsdp", *more]).config
        assert isinstance(config, UnTrac.Config)
        assert config.compute.parallel == "fsdp"
