"""What UnTrac must fulfil (Isonuma and Titov, ACL 2024), on its real jobs, a real bench and a small trained model."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from isoray.attribution.jobs import Evaluate, Gradient, Retrain, Unlearn
from isoray.attribution.vectors import open_vector
from isoray.attribution.workbench import OpenWorkbench, Workbench
from isoray.config.load import load
from isoray.corpora.store import BlockStore
from isoray.corpora.stream import BlockStream
from isoray.models.config import LoadOptions
from isoray.models.load import load as load_model
from isoray.objectives.lm import LanguageModelling
from isoray.objectives.reduce import example_nll_sum
from isoray.recipes.base import Recipe
from isoray.run import Run
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.lanes import Rank
from isoray.training.optim import AdamConfig, SgdConfig

STEP = 1e-4
"""Step size of the first-order tests: small against the curvature, large against float32."""
CORPORA = ["same", "other_facts", "counting", "random"]


def random_rows() -> list[dict[str, str]]:
    draw = random.Random(1)
    letters = "abcdefghijklmnopqrstuvwxyz"

    def word() -> str:
        return "".join(draw.choices(letters, k=4))

    return [{"prompt": f"{word()} {word()} {word()}", "response": word()} for _ in range(64)]


CONFIG: dict[str, Any] = {
    "kind": "untrac",
    "seed": 1,
    "corpora": {
        "length": 32,
        "separator": " ",
        "append_eos": False,
        "train": {
            "same": {"generator": "facts", "options": {"stop": 0.5, "repeats": 1, "templates": 1}},
            "other_facts": {"generator": "facts", "options": {"start": 0.5, "repeats": 1, "templates": 1}},
            "counting": {"generator": "counting", "options": {"rows": 64}},
            "random": {"path": "random.jsonl"},
        },
        "test": {
            "where": {"generator": "facts", "options": {"stop": 0.5, "repeats": 1, "templates": 1}},
            "counted": {"generator": "counting", "options": {"rows": 40, "seed": 9}},
        },
    },
    "model": {
        "create": {
            "hidden_size": 48,
            "layers": 2,
            "heads": 2,
            "intermediate_size": 96,
            "tokenizer": {"vocab_size": 512},
        }
    },
    "training": {"steps": 300, "batch_size": 16, "optimizer": {"kind": "adam", "lr": 3e-3}},
    "untrac": {"batch_size": 4, "optimizer": {"kind": "adam", "lr": 1e-5}},
    "untrac_inv": {"optimizer": {"kind": "adam", "lr": 1e-5}},
    "baselines": {"gradient": {}},
    "scaling": {"executor": "inprocess", "cpus_per_worker": 1},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on two test sets; corpus `same` is test set `where`, `random` is made of random letters."""
    folder = tmp_path_factory.mktemp("untrac")
    (folder / "random.jsonl").write_text("".join(json.dumps(row) + "\n" for row in random_rows()))
    (folder / "c.yaml").write_text(yaml.safe_dump({**CONFIG, "corpora": {**CONFIG["corpora"], "root": str(folder)}}))
    loaded = load(folder / "c.yaml")
    with Run.open(folder / "run", loaded.config, recipe="untrac") as opened:
        Recipe.build(loaded.config).run(opened)  # type: ignore[attr-defined]
    return folder / "run"


def stores(run: Path, names: list[str]) -> tuple[Path, ...]:
    return tuple(next((run / "corpora").glob(f"{name}-*")) for name in names)


def start_of(run: Path) -> Path:
    return next((run / "start").iterdir())


def open_bench(run: Path) -> Workbench:
    plan = OpenWorkbench(
        starts={"trained": run / "steps" / "training" / "model", "init": start_of(run)},
        options=LoadOptions(),
        compute=ComputeConfig(),
        train=stores(run, CORPORA),
        test=stores(run, ["where", "counted"]),
        average="example",
        seed=1,
    )
    return plan(Rank(rank=0, world=1, lane=0, device="cpu", threads=1, progress=lambda fraction: None))


