"""Contrastive Generative Exploration: what has a fine-tune newly learnt, without its data?

Isonuma and Titov, "What's New in My Data? Novelty Exploration via Contrastive Generation" (ICLR 2025, arXiv
2410.14765). Texts are drawn from the contrast of a fine-tuned model with the pre-trained one that it came from; in the
iterative method the pre-trained copy learns each of them, so that what was found stops being new. The texts are
labelled, sorted into a few findings for people, and counted against the new domains where these are known.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import model_validator

from isoray.config.base import Config, ExistingPath, digest_of
from isoray.corpora.config import CorporaConfig
from isoray.errors import UserError
from isoray.exploration import tables
from isoray.exploration.bench import OpenBench
from isoray.exploration.config import DetectionConfig, ExploreConfig, JudgeConfig
from isoray.exploration.control import Control, control
from isoray.exploration.detection import detect, read_examples
from isoray.exploration.deviations import deviations
from isoray.exploration.explore import Explorer, Found
from isoray.exploration.findings import findings
from isoray.exploration.labels import Labelling
from isoray.generation.transformers import TransformersEngine
from isoray.generation.vocabulary import shared_vocabulary
from isoray.models.config import ModelConfig
from isoray.models.load import load_tokenizer
from isoray.objectives.lm import LanguageModelling
from isoray.recipes.base import Recipe
from isoray.run import Run
from isoray.scaling import ScalingConfig
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.privacy import read_privacy
from isoray.workshop import Training, Workshop, open_workshop


class LearningConfig(Config):
    """A training of this run: what is learnt, and how. With `training.privacy`, differentially private."""

    corpora: CorporaConfig
    """The corpora, under `train`."""
    training: TrainingConfig
    """How they are learnt."""

    @model_validator(mode="after")
    def _some_corpus(self) -> Self:
        if not self.corpora.train:
            raise ValueError("corpora.train needs at least one corpus")
        return self


class Cge(Recipe):
    """Exploration of what a fine-tune has newly learnt."""

    class Config(Recipe.Config):
        """A CGE run."""

        kind: Literal["cge"] = "cge"
        """Contrastive Generative Exploration."""
        root: ExistingPath = "."
        """Folder on which relative paths of corpora and examples hang, unless they have one of their own."""
        base: ModelConfig
        """The pre-trained model. Its `adapter` is what a fine-tuning of this run trains."""
        pretraining: LearningConfig | None = None
        """Train `base` first; null: it is used as it is."""
        tuned: ModelConfig | None = None
        """Its fine-tune, of the same tokenizer; give this or `fine_tuning`."""
        fine_tuning: LearningConfig | None = None
        """Make the fine-tune: to try the method where it is known what is new."""
        explore: ExploreConfig = ExploreConfig()
        """How texts are found."""
        judge: JudgeConfig = JudgeConfig()
        """What is said of them."""
        detection: DetectionConfig | None = None
        """Rank given examples by how new they are; null: not done."""
        engine: TransformersEngine.Config = TransformersEngine.Config(slots=64)
        """What draws texts. The reference is trained inside it, so it is the Transformers engine."""
        compute: ComputeConfig = ComputeConfig()
        """How models are computed in training."""
        scaling: ScalingConfig = ScalingConfig()
        """`workers`: data-parallel workers of each training; `lanes`: workers that texts are drawn on."""

        @model_validator(mode="before")
        @classmethod
        def _tables_hang_on_root(cls, data: Any) -> Any:
            if not isinstance(data, Mapping) or "root" not in data:
                return data
            data = dict(data)
            for path in (("pretraining", "corpora"), ("fine_tuning", "corpora"), ("detection",)):
                data = _with_root(data, path, data["root"])
            labels = data["judge"].get("labels") if isinstance(data.get("judge"), Mapping) else None
            for name, labeller in labels.items() if isinstance(labels, Mapping) else ():
                if isinstance(labeller, Mapping) and labeller.get("kind") == "corpus":
                    data = _with_root(data, ("judge", "labels", name), data["root"])
            return data

        @model_validator(mode="after")
        def _possible(self) -> Self:
            if (self.tuned is None) == (self.fine_tuning is None):
                raise ValueError("give exactly one of `tuned` (a fine-tune) and `fine_tuning` (how to make one)")
            if self.base.create is not None and self.pretraining is None:
                raise ValueError("`base` is made from scratch: give `pretraining`, or a `path`")
            longest = self.explore.sampling.max_tokens + 1
            if self.base.create is not None and self.base.create.context < longest:
                raise ValueError(
                    f"base.create.context ({self.base.create.context}) cannot hold a text of "
                    f"explore.sampling.max_tokens and its start token ({longest})"
                )
            return self

    config: Config

    def run(self, run: Run) -> None:
        """Both models, a look at whether anything is new, explorations, labels, findings, detection."""
        config = self.config
        labelling = Labelling(config.judge)
        detection = config.detection
        examples = [] if detection is None else read_examples(detection, seed=config.seed)
        with open_workshop(run, scaling=config.scaling, compute=config.compute, seed=config.seed) as shop:
            base, tuned = self._models(shop)
            _check_pair(base, tuned)
            identical = shop.digests["base"] == shop.digests["tuned"]
            with shop.lanes(self._bench(base, tuned)) as lanes:
                explorer = Explorer(lanes, run, config.explore, config.seed, self._digest(shop))
                compared = control(explorer, config.explore, identical=identical)
                found: list[Found] = []
                if compared.is_new:
                    for method in config.explore.methods:
                        for number in range(config.explore.seeds):
                            found += explorer.explore(method, number)
                    found = explorer.tell(found)
                detected = [] if detection is None else detect(explorer, detection, examples)
        self._finish(shop, compared, found, labelling, detected, read_privacy(tuned))

    def _models(self, shop: Workshop) -> tuple[Path, Path]:
        """The folders of the pre-trained model and of the fine-tune."""
        config = self.config
        pretraining, fine_tuning = config.pretraining, config.fine_tuning
        base = shop.prepare("base", config.base, None if pretraining is None else pretraining.corpora)
        if pretraining is not None:
            base = self._train(shop, "base", base, pretraining)
        if fine_tuning is not None:
            return base, self._train(shop, "tuned", base, fine_tuning)
        assert config.tuned is not None
        return base, shop.prepare("tuned", config.tuned)

    def _train(self, shop: Workshop, name: str, start: Path, learning: LearningConfig) -> Path:
        stores = shop.stores(learning.corpora, start, f"{name}: corpora")
        options = self.config.base if name == "tuned" else self.config.base.model_copy(update={"adapter": None})
        # A private training bounds what one example does, so each weighs the same.
        average = "token" if learning.training.privacy is None else "example"
        objective = LanguageModelling.Config(average=average)
        training = Training(start, options, {"train": stores}, learning.training, objective)
        return shop.train(name, {name: training})[name].model

    def _bench(self, base: Path, tuned: Path) -> OpenBench:
        config = self.config
        return OpenBench(
            tuned=tuned,
            base=base,
            options=config.base.model_copy(update={"adapter": config.explore.learn.adapter}),
            engine=config.engine,
            learn=config.explore.learn,
            alpha=config.explore.alpha,
            gamma=config.explore.gamma,
            compute=config.compute,
            seed=config.seed,
        )

    def _digest(self, shop: Workshop) -> str:
        """Of all that the texts depend on beside their jobs."""
        config, explore = self.config, self.config.explore
        weights = [shop.digests[name] for name in ("base", "tuned")]
        settings = [one.model_dump(mode="json") for one in (config.engine, explore.learn, explore.ngram)]
        return digest_of([weights, settings, explore.alpha, str(explore.gamma), config.seed, config.compute.precision])

    def _finish(
        self,
        shop: Workshop,
        compared: Control,
        found: list[Found],
        labelling: Labelling,
        detected: list[dict[str, Any]],
        privacy: Mapping[str, Any] | None,
    ) -> None:
        config = self.config
        labelled = labelling.label([one.text for one in found])
        explored = tables.Explored(found, labelled, config.judge, config.explore)
        judge = config.judge
        told = findings(found, labelled, compared, most=judge.findings, words=judge.words, seed=config.seed)
        shop.run.finish(
            metrics=compared.metrics
            | explored.metrics()
            | tables.detection_metrics(detected)
            | ({} if privacy is None else {name: privacy[name] for name in ("epsilon", "delta")}),
            tables={
                "methods": explored.method_rows(),
                "curves": list(explored.curve_rows()),
                "domains": explored.domain_rows(),
                "findings": told.rows,
                "examples": told.examples,
                "texts": list(explored.text_rows(told.finding_of)),
                "detection": detected,
                "labellers": labelling.rows(),
                "trainings": tables.training_rows(shop.trained),
                "deviations": [{"deviation": line} for line in deviations(config.explore)],
            },
            artifacts={f"model/{name}": trained.model for name, trained in shop.trained.items()},
            lineage={"models": shop.digests},
        )


def _check_pair(base: Path, tuned: Path) -> None:
    """UserError for two models of different tokenizers, before anything is computed with them."""
    try:
        tokenizers = {"base": load_tokenizer(base), "tuned": load_tokenizer(tuned)}
        shared_vocabulary(tokenizers, {name: len(tokenizer) for name, tokenizer in tokenizers.items()})
    except UserError as error:
        raise UserError(
            f"base and tuned: {error} A fine-tune is contrasted with the model that it came from."
        ) from error


def _with_root(data: Mapping[str, Any], path: tuple[str, ...], root: Any) -> dict[str, Any]:
    """``data`` whose mapping at ``path`` has `root` unless it has one of its own."""
    if not path:
        return {"root": root, **data}
    held = data.get(path[0])
    return {**data, path[0]: _with_root(held, path[1:], root)} if isinstance(held, Mapping) else dict(data)
