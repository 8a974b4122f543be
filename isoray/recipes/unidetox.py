"""UniDetox: detoxify any language model with one small set of distilled text.

Lu, Isonuma, Mori and Sakata, "UniDetox: Universal Detoxification of Large Language Models via Dataset Distillation"
(ICLR 2025, arXiv 2504.20500). A base model learns toxic text; texts are drawn from the contrast of the base with that
toxic copy; any target model is fine-tuned on these texts, with one setting for all; what that did, and what it cost, is
measured beside baselines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from isoray.config.base import ExistingPath, nearest
from isoray.corpora.config import CorporaConfig, CorpusConfig
from isoray.detoxification.baselines import Baselines
from isoray.detoxification.comparison import Comparison, compare
from isoray.detoxification.config import (
    BaselinesConfig,
    DetoxConfig,
    DistilConfig,
    EvaluationConfig,
    GivenTexts,
    NullLeavesOut,
    ToxicConfig,
    WatchConfig,
)
from isoray.detoxification.deviations import deviations
from isoray.detoxification.located import check_models, locate_evaluation, locate_tables
from isoray.detoxification.measure import (
    Candidate,
    Measuring,
    check_questions,
    evaluation_prompts,
    judges_of,
    read_table,
)
from isoray.detoxification.tables import Prompts, Results, metrics_of
from isoray.detoxification.texts import TEXTS, ContrastJudge, TextSet, contrast_of, draw, give, write_texts
from isoray.detoxification.watch import Watch
from isoray.errors import DataError
from isoray.generation.contrast import ContrastConfig
from isoray.generation.job import engine_of
from isoray.models.config import ModelConfig
from isoray.recipes.base import Recipe
from isoray.run import Run
from isoray.scaling import ScalingConfig
from isoray.training.config import ComputeConfig
from isoray.training.loop import Step
from isoray.training.phases import Trained
from isoray.workshop import Training, Workshop, open_workshop

Name = Annotated[str, StringConstraints(pattern=r"^\w[\w.-]*$")]
EXAMPLES = 8
"""Prompts whose continuations the results show."""


class UniDetox(Recipe):
    """Detoxification of any model with distilled text, measured beside baselines."""

    class Config(Recipe.Config):
        """A UniDetox run."""

        kind: Literal["unidetox"] = "unidetox"
        """Detoxification with distilled text."""
        root: ExistingPath = "."
        """Folder on which relative paths of texts, prompts and questions hang; corpora take it unless they have one."""
        base: ModelConfig
        """The model that text is distilled from."""
        toxic: ToxicConfig | None = None
        """Step 1: its toxic copy; null where only given texts are used."""
        distil: DistilConfig | None = None
        """Step 2: texts from their contrast; null: only given ones are used."""
        given: Annotated[dict[Name, GivenTexts], NullLeavesOut()] = Field(default_factory=dict)
        """Further text sets that exist already, by name, such as the authors' own."""
        targets: dict[Name, ModelConfig] = Field(min_length=1)
        """Step 3: the models to detoxify, by name; each is fine-tuned on each text set."""
        detox: DetoxConfig = DetoxConfig()
        """How they learn the texts."""
        baselines: BaselinesConfig = BaselinesConfig()
        """What they are compared with."""
        evaluation: EvaluationConfig
        """Step 4: how all of them are measured."""
        watch: WatchConfig | None = None
        """Looks at the toxicity of targets while they are fine-tuned; searches use them."""
        compute: ComputeConfig = ComputeConfig()
        """How models are computed in training."""
        scaling: ScalingConfig = ScalingConfig()
        """`workers`: data-parallel workers of each training. With 1, `lanes` trainings, and engines, work side by
        side."""

        @model_validator(mode="before")
        @classmethod
        def _corpora_hang_on_root(cls, data: Any) -> Any:
            if not isinstance(data, Mapping):
                return data
            data = dict(data)
            if "root" not in data:
                return data
            for section, key in (("toxic", "corpora"), ("baselines", "non_toxic")):
                held = data.get(section)
                if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
                    data[section] = {**held, key: {"root": data["root"], **held[key]}}
            return data

        @model_validator(mode="after")
        def _possible(self) -> Self:
            if self.distil is None and not self.given:
                raise ValueError("there is no text to learn: give `distil`, or text sets under `given`")
            if self.distil is not None and self.toxic is None:
                raise ValueError("`distil` contrasts the base model with a toxic one: give `toxic`")
            if unknown := sorted(self.detox.start.keys() - self.targets.keys()):
                hint = nearest(unknown[0], self.targets)
                raise ValueError(f"detox.start names {unknown[0]!r}, which is no target; {hint}")
            if (wanted := self.baselines.needs_toxic) and self.toxic is None:
                raise ValueError(f"baselines.{wanted[0]} needs toxic text: give `toxic`")
            learn = [name for name in ("gradient_ascent", "lm_steer") if name in wanted]
            if learn and self.toxic is not None and self.toxic.corpora is None:
                raise ValueError(f"baselines.{learn[0]} learns from toxic text: give `toxic.corpora`, not a model")
            return self

        @model_validator(mode="after")
        def _names_differ(self) -> Self:
            methods = ["base", "toxic", "unidetox", *BaselinesConfig.model_fields]
            methods += [f"unidetox-{name}" for name in self.given]
            for join in ("{target}-{method}", "{method}-{target}"):  # of results, of trainings
                names = [join.format(target=target, method=method) for target in self.targets for method in methods]
                if twice := sorted({name for name in names if names.count(name) > 1}):
                    raise ValueError(f"two methods or models would be called {twice[0]!r}: rename targets or `given`")
            return self

    config: Config

    def run(self, run: Run) -> None:
        """Toxic model, texts, detoxified models and baselines, measurements."""
        config = _located(self.config)
        evaluation, seed = config.evaluation, config.seed
        prompts = evaluation_prompts(evaluation, seed=seed)
        check_questions(evaluation, seed=seed)
        given = {name: _texts(name, table, seed) for name, table in config.given.items()}
        with open_workshop(run, scaling=config.scaling, compute=config.compute, seed=seed) as shop:
            base = shop.prepare("base", config.base)
            targets = {name: shop.prepare(f"target-{name}", model) for name, model in config.targets.items()}
            baselines = Baselines(config.baselines, config.toxic, shop)
            for name, folder in targets.items():
                baselines.check(folder, is_base=shop.digests[f"target-{name}"] == shop.digests["base"])
            judging = evaluation.perplexity
            judges = judges_of(evaluation, base if judging is None else shop.prepare("perplexity", judging))
            measuring = Measuring(evaluation, prompts, judges, seed)

            toxic = self._toxic(shop, base)
            judge = self._judge(base, toxic)
            sets = self._distil(shop, judge, given)
            candidates = self._detoxify(shop, targets, toxic, sets, baselines)
            measured = measuring.measure(shop, candidates)
            comparison = self._compare(shop, judge, sets)
        results = Results(measured, Prompts.of(prompts, evaluation.seeds), evaluation, seed=seed)
        self._finish(shop, results, sets, comparison)

    def _toxic(self, shop: Workshop, base: Path) -> Path | None:
        """Step 1: the toxic copy of the base model."""
        toxic = self.config.toxic
        if toxic is None:
            return None
        if toxic.model is not None:
            return shop.prepare("toxic", ModelConfig(path=toxic.model))
        assert toxic.corpora is not None
        stores = shop.stores(toxic.corpora, base, "toxic.corpora")
        training = Training(base, self.config.base, {"train": stores}, toxic.training)
        return shop.train("toxic model", {"toxic": training})["toxic"].model

    def _distil(
        self, shop: Workshop, judge: ContrastJudge | None, given: Mapping[str, list[str]]
    ) -> dict[str, TextSet]:
        """Step 2: the text sets that targets learn, by what the method is called with each."""
        distil, sets = self.config.distil, dict[str, TextSet]()
        if distil is not None:
            assert judge is not None
            generation = contrast_of(distil, judge, shop.seed)
            drawn = draw(shop, "distil", generation, prompt=distil.prompt, count=distil.texts, judge=judge)
            sets["unidetox"] = write_texts(shop.run, "unidetox", drawn, judge=judge, config=distil.screen)
        for name, texts in given.items():
            taken = give(shop, f"given-{name}", texts, judge=None)
            method, checks = f"unidetox-{name}", self.config.given[name].screen
            sets[method] = write_texts(shop.run, method, taken, judge=None, config=checks)
        for method, written in sets.items():
            if not (counts := written.counts)["learnt"]:
                raise DataError(f"{method}: none of {counts['texts']} texts passed the screen; see {written.folder}")
        return sets

    def _detoxify(
        self,
        shop: Workshop,
        targets: Mapping[str, Path],
        toxic: Path | None,
        sets: Mapping[str, TextSet],
        baselines: Baselines,
    ) -> list[Candidate]:
        """Step 3: the targets, detoxified, and the baselines of each."""
        options = self.config.targets
        trainings: dict[str, Training] = {}
        steps = 0
        for name, folder in targets.items():
            for method, one in sets.items():
                training = self._detox(shop, name, folder, method, one, after=steps)
                trainings[f"{method}-{name}"] = training
                steps += training.steps
            known = toxic if shop.digests[f"target-{name}"] == shop.digests["base"] else None
            trainings |= baselines.trainings(name, folder, options[name], known)
        trained = {name: one.model for name, one in shop.train("fine-tuning", trainings).items()}
        found = []
        for name, folder in targets.items():
            found.append(Candidate(name, "base", ContrastConfig(positive=str(folder))))
            for method in sets:
                found.append(Candidate(name, method, ContrastConfig(positive=str(trained[f"{method}-{name}"]))))
            found += baselines.candidates(name, folder, options[name], trained)
        return found

    def _detox(self, shop: Workshop, target: str, folder: Path, method: str, one: TextSet, *, after: int) -> Training:
        """The training of a target on a text set; ``after``: steps of the trainings before, for its reports."""
        config = self.config
        corpora = CorporaConfig(
            train=(CorpusConfig(name=method, path=str(one.learnt)),),
            length=config.detox.length,
            packing=False,
            loss_on_padding=config.detox.loss_on_padding,
        )
        stores = shop.stores(corpora, folder, method)
        started = config.detox.start.get(target)
        start = folder if started is None else shop.prepare(f"start-{target}", ModelConfig(path=started))
        training = Training(start, config.targets[target], {"train": stores}, config.detox.training)
        if config.watch is None:
            return training

        def report(step: Step) -> None:
            if step.evaluation:
                names = {f"{name}/{target}-{method}": value for name, value in step.evaluation.items()}
                shop.run.report(after + step.step, **names)

        here = shop.trainings(1).executor == "inprocess"
        return replace(
            training,
            training=training.training.model_copy(update={"evaluate_every": config.watch.every}),
            evaluator=Watch(config.watch, _located(config).evaluation, config.seed),
            on_step=report if here else None,
        )

    def _judge(self, base: Path, toxic: Path | None) -> ContrastJudge | None:
        """What scores texts by the contrast of base and toxic model; None where there is none."""
        distil = self.config.distil
        if toxic is None or distil is None:
            return None
        return ContrastJudge(engine_of(distil.engine), ContrastConfig(positive=str(base), negative=str(toxic)))

    def _compare(self, shop: Workshop, judge: ContrastJudge | None, sets: Mapping[str, TextSet]) -> Comparison:
        distil = self.config.distil
        if distil is None or judge is None or not distil.compared:
            return Comparison()
        return compare(shop, distil, judge, sets, length=self.config.detox.length)

    def _finish(self, shop: Workshop, results: Results, sets: Mapping[str, TextSet], comparison: Comparison) -> None:
        config, models = self.config, results.model_rows()
        told = deviations(config.toxic, config.distil, config.detox, config.evaluation)
        shop.run.finish(
            metrics=metrics_of(models) | comparison.metrics,
            tables={
                "models": models,
                "groups": list(results.group_rows()),
                "texts": [_text_row(one, comparison) for one in sets.values()],
                "words": comparison.words,
                "examples": list(results.example_rows(list(sets), EXAMPLES)),
                "text_examples": [row for one in sets.values() for row in _text_examples(one)],
                "trainings": [_training_row(name, trained) for name, trained in shop.trained.items()],
                "deviations": [{"deviation": line} for line in told],
            },
            artifacts={f"texts/{name}": one.folder / TEXTS for name, one in sets.items()}
            | {f"model/{name}": trained.model for name, trained in shop.trained.items()},
            lineage={"models": shop.digests},
        )


