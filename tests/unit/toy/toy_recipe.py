"""A recipe of two steps that needs neither torch nor Ray; `fail` says how it is to end."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator
from toy_parts.fast import Fast

from isoray.config.base import Component, Config, ExistingPath, Slot
from isoray.errors import DataError, InfraError, NumericError, PolicyError
from isoray.recipes.base import Recipe
from isoray.run import Run

FAILURES: dict[str, BaseException] = {
    "data": DataError("corpus 'wiki': no column 'text'; found: body"),
    "policy": PolicyError("corpus 'wiki' has no license"),
    "numeric": NumericError("the loss is NaN at step 3"),
    "infra": InfraError("all lanes were lost"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "bug": ZeroDivisionError("division by zero"),
    "interrupt": KeyboardInterrupt(),
}


class Circle(Config):
    kind: Literal["circle"]
    radius: float = 1.0


class Square(Config):
    kind: Literal["square"]
    side: float = 1.0


class TrainingConfig(Config):
    steps: int = Field(default=10, gt=0)
    """Optimizer steps."""
    learning_rate: float = Field(default=1e-3, gt=0, lt=1)
    """Step size."""
    schedule: Literal["constant", "linear"] = "constant"
    """Shape of the learning rate."""

    @model_validator(mode="after")
    def _short(self) -> TrainingConfig:
        if self.steps > 1000 and self.schedule == "linear":
            raise ValueError("linear schedules have at most 1000 steps")
        return self


class Toy(Recipe):
    class Config(Recipe.Config):
        root: ExistingPath = "."
        """Where the data is."""
        corpora: list[str] = ["a", "b"]
        """Names."""
        training: TrainingConfig = TrainingConfig(steps=20)
        """Training."""
        parts: list[TrainingConfig] = []
        """A list of models."""
        named: dict[str, TrainingConfig] = {}
        """A mapping of models."""
        engine: Annotated[Component.Config, Slot("toy_parts")] = Fast.Config(kind="fast", speed=2.0)
        """A slot."""
        shape: Annotated[Circle | Square, Field(discriminator="kind")] = Circle(kind="circle", radius=3.0)
        """A union."""
        fail: str | None = None
        """Which error to raise between the two steps."""

        @field_validator("parts", mode="before")
        @classmethod
        def _from_names(cls, value: Any) -> Any:
            return list(value.values()) if isinstance(value, dict) else value

    config: Config

    def run(self, run: Run) -> None:
        def count(folder: Path) -> int:
            (folder / "corpora.txt").write_text("\n".join(self.config.corpora))
            run.log(job="count", step=0)
            return len(self.config.corpora)

        (run.folder / "address.txt").write_text(str(run.address))
        counted = run.step("count", {"corpora": self.config.corpora}, count)
        if self.config.fail is not None:
            raise FAILURES[self.config.fail]
        score = run.step("score", {"seed": run.seed, "counted": counted}, lambda _: run.seed + counted / 10)
        run.finish(metrics={"score": score}, tables={"corpora": [{"corpus": c} for c in self.config.corpora]})
