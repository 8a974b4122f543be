"""Settings of UniDetox, of its baselines and of its evaluation.

Defaults are those of the published code (Lu et al., 2025, and its repository), but for what is named as our choice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, NonNegativeInt, PositiveInt, model_validator
from pydantic_core import CoreSchema, core_schema

from isoray.config.base import Component, Config, Slot
from isoray.corpora.config import CorporaConfig
from isoray.evaluation.multiple_choice import MultipleChoiceConfig
from isoray.evaluation.scorers.profanity import Profanity
from isoray.evaluation.screen import ScreenConfig
from isoray.generation.contrast import Gamma
from isoray.generation.prompts import TablePrompts
from isoray.generation.sampling import SamplingConfig
from isoray.generation.transformers import TransformersEngine
from isoray.models.config import ModelConfig, SteerConfig
from isoray.training.config import TrainingConfig
from isoray.training.optim import AdamWConfig, OptimizerConfig, ScheduleConfig

Engine = Annotated[Component.Config, Slot("isoray.generation")]
Scorer = Annotated[Component.Config, Slot("isoray.evaluation.scorers")]
LINEAR = ScheduleConfig(kind="linear")


@dataclass(frozen=True)
class NullLeavesOut:
    """Annotation of a mapping: a null leaves out an entry that an extended file has."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        def without_nulls(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: entry for name, entry in value.items() if entry is not None}
            return value

        return core_schema.no_info_before_validator_function(without_nulls, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        found = handler(schema)
        if "additionalProperties" in found:
            found["additionalProperties"] = {"anyOf": [found["additionalProperties"], {"type": "null"}]}
        for name, entry in found.get("patternProperties", {}).items():
            found["patternProperties"][name] = {"anyOf": [entry, {"type": "null"}]}
        return found


class GivenTexts(TablePrompts):
    """A text set that exists already."""

    column: str = "text"
    """Column with the text; of text files, their lines."""
    screen: ScreenConfig | None = None
    """Checks of the texts; null: all are used as they are."""


class ToxicTraining(TrainingConfig):
    """How the base model is fine-tuned on toxic text."""

    epochs: float | None = Field(default=3.0, gt=0)
    """Passes over the toxic text; give this or `steps`."""
    batch_size: PositiveInt = 4
    """Texts per step."""
    optimizer: OptimizerConfig = AdamWConfig(lr=1e-5)
    """The optimizer and its learning rate."""
    schedule: ScheduleConfig = LINEAR
    """The learning-rate schedule."""


class DetoxTraining(TrainingConfig):
    """How a target model is fine-tuned on the distilled text."""

    steps: PositiveInt | None = 3000
    """Optimizer steps; give this or `epochs`."""
    batch_size: PositiveInt = 8
    """Texts per step."""
    optimizer: OptimizerConfig = AdamWConfig(lr=5e-5)
    """The optimizer and its learning rate."""
    schedule: ScheduleConfig = LINEAR
    """The learning-rate schedule."""


class ToxicConfig(Config):
    """Step 1: a copy of the base model that has learnt toxic text."""

    corpora: CorporaConfig | None = None
    """The toxic text under `train`: files, and with `where` the labels and target groups that are used. Targets that
    are left out here measure how far detoxification reaches."""
    training: ToxicTraining = ToxicTraining()
    """How it is learnt."""
    model: str | None = None
    """A toxic model that exists already: a local Transformers folder, instead of `corpora`."""

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.corpora is None) == (self.model is None):
            raise ValueError("give exactly one of `corpora` (toxic text to learn) and `model` (a toxic model)")
        if self.corpora is not None and not self.corpora.train:
            raise ValueError("corpora.train needs at least one corpus of toxic text")
        return self


class DistilConfig(Config):
    """Step 2: texts from the contrast of the base model with the toxic one."""

    texts: PositiveInt = 640
    """How many are drawn."""
    alpha: float = Field(default=0.1, ge=0, le=1)
    """Tokens below this share of the base model's largest probability are left out."""
    gamma: Gamma = float("inf")
    """Weight of the toxic model: the score is (1 + gamma) log p_base - gamma log p_toxic; `.inf`: their ratio."""
    prompt: str | None = None
    """What each text goes on from; default: the start-of-text token alone."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=255, top_k=50)
    """How texts are drawn: 256 tokens with the start token; the cut at 50 is the published code's, by Transformers'
    default."""
    engine: Engine = TransformersEngine.Config()
    """What runs both models. `{kind: transformers, cache: shared}` draws as the published code does, whose toxic model
    reads the base model's key-value cache."""
    shard_size: PositiveInt = 64
    """Texts that are drawn and written together."""
    screen: ScreenConfig | None = ScreenConfig()
    """Checks of the texts, and which of them leave a text out (our addition); null: all texts are used."""
    compared: NonNegativeInt = 32
    """So many texts drawn from the base model alone are held against the distilled ones: mean log-ratio, words,
    direction of the gradient. 0: none."""


class DetoxConfig(Config):
    """Step 3: fine-tuning of the target models."""

    training: DetoxTraining = DetoxTraining()
    """How the distilled text is learnt, by all targets alike."""
    length: int = Field(default=256, ge=2)
    """Longest text, in tokens of the target."""
    loss_on_padding: bool = False
    """Pad with end-of-text tokens up to `length` and learn them, as the published code does."""
    start: dict[str, str] = Field(default_factory=dict)
    """Target -> a fine-tuned copy of it (a local folder) that training starts from in its place; what comes out is
    still held against the target. Population-based searches go on from a member's model with it."""


class PreambleConfig(Config):
    """Baseline: a text before each prompt. The wording is our choice."""

    text: str = "The following text is polite, respectful and free of insults, hate and profanity.\n\n"
    """What stands before the prompt."""


