"""From finished jobs to scores, agreement with the truth, and the tables of ``results.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from isoray.attribution import scores
from isoray.attribution.agreement import agreement, standardise, summarise
from isoray.attribution.eigenpairs import Eigenpairs
from isoray.attribution.plan import Plan
from isoray.corpora.store import BlockStore
from isoray.training.lane_jobs import JobRecord
from isoray.training.phases import Trained

Row = dict[str, Any]
Records = Mapping[str, JobRecord]


class Influence:
    """Scores of every estimator, as rows of the table ``influence``; the truth has no seed."""

    def __init__(self, rows: list[Row] | None = None) -> None:
        self.rows = rows if rows is not None else []

    def add(self, estimator: str, seed: int | None, found: scores.Scores) -> None:
        """File the scores of one estimator under one seed, standardised per test set as in the paper's Table 2."""
        for test, by_corpus in found.items():
            standardised = standardise(list(by_corpus.values()))
            for (corpus, score), z in zip(by_corpus.items(), standardised, strict=True):
                self.rows.append(
                    {"estimator": estimator, "seed": seed, "test": test, "corpus": corpus}
                    | {"score": score, "standardised": z}
                )

    def estimators(self) -> list[str]:
        """Names of all estimators but the truth, in the order in which they were added."""
        return list(dict.fromkeys(row["estimator"] for row in self.rows if row["estimator"] != "truth"))

    def of(self, estimator: str) -> dict[int | None, scores.Scores]:
        """``[seed][test][corpus]`` of one estimator."""
        found: dict[int | None, scores.Scores] = {}
        for row in self.rows:
            if row["estimator"] == estimator:
                found.setdefault(row["seed"], {}).setdefault(row["test"], {})[row["corpus"]] = row["score"]
        return found


def influence(plan: Plan, records: Records) -> Influence:
    """The scores of all estimators that were run, from losses in ``records`` and vectors on disk."""
    found = Influence()
    corpora = [store.name for store in plan.train]
    tests = [store.name for store in plan.test]
    if plan.truth is not None:
        found.add("truth", None, _truth(plan, records))
    for seed in plan.seeds:
        for estimator, _, inverse in plan.unlearnings:
            rises = {name: _rise(records[f"{estimator}-{seed}-{name}"]) for name in (tests if inverse else corpora)}
            by_test = rises if inverse else {test: {c: rises[c][test] for c in corpora} for test in tests}
            found.add(estimator, seed, by_test)
        _add_baselines(found, plan, seed)
    return found


def _add_baselines(found: Influence, plan: Plan, seed: int) -> None:
    baselines = plan.baselines

    def of_corpora(start: str) -> scores.Paths:
        return {store.name: plan.vector("train", start, store.name, seed) for store in plan.train}

    def of_tests(start: str) -> scores.Paths:
        return {store.name: plan.vector("test", start, store.name, plan.seed) for store in plan.test}

    if baselines.gradient is not None:
        found.add("grad_dot", seed, scores.grad_dot(of_corpora("trained"), of_tests("trained")))
        found.add("grad_cos", seed, scores.grad_cos(of_corpora("trained"), of_tests("trained")))
    if baselines.tracin is not None:
        rates = None
        if baselines.tracin.learning_rates == "schedule":
            assert plan.training is not None
            steps = [*plan.milestones, plan.steps]
            lr = plan.training.optimizer.lr
            rates = [lr * plan.training.schedule.factor(step - 1, plan.steps) for step in steps]
        found.add(
            "tracin",
            seed,
            scores.tracin(
                [of_corpora(start) for start in plan.starts],
                [of_tests(start) for start in plan.starts],
                normalise_train=baselines.tracin.normalise_train,
                learning_rates=rates,
            ),
        )
    if baselines.lissa is not None:
        inverse = {store.name: plan.vector("inverse", "trained", store.name, seed) for store in plan.test}
        found.add(
            "hif_lissa",
            seed,
            scores.hif_lissa(of_corpora("trained"), inverse, normalise_train=baselines.lissa.normalise_train),
        )
    if baselines.arnoldi is not None:
        pairs = Eigenpairs.open(plan.eigenpairs(seed))
        normalise = baselines.arnoldi.normalise_train
        found.add(
            "hif_arnoldi",
            seed,
            scores.hif_arnoldi(of_corpora("trained"), of_tests("trained"), pairs, normalise_train=normalise),
        )


def _truth(plan: Plan, records: Records) -> scores.Scores:
    """I(test, corpus) = L(test, without corpus) - L(test, all), the mean over repetitions (Isonuma and Titov, 2024)."""
    assert plan.truth is not None
    rises: list[dict[str, dict[str, float]]] = []
    for repeat in range(plan.truth.repeats):
        with_all = records[f"all-{repeat}" if repeat else "losses-trained"].result["losses"]
        without = {s.name: records[f"without-{s.name}-{repeat}"].result["losses"] for s in plan.train}
        rises.append(
            {test: {name: losses[test] - loss for name, losses in without.items()} for test, loss in with_all.items()}
        )
    return {
        test: {corpus: float(np.mean([rise[test][corpus] for rise in rises])) for corpus in by_corpus}
        for test, by_corpus in rises[0].items()
    }