@pytest.fixture
def bench(run: Path) -> Iterator[Workbench]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield open_bench(run)
    torch.set_num_threads(before)


def unlearn(forget: str, **training: Any) -> Unlearn:
    inverse = forget in ("where", "counted")
    config = TrainingConfig(**{"steps": 1, "batch_size": 10_000, "optimizer": SgdConfig(lr=STEP), **training})
    return Unlearn("untrac", forget, inverse, config, seed=1, most=None)


def rises(bench: Workbench, forget: str, **training: Any) -> dict[str, float]:
    curve = unlearn(forget, **training).run(bench)["curve"]
    return {name: loss - curve[0]["losses"][name] for name, loss in curve[-1]["losses"].items()}


@pytest.fixture
def dots(bench: Workbench, tmp_path: Path) -> dict[tuple[str, str], float]:
    """GradDot of the real jobs, of mean losses: [corpus, test set]."""
    means = {}
    for name, store in (*bench.train.items(), *bench.test.items()):
        role: Any = "test" if name in bench.test else "train"
        Gradient(name, role, "trained", seed=1, most=None, rows=7, path=tmp_path / f"{name}.npy").run(bench)
        means[name] = open_vector(tmp_path / f"{name}.npy").astype(np.float64) / len(store)
    return {(corpus, test): float(means[corpus] @ means[test]) for corpus in bench.train for test in bench.test}


def test_one_small_step_of_sgd_is_grad_dot(bench: Workbench, dots: dict[tuple[str, str], float]) -> None:
    """To first order; for every corpus and test set whose gradients are not orthogonal."""
    largest = max(abs(dot) for dot in dots.values())
    compared = 0
    for corpus in bench.train:
        rise = rises(bench, corpus)
        for test in bench.test:
            error = abs(rise[test] / STEP - dots[corpus, test])
            assert error < 0.01 * abs(dots[corpus, test]) + 0.002 * largest, (corpus, test)
            compared += abs(dots[corpus, test]) > 0.05 * largest
    assert compared >= 3


def test_untrac_and_its_inverse_agree_to_first_order(bench: Workbench, dots: dict[tuple[str, str], float]) -> None:
    """To first order the two are one dot product, seen from either side."""
    largest = max(abs(dot) for dot in dots.values())
    forward = {corpus: rises(bench, corpus) for corpus in bench.train}
    for test in bench.test:
        backward = rises(bench, test)
        for corpus in bench.train:
            error = abs(forward[corpus][test] - backward[corpus]) / STEP
            assert error < 0.01 * abs(dots[corpus, test]) + 0.004 * largest, (corpus, test)


def test_a_gradient_job_is_autograd_s(bench: Workbench, tmp_path: Path) -> None:
    """Against the obvious loop over examples, one at a time."""
    job = Gradient("where", "test", "trained", seed=1, most=None, rows=5, path=tmp_path / "g.npy")
    norm = job.run(bench)["norm"]
    model = bench.start("trained").model
    loss = sum(example_nll_sum(model, batch) for batch in bench.batches(bench.test["where"], rows=1, share=True))
    assert isinstance(loss, Tensor)
    loss.backward()
    wanted = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    np.testing.assert_allclose(open_vector(tmp_path / "g.npy"), wanted.numpy(), atol=1e-4 * float(wanted.abs().max()))
    assert norm == pytest.approx(float(wanted.norm()), rel=1e-4)


@pytest.mark.parametrize("estimator", ["untrac", "untrac_inv", "grad_cos"])
def test_a_duplicate_of_the_test_set_ranks_first_and_random_letters_last_or_near_zero(
    run: Path, estimator: str
) -> None:
    """What the estimators must agree on before any number of theirs is believed."""
    rows = json.loads((run / "results.json").read_text())["tables"]["influence"]
    score = {r["corpus"]: r["score"] for r in rows if (r["estimator"], r["test"]) == (estimator, "where")}
    assert max(score, key=lambda name: score[name]) == "same"
    assert score["random"] < 0.1 * score["same"]