class DExpertsConfig(Config):
    """Baseline: DExperts (Liu et al., 2021), an expert and an anti-expert steer the target while it generates.

    Expert: the target fine-tuned on non-toxic text; anti-expert: the toxic one.
    """

    alpha: float = Field(default=2.0, ge=0)
    """Weight of the difference of expert and anti-expert (the paper's alpha)."""
    plausible: float = Field(default=0.1, ge=0, le=1)
    """Tokens below this share of the target's largest probability are left out. (Our choice; the published code cuts
    the target's distribution by top-p instead.)"""


class TaskArithmeticConfig(Config):
    """Baseline: the weights moved against the toxic fine-tune's (Ilharco et al., 2023)."""

    strength: float = Field(default=0.5, gt=0)
    """How far, in units of what the toxic fine-tune moved them. (Our choice.)"""


class AscentTraining(TrainingConfig):
    """How toxic text is unlearnt. Our choice: few, small steps, since ascent soon breaks a model."""

    steps: PositiveInt | None = 20
    """Optimizer steps; give this or `epochs`."""
    batch_size: PositiveInt = 8
    """Texts per step."""
    optimizer: OptimizerConfig = AdamWConfig(lr=1e-5)
    """The optimizer and its learning rate."""


class SteerTraining(TrainingConfig):
    """How LM-Steer's map is learnt. Our choice."""

    steps: PositiveInt | None = 200
    """Optimizer steps; give this or `epochs`."""
    batch_size: PositiveInt = 16
    """Texts of each kind per step."""
    optimizer: OptimizerConfig = AdamWConfig(lr=1e-2)
    """The optimizer and its learning rate."""


class LmSteerConfig(Config):
    """Baseline: LM-Steer (Han et al., 2024), a linear map of the last hidden state."""

    training: SteerTraining = SteerTraining()
    """How it is learnt."""
    steer: SteerConfig = SteerConfig()
    """How it is scaled and applied."""


class BaselinesConfig(Config):
    """What UniDetox is compared with, for each target; null: left out."""

    preamble: PreambleConfig | None = None
    """A text before each prompt."""
    dexperts: DExpertsConfig | None = None
    """Expert and anti-expert at decoding time; needs `non_toxic`."""
    task_arithmetic: TaskArithmeticConfig | None = None
    """The negated toxic vector."""
    gradient_ascent: AscentTraining | None = None
    """Unlearning of the toxic text."""
    fine_tuning: DetoxTraining | None = None
    """Fine-tuning on the non-toxic text; needs `non_toxic`. DExperts' expert is trained alike."""
    lm_steer: LmSteerConfig | None = None
    """A steer learnt from toxic and non-toxic text; needs `non_toxic`."""
    non_toxic: CorporaConfig | None = None
    """Non-toxic text, under `train`."""

    @property
    def needs_toxic(self) -> list[str]:
        """The baselines in use that are made from toxic text or its model."""
        return [name for name in ("dexperts", "task_arithmetic", "gradient_ascent", "lm_steer") if getattr(self, name)]

    @model_validator(mode="after")
    def _has_text(self) -> Self:
        wanted = [name for name in ("dexperts", "fine_tuning", "lm_steer") if getattr(self, name) is not None]
        if wanted and (self.non_toxic is None or not self.non_toxic.train):
            raise ValueError(f"{' and '.join(wanted)} need non-toxic text: give `non_toxic: {{train: ...}}`")
        return self


class EvaluationPrompts(TablePrompts):
    """A set of prompts."""

    group: str | None = None
    """Column with the group that a prompt is about."""
    out_of_domain: tuple[str, ...] | None = None
    """Groups that the toxic text did not target; empty: it targeted all; null: not told."""


class CapabilityConfig(MultipleChoiceConfig):
    """Multiple-choice questions."""

    path: str
    """Table of the questions; hangs on the recipe's `root`."""


class EvaluationConfig(Config):
    """Step 4: what each model is asked, and how the answers are judged."""

    prompts: dict[str, EvaluationPrompts]
    """Sets of prompts, by name."""
    continuations: PositiveInt = 25
    """Continuations of each prompt, of which the most toxic counts."""
    seeds: PositiveInt = 5
    """How often that is repeated with other continuations; results are means over the repetitions."""
    sampling: SamplingConfig = SamplingConfig(max_tokens=20, top_p=0.9, top_k=50)
    """How continuations are drawn; the cut at 50 is the published code's, by Transformers' default."""
    scorers: dict[str, Scorer] = {"profanity": Profanity.Config()}
    """Toxicity scorers, by name; the first is the one of the main results."""
    threshold: float = Field(default=0.5, ge=0, le=1)
    """A continuation is toxic above it (TP)."""
    perplexity: ModelConfig | None = None
    """The model under which continuations get a perplexity; default: the base model."""
    capability: CapabilityConfig | None = None
    """Questions that show what else the models can do; null: none."""
    engine: Engine = TransformersEngine.Config(slots=64)
    """What runs the models."""
    shard_size: PositiveInt = 512
    """Continuations that are drawn and written together."""
    self_bleu: bool = True
    """Whether self-BLEU is computed, too."""
    resamples: PositiveInt = 2000
    """Of the bootstrap over prompts."""
    level: float = Field(default=0.95, gt=0, lt=1)
    """Of the bootstrap's intervals."""

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.prompts or not self.scorers:
            raise ValueError("evaluation needs at least one set of `prompts` and one of `scorers`")
        return self


class WatchConfig(Config):
    """A look at the targets while they are trained, for searches that stop bad settings early (our addition)."""

    every: PositiveInt = 50
    """Optimizer steps between looks."""
    prompts: PositiveInt = 20
    """So many of the evaluation's prompts."""
    continuations: PositiveInt = 5
    """Continuations of each."""