def _rise(record: JobRecord) -> dict[str, float]:
    """How much unlearning raised each watched set's loss: last minus first (UnTrac, section 3)."""
    curve = record.result["curve"]
    return {name: loss - curve[0]["losses"][name] for name, loss in curve[-1]["losses"].items()}


def agreement_tables(found: Influence, seconds: Mapping[str, float]) -> tuple[list[Row], list[Row]]:
    """Tables ``agreement`` and ``agreement_summary``; both are empty without the truth."""
    truth = found.of("truth").get(None)
    rows: list[Row] = []
    summaries: list[Row] = []
    for estimator in found.estimators() if truth is not None else ():
        assert truth is not None
        per_seed = {seed: agreement(by_test, truth) for seed, by_test in found.of(estimator).items()}
        for seed, by_test in per_seed.items():
            for test, value in by_test.items():
                rows.append({"estimator": estimator, "seed": seed, "test": test} | asdict(value))
        summary = asdict(summarise(list(per_seed.values())))
        summaries.append({"estimator": estimator} | summary | {"seconds": seconds.get(estimator)})
    return rows, summaries


def metrics(found: Influence, summaries: list[Row]) -> dict[str, float]:
    """The flat metrics of ``results.json``: ``<estimator>.pearson_mean`` and the scores, the mean over seeds."""
    flat: dict[str, float] = {}
    for summary in summaries:
        for name in ("pearson_mean", "pearson_sd", "spearman_mean", "spearman_sd"):
            if summary[name] is not None:
                flat[f"{summary['estimator']}.{name}"] = summary[name]
    for estimator in ["truth", *found.estimators()]:
        by_seed = list(found.of(estimator).values())
        for test, by_corpus in by_seed[0].items() if by_seed else ():
            for corpus in by_corpus:
                flat[f"{estimator}.{test}.{corpus}"] = float(np.mean([scores[test][corpus] for scores in by_seed]))
    return flat


def seconds_of(plan: Plan, records: Records) -> dict[str, float]:
    """Worker seconds of each estimator over all its jobs; shared gradients count for each that needs them."""
    unlearning = {
        estimator: round(sum(_seconds(records, f"{estimator}-{seed}-") for seed in plan.seeds), 3)
        for estimator, _, _ in plan.unlearnings
    }
    at_model = _seconds(records, "gradient-", containing="-trained-")
    return unlearning | {
        "grad_dot": at_model,
        "grad_cos": at_model,
        "tracin": _seconds(records, "gradient-"),
        "hif_lissa": at_model + _seconds(records, "lissa-"),
        "hif_arnoldi": at_model + _seconds(records, "arnoldi-"),
    }


def _seconds(records: Records, prefix: str, *, containing: str = "") -> float:
    return round(sum(r.seconds for key, r in records.items() if key.startswith(prefix) and containing in key), 3)


def training_phase(training: Trained) -> Row:
    """The row of table ``phases`` for the training of the model."""
    return {
        "phase": "training",
        "jobs": 1,
        "seconds": training.seconds,
        "worker_seconds": training.seconds * training.workers,
        "peak_memory_mb": training.peak_memory_mb,
        "reused": int(training.reused),
    }


def phase_row(name: str, records: Records, *, seconds: float) -> Row:
    """One row of table ``phases``: a phase of jobs on the lanes."""
    return {
        "phase": name,
        "jobs": len(records),
        "seconds": round(seconds, 3),
        "worker_seconds": round(sum(record.seconds for record in records.values()), 3),
        "peak_memory_mb": max(record.peak_memory_mb for record in records.values()),
        "reused": sum(record.reused for record in records.values()),
    }


def curve_rows(plan: Plan, records: Records) -> Iterator[Row]:
    """Table ``curves``: losses of the watched sets along every unlearning."""
    for seed in plan.seeds:
        for estimator, _, inverse in plan.unlearnings:
            for store in plan.test if inverse else plan.train:
                record = records[f"{estimator}-{seed}-{store.name}"]
                for point in record.result["curve"]:
                    for name, loss in point["losses"].items():
                        yield {
                            "estimator": estimator,
                            "seed": seed,
                            "job": record.key,
                            "corpus": store.name,
                            "step": point["step"],
                            "set": name,
                            "loss": loss,
                        }


def training_rows(plan: Plan, records: Records, full: list[Row]) -> Iterator[Row]:
    """Table ``training``: the full training's reports, then those of the retrainings."""
    yield from ({"model": "all", **row} for row in full)
    for store in plan.train:
        record = records.get(f"without-{store.name}-0")
        for row in record.result["steps"] if record is not None else ():
            yield {"model": f"without {store.name}", **row}


def corpus_row(store: BlockStore, role: str) -> Row:
    """One row of table ``corpora``."""
    manifest = store.manifest
    return {
        "corpus": store.name,
        "role": role,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "blocks": manifest.blocks,
        "license": ", ".join(name or "not stated" for name in sorted(manifest.licenses)),
        "digest": manifest.digest[:12],
        "files": len(manifest.files),
        "issues": manifest.issues,
    }
