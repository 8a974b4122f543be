"""Settings of an exploration, of what its texts are labelled with, and of the detection variant.

Defaults are those of the published code (Isonuma and Titov, 2025, and its repository), but for what is named as our
choice.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, StringConstraints, model_validator

from isoray.config.base import Component, Config, ExistingPath, Slot, nearest
from isoray.generation.contrast import Gamma
from isoray.generation.prompts import TablePrompts
from isoray.generation.sampling import SamplingConfig
from isoray.models.config import AdapterConfig
from isoray.training.optim import AdamWConfig, OptimizerConfig

Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
Labeller = Annotated[Component.Config, Slot("isoray.evaluation.labellers")]
Method = Literal["iterative", "static", "sampling", "ngram"]


class LearnConfig(Config):
    """How the reference learns each text that was found (the iterative method)."""

    optimizer: OptimizerConfig = AdamWConfig(lr=5e-5)
    """One step on each text; its state is kept from text to text."""
    clip_norm: float | None = Field(default=1.0, gt=0)
    """The norm of the whole gradient is clipped to it; null: not at all."""
    adapter: AdapterConfig | None = None
    """Learn with a LoRA adapter instead of all weights, where the optimizer's state would not fit. (Ours.)"""


class NgramConfig(Config):
    """The n-gram baseline: of texts sampled from the fine-tune, those that n-grams find least like the pre-trained
    model's. (Ours; reviewers of the paper asked for such a baseline.)"""

    pool: PositiveInt = 4
    """Texts that are sampled from each model for every text that is kept."""
    n: int = Field(default=3, ge=1, le=6)
    """Tokens of the longest n-gram."""


class ExploreConfig(Config):
    """How texts are found that show what is new."""

    methods: tuple[Method, ...] = ("iterative", "static", "sampling", "ngram")
    """`iterative`: the contrast with a reference that learns each text found. `static`: the contrast with the
    pre-trained model. `sampling`: the fine-tune alone. `ngram`: see there. Findings are told from the first one."""
    texts: PositiveInt = 100
    """Texts of each exploration."""
    seeds: PositiveInt = 1
    """Explorations by each method, each with a seed of its own."""
    explorers: PositiveInt = 1
    """Texts that are drawn side by side in the iterative method, before the reference learns them all. 1 is the
    published algorithm; more are quicker and see each other's texts later."""
    share_every: PositiveInt = 1
    """Texts that each explorer draws before what all have found is shared."""
    alpha: float = Field(default=0.1, ge=0, le=1)
    """Tokens below this share of the fine-tune's largest probability are left out."""
    gamma: Gamma = 1.0
    """Weight of the pre-trained model."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=255, beams=4, eos="forbid")
    """How texts are drawn: 256 tokens with the start token, none shorter; beam sampling on raw scores. `beams: 1` draws
    token by token. The baselines sample without beams."""
    prompt: str | None = None
    """What each text goes on from; default: the start-of-text token alone."""
    learn: LearnConfig = LearnConfig()
    """How the reference learns."""
    ngram: NgramConfig = NgramConfig()
    """The n-gram baseline."""
    control: PositiveInt = 32
    """Texts sampled from the fine-tune alone that tell whether anything is new, before any is looked for. (Ours.)"""
    nothing_below: float = Field(default=1e-3, ge=0)
    """Nothing is new if the divergence of the fine-tune from the pre-trained model on these texts, with its interval,
    is below so many nats a token. (Ours.)"""
    batch: PositiveInt = 16
    """Texts that a worker draws together with beams, where they do not wait for each other; without beams, as many as
    take as much room."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if not self.methods or len(set(self.methods)) < len(self.methods):
            raise ValueError("`methods` needs at least one method, and each once")
        if self.alpha == 0 and self.gamma > 0:
            raise ValueError(
                "alpha is 0: without a limit to what is plausible the contrast is largest where both models find a "
                "token all but impossible; give the published 0.1, or gamma 0"
            )
        if self.sampling.alpha is not None or self.sampling.gamma is not None:
            raise ValueError("set `alpha` and `gamma` beside `sampling`, not in it")
        return self


class DomainConfig(Config):
    """A domain, by what a labeller calls it."""

    by: str
    """Name of the labeller, of `labels`."""
    label: str
    """What it says of texts of this domain."""


class JudgeConfig(Config):
    """What is said of the texts found."""

    labels: dict[Name, Labeller] = Field(default_factory=dict)
    """What labels each text, by a name of your own."""
    domains: dict[Name, DomainConfig] = Field(default_factory=dict)
    """The new domains, where they are known: what precision and coverage count. The first that fits is a text's."""
    chars: PositiveInt | None = None
    """Label so many characters from the start of a text; null: all of it."""
    findings: PositiveInt = 10
    """Most groups that the texts are sorted into for people."""
    words: PositiveInt = 12
    """Words that are shown of each group."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        for name, domain in self.domains.items():
            if domain.by not in self.labels:
                hint = nearest(domain.by, self.labels) if self.labels else "there are none"
                raise ValueError(f"domains.{name}.by names {domain.by!r}, which is no labeller of `labels`; {hint}")
        return self


class ExamplesConfig(TablePrompts):
    """Texts of one kind, for the detection variant."""

    column: str = "text"
    """Column with the text; of text files, their lines."""
    limit: PositiveInt | None = 50
    """Use so many texts, drawn at random by the run's seed."""
    new: bool = False
    """Whether they are of a domain that only the fine-tune has learnt."""


class DetectionConfig(Config):
    """The detection variant: given examples, some of them of the new domains, are ranked by how new they are."""

    root: ExistingPath = "."
    """Folder on which relative paths hang."""
    examples: dict[Name, ExamplesConfig] = Field(min_length=2)
    """Examples by kind."""
    tokens: int = Field(default=256, ge=2)
    """So many tokens of each are looked at."""

    @model_validator(mode="after")
    def _both_kinds(self) -> Self:
        if len({examples.new for examples in self.examples.values()}) < 2:
            raise ValueError("`examples` need some that are `new` and some that are not")
        return self
