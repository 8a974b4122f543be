"""The baselines of a target: what has to be trained for them, and how each then generates."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from isoray.corpora.store import BlockStore
from isoray.detoxification.config import BaselinesConfig, DetoxTraining, ToxicConfig
from isoray.detoxification.measure import Candidate
from isoray.errors import UserError
from isoray.generation.contrast import ContrastConfig
from isoray.models.config import LoadOptions
from isoray.models.load import load, save, weights_digest
from isoray.models.merge import negated, weight_names
from isoray.objectives.gradient_ascent import GradientAscent
from isoray.objectives.lm_steer import LmSteer
from isoray.workshop import Training, Workshop


class Baselines:
    """What UniDetox is compared with."""

    def __init__(self, config: BaselinesConfig, toxic: ToxicConfig | None, shop: Workshop) -> None:
        self.config, self.toxic, self.shop = config, toxic, shop
        self._known: dict[str, Path] = {}

    def check(self, model: Path, *, is_base: bool) -> None:
        """Reads what the baselines of a target will learn, so that what is wrong with it is told before hours of work.

        ``is_base``: the target is the base model, whose toxic copy there will be.
        """
        if self.config.non_toxic is not None:
            self._clean(model)
        if not is_base and (self.config.dexperts or self.config.task_arithmetic):
            self._toxic(model)

    def trainings(self, target: str, model: Path, options: LoadOptions, toxic: Path | None) -> dict[str, Training]:
        """What is trained for a target, by name. ``toxic``: its toxic copy, where there is one already."""
        config, found = self.config, dict[str, Training]()
        if toxic is not None:
            self._known[target] = toxic
        elif config.dexperts or config.task_arithmetic:
            assert self.toxic is not None
            toxic_training = Training(model, options, {"train": self._toxic(model)}, self.toxic.training)
            found[f"toxic-{target}"] = toxic_training
        if config.gradient_ascent is not None:
            stores = {"train": self._toxic(model)}
            found[f"gradient_ascent-{target}"] = Training(
                model, options, stores, config.gradient_ascent, GradientAscent.Config()
            )
        if config.non_toxic is None:
            return found
        clean = self._clean(model)
        if config.fine_tuning is not None or config.dexperts is not None:
            training = config.fine_tuning or DetoxTraining()
            found[f"fine_tuning-{target}"] = Training(model, options, {"train": clean}, training)
        if config.lm_steer is not None:
            steered = options.model_copy(update={"steer": config.lm_steer.steer, "adapter": None})
            both = {"toward": self._toxic(model), "away": clean}
            found[f"lm_steer-{target}"] = Training(model, steered, both, config.lm_steer.training, LmSteer.Config())
        return found

    def candidates(
        self, target: str, model: Path, options: LoadOptions, trained: Mapping[str, Path]
    ) -> list[Candidate]:
        """How each baseline generates; ``trained`` holds the models that :meth:`trainings` asked for, by name."""
        config, found = self.config, list[Candidate]()
        toxic = self._known.get(target) or trained.get(f"toxic-{target}")
        if config.preamble is not None:
            plain = ContrastConfig(positive=str(model))
            found.append(Candidate(target, "preamble", plain, preamble=config.preamble.text))
        if config.dexperts is not None:
            contrast = ContrastConfig(
                base=str(model),
                positive=str(trained[f"fine_tuning-{target}"]),
                negative=str(toxic),
                gamma=config.dexperts.alpha,
                alpha=config.dexperts.plausible,
            )
            found.append(Candidate(target, "dexperts", contrast))
        if config.task_arithmetic is not None:
            assert toxic is not None
            made = self._negated(target, model, options, toxic, config.task_arithmetic.strength)
            found.append(Candidate(target, "task_arithmetic", ContrastConfig(positive=str(made))))
        for name in ("gradient_ascent", "fine_tuning", "lm_steer"):
            if getattr(config, name) is not None:
                found.append(Candidate(target, name, ContrastConfig(positive=str(trained[f"{name}-{target}"]))))
        return found

    def _negated(self, target: str, model: Path, options: LoadOptions, toxic: Path, strength: float) -> Path:
        name = f"task_arithmetic-{target}"
        plain = options.model_copy(update={"adapter": None, "steer": None})

        def work(folder: Path) -> None:
            parts = {"start": model, "toxic": toxic}
            if weight_names(model) != weight_names(toxic):  # the hub's GPT-2 lacks a prefix that a saved copy has
                parts = {part: _saved_anew(path, plain, folder / part) for part, path in parts.items()}
            negated(parts["start"], parts["toxic"], strength, folder / "model")
            for part in parts:
                shutil.rmtree(folder / part, ignore_errors=True)

        self.shop.run.step(name, [weights_digest(model), weights_digest(toxic), strength], work)
        return self.shop.run.step_folder(name) / "model"

    def _clean(self, model: Path) -> Sequence[BlockStore]:
        assert self.config.non_toxic is not None
        return self.shop.stores(self.config.non_toxic, model, "baselines.non_toxic")

    def _toxic(self, model: Path) -> Sequence[BlockStore]:
        assert self.toxic is not None
        if self.toxic.corpora is None:
            raise UserError(
                "some baseline learns from toxic text (gradient_ascent, lm_steer, and dexperts and task_arithmetic for "
                "targets other than the base model), but `toxic` gives a model: give `toxic.corpora`, or leave them out"
            )
        return self.shop.stores(self.toxic.corpora, model, "toxic.corpora")


def _saved_anew(model: Path, options: LoadOptions, folder: Path) -> Path:
    """The model as Transformers writes it: its weights called as in every other copy that it has written."""
    loaded = load(model, options)
    save(loaded.model, loaded.tokenizer, folder)
    return folder
