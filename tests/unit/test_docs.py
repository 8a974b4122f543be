"""What README and docs/ say is there is there: files, links, configs, and the example of an objective."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from blocks import ragged
from torch import nn

from isoray.config.load import load
from isoray.corpora.stream import BlockStream
from isoray.errors import UserError
from isoray.objectives.base import Objective
from isoray.recipes.untrac import UnTrac
from isoray.training.config import TrainingConfig
from isoray.training.loop import train
from isoray.training.optim import SgdConfig
from isoray.training.parallel import Parallel

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"`((?:isoray|tests|configs|jobs|benchmarks|docs)/[\w./-]*)`", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_the_config_of_the_readme_is_valid(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (text,) = blocks(ROOT / "README.md", "yaml")
    Path("mine.yaml").write_text(text)
    config = load("mine.yaml", ["untrac.optimizer.lr=1e-5", "sample.seeds=4"]).config
    assert isinstance(config, UnTrac.Config)
    assert [corpus.name for corpus in config.corpora.train] == ["wiki", "news", "web"]
    assert config.untrac is not None and config.untrac.optimizer.lr == 1e-5


def test_the_example_of_an_objective_works(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_model: Callable[..., nn.Module]
) -> None:
    (code,) = blocks(ROOT / "docs" / "architecture.md", "python")
    (tmp_path / "my_losses.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = ["objective.kind=my_losses:Unknown", "objective.margin=0.2"]
    config = load("untrac/quickstart", overrides).config
    assert isinstance(config, UnTrac.Config)
    objective = Objective.build(config.objective)
    training = TrainingConfig(steps=20, batch_size=8, optimizer=SgdConfig(lr=0.05), log_every=1)
    streams = {"train": BlockStream([ragged("a", 8, seed=1)], batch_size=8, seed=0)}
    steps = list(train(Parallel(tiny_model()), objective, streams, training, seed=0, pad_token_id=0))
    assert steps[-1].terms["nll"] < steps[0].terms["nll"] - 0.01
    with pytest.raises(UserError, match="did you mean 'margin'"):
        load("untrac/quickstart", ["objective.kind=my_losses:Unknown", "objective.margn=0.2"])