def _located(config: UniDetox.Config) -> UniDetox.Config:
    """``config`` with the paths of texts, prompts, questions and scorers hung on `root`. UserError for what is not
    there, models included."""
    check_models(
        {
            "base.path": config.base,
            **{f"targets.{name}.path": model for name, model in config.targets.items()},
            "evaluation.perplexity.path": config.evaluation.perplexity,
            "toxic.model": config.toxic.model if config.toxic is not None else None,
            **{f"detox.start.{name}": path for name, path in config.detox.start.items()},
        }
    )
    return config.model_copy(
        update={
            "evaluation": locate_evaluation(config.evaluation, config.root),
            "given": locate_tables(config.given, "given", config.root),
        }
    )


def _texts(name: str, given: GivenTexts, seed: int) -> list[str]:
    return [row["prompt"] for row in read_table(given, f"given.{name}", seed=seed)]


def _text_row(one: TextSet, comparison: Comparison) -> dict[str, Any]:
    counts = dict(one.counts)
    found = counts.pop("found")
    return {
        "set": one.name,
        **counts,
        **comparison.values.get(one.name, {}),
        **{f"found/{k}": v for k, v in found.items()},
    }


def _text_examples(one: TextSet, count: int = 3) -> list[dict[str, Any]]:
    """Some texts, those with the highest contrast score first."""
    rows = [row for row in one.read().to_pylist() if row["learnt"]]
    rows.sort(key=lambda row: -(row.get("log_ratio") or 0.0))
    return [{"set": one.name, "text": row["text"], "log_ratio": row.get("log_ratio")} for row in rows[:count]]


def _training_row(name: str, trained: Trained) -> dict[str, Any]:
    last = trained.log[-1] if trained.log else {}
    return {
        "name": name,
        "steps": last.get("of"),
        "loss": last.get("loss"),
        "seconds": trained.seconds,
        "peak_memory_mb": trained.peak_memory_mb,
    }