ADAM: dict[str, Any] = {"steps": 6, "batch_size": 8, "optimizer": AdamConfig(lr=1e-3), "evaluate_every": 2}


def test_jobs_leave_no_trace_in_each_other(run: Path, bench: Workbench, tmp_path: Path) -> None:
    """Weights are restored to the last bit and the optimizer starts anew, whatever ran before."""
    jobs: dict[str, Any] = {
        "corpus": unlearn("same", **ADAM),
        "test set": unlearn("counted", **ADAM),
        "losses": Evaluate("trained"),
        "gradient": Gradient("random", "train", "trained", seed=1, most=20, rows=4, path=tmp_path / "g.npy"),
        "retraining": retrain(tmp_path),
    }
    alone = {name: job.run(open_bench(run)) for name, job in jobs.items()}
    for job in [*jobs, *reversed(jobs)]:
        assert jobs[job].run(bench) == alone[job], job
    stored = load_file(run / "steps" / "training" / "model" / "model.safetensors")
    restored = bench.start("trained").model.state_dict()
    assert all(torch.equal(restored[name], tensor) for name, tensor in stored.items())
    assert all(parameter.grad is None for parameter in bench.parallel.model.parameters())


def retrain(scratch: Path, **training: Any) -> Retrain:
    config = TrainingConfig(**{**ADAM, "log_every": 1, **training})
    return Retrain("random", LanguageModelling.Config(), config, steps=6, seed=1, scratch=scratch)


def test_a_retraining_is_a_plain_loop_over_the_other_corpora(run: Path, bench: Workbench, tmp_path: Path) -> None:
    """Against Adam on batches collated by hand, one row at a time."""
    result = retrain(tmp_path).run(bench)
    model = load_model(start_of(run)).model
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    kept = [BlockStore.open(folder) for folder in stores(run, CORPORA)]
    stream = BlockStream(kept, batch_size=8, seed=1, exclude=["random"])
    losses = []
    for step in range(6):
        refs = stream.refs(step)
        assert not any(kept[ref.store].name == "random" for ref in refs)
        rows = [
            {"input_ids": torch.tensor(b.input_ids).long()[None], "labels": torch.tensor(b.labels).long()[None]}
            for b in stream.load(refs)
        ]
        total = sum(int((row["labels"][:, 1:] != -100).sum()) for row in rows)
        loss = torch.zeros(())
        for row in rows:
            count = int((row["labels"][:, 1:] != -100).sum())
            loss = loss + model(**row).loss * count / total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert [row["loss"] for row in result["steps"]] == pytest.approx(losses, rel=1e-4)


def test_a_resumed_retraining_reports_what_the_undisturbed_one_does(
    bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its rows before the checkpoint, too; a checkpoint of other weights or other data is not used."""
    expected = retrain(tmp_path / "whole").run(bench)
    job = retrain(tmp_path / "broken", checkpoint_every=2)
    progress, bench.progress = bench.progress, stop_at(0.8)
    with pytest.raises(KeyboardInterrupt):
        job.run(bench)
    bench.progress = progress
    checkpoints = tmp_path / "broken" / job.key
    assert [path.name for path in checkpoints.iterdir()] == ["step-00000004"]
    monkeypatch.setattr(bench, "digest", "other weights")
    seen: list[float] = []
    bench.progress = seen.append
    assert job.run(bench) == expected
    assert len(seen) == 6, "it began at the start"
    monkeypatch.undo()
    bench.progress = stop_at(0.8)
    with pytest.raises(KeyboardInterrupt):
        job.run(bench)
    bench.progress = seen.append
    seen.clear()
    assert job.run(bench) == expected
    assert len(seen) == 2, "it went on after the checkpoint"
    assert not checkpoints.exists()


def stop_at(fraction: float) -> Any:
    def progress(done: float) -> None:
        if done > fraction:
            raise KeyboardInterrupt

    return progress
