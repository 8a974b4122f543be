"""Where the models of a run are prepared and trained, texts are drawn and judged; what one such training is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isoray.cluster import available
from isoray.config.base import Component, digest_of
from isoray.corpora.build import build
from isoray.corpora.config import CorporaConfig
from isoray.corpora.execute import Work, as_done
from isoray.corpora.sample import inputs_of, iterate_text
from isoray.corpora.store import BlockStore
from isoray.errors import UserError
from isoray.evaluation.judge import Judge, judge_missing, missing_judgements
from isoray.models.config import LoadOptions, ModelConfig
from isoray.models.load import LoadedModel, prepare, weights_digest
from isoray.objectives.lm import LanguageModelling
from isoray.run import Run
from isoray.scaling import Placement, Resources, ScalingConfig, plan, plan_training
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.fit import Fit
from isoray.training.lanes import Lanes, OpenBench, open_lanes
from isoray.training.loop import Evaluator, Step
from isoray.training.parallel import Ranks
from isoray.training.phases import LOG, Trained, train_each

LM = LanguageModelling.Config()


@dataclass(frozen=True)
class Training:
    """One model that is made by training another."""

    start: Path
    """Transformers folder."""
    options: LoadOptions
    corpora: Mapping[str, Sequence[BlockStore]]
    """By the objective's roles."""
    training: TrainingConfig
    objective: Component.Config = LM
    evaluator: Callable[[LoadedModel, Ranks], Evaluator] | None = None
    """A look at the model on the way; weights do not depend on it."""
    on_step: Callable[[Step], None] | None = None
    """Called with each report; only where the training runs in this process."""

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        rows = sum(len(store) for store in next(iter(self.corpora.values())))
        return self.training.total_steps(-(-rows // self.training.batch_size))

    def inputs(self, compute: ComputeConfig, seed: int) -> list[Any]:
        """All that the weights depend on, JSON-able."""
        options = self.options.model_dump(mode="json", include={"adapter", "steer", "dtype", "dropout", "layout"})
        digests = {role: [store.digest for store in stores] for role, stores in self.corpora.items()}
        return [weights_digest(self.start), digests, options, self.training, self.objective, compute.precision, seed]

    def fit(self, compute: ComputeConfig, seed: int) -> Callable[[Path], Fit]:
        """The training as a task for workers, once the folder of its step is known."""
        return lambda folder: Fit(
            start=self.start,
            out=folder,
            options=self.options,
            corpora={role: tuple(store.folder for store in stores) for role, stores in self.corpora.items()},
            evaluator=self.evaluator,
            objective=self.objective,
            training=self.training,
            compute=compute,
            seed=seed,
            log=folder / LOG,
            on_step=self.on_step,
        )


class Workshop:
    """The machines of a run, its folder, and the models that are made there."""

    def __init__(
        self, run: Run, resources: Resources, *, scaling: ScalingConfig, compute: ComputeConfig, seed: int
    ) -> None:
        self.run, self.seed = run, seed
        self.trained: dict[str, Trained] = {}
        """What was trained, by name."""
        self.digests: dict[str, str] = {}
        """Of the weights of every model, by name."""
        self._resources, self._scaling, self._compute = resources, scaling, compute

    def trainings(self, jobs: int) -> Placement:
        """Where ``jobs`` trainings run: side by side where each takes one worker, else one after the other."""
        if self._scaling.workers > 1:
            return plan_training(self._scaling, self._resources)
        return plan(self._scaling.model_copy(update={"workers_per_lane": 1}), self._resources, jobs=jobs)

    def engines(self) -> Placement:
        """Where engines and scorers run. `auto` means one with all the threads of a machine without GPUs: two of half
        as many are no faster, and hold the models twice."""
        scaling = self._scaling.model_copy(update={"workers_per_lane": 1})
        if scaling.lanes == "auto" and not self._resources.gpus:
            scaling = scaling.model_copy(update={"lanes": 1})
        return plan(scaling, self._resources)

    @contextmanager
    def lanes(self, open_bench: OpenBench) -> Iterator[Lanes]:
        """Lanes with benches, where engines run."""
        with open_lanes(open_bench, placement=self.engines(), scaling=self._scaling) as lanes:
            yield lanes

    def prepare(self, name: str, model: ModelConfig, corpora: CorporaConfig | None = None) -> Path:
        """The local Transformers folder of ``model``; a tokenizer that it lacks is trained on ``corpora``."""
        folder, texts = self.run.folder / "models" / name, None
        if corpora is not None and model.create is not None:
            # Another version of the corpora must not find this one's tokenizer.
            folder, texts = folder / digest_of(inputs_of(corpora)), iterate_text(corpora)
        folder = prepare(model, folder, texts, seed=self.seed)
        self.digests[name] = weights_digest(folder)
        return folder

    def stores(self, corpora: CorporaConfig, tokenizer: Path, what: str) -> list[BlockStore]:
        """The training corpora of ``corpora`` as blocks of the tokenizer in a folder.

        Errors are those of :func:`isoray.corpora.build.build`, with ``what`` before them.
        """
        try:
            return build(
                corpora, tokenizer, self.run.folder / "corpora", executor="inprocess", workers=self._resources.cpus
            ).train
        except UserError as error:
            raise type(error)(f"{what}: {error}") from error

    def carry_out(self, work: Work, items: int, *, phase: str) -> Iterator[tuple[int, str]]:
        """``(item, work(item))`` as they come, from the workers that engines run on, with the progress shown."""
        placement = self.engines()
        with self.run.phase(phase, jobs=items) as shown:
            for item, result in as_done(
                work,
                items,
                phase=phase,
                executor=placement.executor,
                workers=placement.lanes,
                cpus=placement.cpus,
                gpus=placement.gpus,
            ):
                yield item, result
                shown.done()

    def judge(self, judges: Sequence[Judge], folders: Mapping[Path, int], *, phase: str) -> None:
        """Judge what is missing of the completions in ``folders``, each with so many shards."""
        missing = sum(
            len(missing_judgements(folder, judge, shards)) for folder, shards in folders.items() for judge in judges
        )
        if not missing:
            return
        placement = self.engines()
        with self.run.phase(phase, jobs=missing) as shown:
            for done in judge_missing(
                judges,
                folders,
                executor=placement.executor,
                workers=placement.lanes,
                cpus=placement.cpus,
                gpus=placement.gpus,
                threads=placement.cpus,
            ):
                shown.done(done.judge)

    def train(self, phase: str, trainings: Mapping[str, Training]) -> dict[str, Trained]:
        """All ``trainings``, each as a step of its name; with several lanes so many at a time."""
        found = train_each(
            self.run,
            phase,
            {
                name: (training.fit(self._compute, self.seed), training.inputs(self._compute, self.seed))
                for name, training in trainings.items()
            },
            placement=self.trainings(len(trainings)),
            scaling=self._scaling,
        )
        self.trained |= found
        self.digests |= {name: weights_digest(trained.model) for name, trained in found.items()}
        return found


@contextmanager
def open_workshop(run: Run, *, scaling: ScalingConfig, compute: ComputeConfig, seed: int) -> Iterator[Workshop]:
    """Connects to Ray and adds up the resources of everything that will run, before anything starts."""
    with available(scaling, run.address) as resources:
        shop = Workshop(run, resources, scaling=scaling, compute=compute, seed=seed)
        shop.trainings(1)
        shop.engines()
        yield shop
