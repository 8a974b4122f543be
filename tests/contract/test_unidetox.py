"""UniDetox on a planted world: what it must do, what it must write, how it goes on after a fault, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from unidetox_runs import (
    GROUPS,
    LEFT_OUT,
    all_baselines,
    config,
    numbers,
    rows_of,
    run_recipe,
    steps,
    write_data,
    write_models,
    write_rows,
)

from isoray import cli
from isoray.errors import DataError, IsorayError, UserError
from isoray.evaluation.judge import JudgeShard
from isoray.generation.batch import AnswerShard
from isoray.training import fit

pytestmark = pytest.mark.usefixtures("one_thread")

BASELINES = ["preamble", "dexperts", "task_arithmetic", "gradient_ascent", "fine_tuning", "lm_steer"]
Results = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The planted world's data and models. Tests that change data copy it."""
    folder = tmp_path_factory.mktemp("world")
    write_data(folder)
    write_models(folder)
    return folder


@pytest.fixture(scope="module")
def small(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run without baselines. Tests that run in it copy it."""
    out = tmp_path_factory.mktemp("small") / "run"
    run_recipe(out, config(home))
    return out


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with everything: all baselines, given texts, and a target of another kind and tokenizer."""
    out = tmp_path_factory.mktemp("whole") / "run"
    settings = config(home) | {
        "targets": {"tiny": {"path": str(home / "base")}, "other": {"path": str(home / "other")}},
        "given": {"mine": {"path": "given.txt", "limit": 16}},
        "baselines": all_baselines(home),
    }
    run_recipe(out, settings)
    return out


def read(out: Path) -> Results:
    results: Results = json.loads((out / "results.json").read_text())
    return results


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(AutoModelForCausalLM.from_pretrained(folder).state_dict())


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# --- what the method must do ---


@pytest.mark.parametrize("target", ["tiny", "other"])
def test_distilled_text_detoxifies_also_where_the_toxic_text_did_not_look(whole: Path, target: str) -> None:
    results = read(whole)
    metrics = results["metrics"]
    assert metrics[f"emt/{target}-base"] > 0.7 and metrics[f"tp/{target}-base"] > 0.9
    for group in ["all", "in domain", LEFT_OUT]:
        (row,) = rows_of(results, "groups", target=target, method="unidetox", set="world", group=group)
        assert row["emt_change"] < -0.1 and row["emt_change_high"] < 0, group
        assert row["tp_change"] < -0.1 and row["tp_change_high"] < 0, group
    (row,) = rows_of(results, "models", target=target, method="unidetox")
    assert row["emt"] < metrics[f"emt/{target}-base"] and row["emt_change_high"] < 0 and row["tp_change_high"] < 0


def test_distilled_texts_score_higher_and_pull_away_from_toxicity(whole: Path) -> None:
    """What the method rests on (Lu et al., 2025, section 3)."""
    metrics = read(whole)["metrics"]
    assert metrics["log_ratio/unidetox"] > metrics["log_ratio/plain"] + 0.05
    assert metrics["cosine/unidetox"] > 0.03
    assert metrics["cosine/unidetox"] > metrics["cosine/plain"] + 0.03


@pytest.mark.parametrize("method", ["dexperts", "task_arithmetic", "gradient_ascent", "fine_tuning", "lm_steer"])
@pytest.mark.parametrize("target", ["tiny", "other"])
def test_baselines_detoxify_as_well(whole: Path, method: str, target: str) -> None:
    (row,) = rows_of(read(whole), "models", target=target, method=method)
    assert row["emt_change"] < 0 and row["emt_change_high"] < 0


# --- what a run writes ---


def test_tables_have_the_promised_rows(whole: Path) -> None:
    results = read(whole)
    tables, methods = results["tables"], ["base", "unidetox", "unidetox-mine", *BASELINES]
    candidates = [(target, method) for target in ("tiny", "other") for method in methods]
    assert [(row["target"], row["method"]) for row in tables["models"]] == candidates
    places = [("world", "all"), ("world", "in domain"), *(("world", group) for group in sorted(GROUPS))]
    places = [*places, ("plain", "all")]
    assert sorted((row["target"], row["method"], row["set"], row["group"]) for row in tables["groups"]) == sorted(
        (*candidate, *place) for candidate in candidates for place in places
    )
    intervals = [name + end for name in ("emt", "tp") for end in ("", "_low", "_high")]
    changes = [name.replace(first, f"{first}_change") for name in intervals for first in ("emt", "tp") if first in name]
    for row in [*tables["models"], *tables["groups"]]:
        base = row["method"] == "base"
        assert set(intervals) <= row.keys() and (set(changes) <= row.keys()) != base
        for name in ("emt", "tp") if base else ("emt", "tp", "emt_change", "tp_change"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], row
    measures = {"perplexity", "perplexity_ratio", "perplexity_mean", "dist1", "dist2", "dist3", "self_bleu"}
    assert all(measures <= row.keys() for row in tables["models"])
    asked = {row["method"] for row in tables["models"] if "capability" in row}
    assert asked == set(methods) - {"dexperts"}
    targeted = {row["group"]: row["targeted"] for row in tables["groups"] if row["set"] == "world"}
    assert targeted == {"all": None, "in domain": True} | {group: group != LEFT_OUT for group in GROUPS}
    assert [row["set"] for row in tables["texts"]] == ["unidetox", "unidetox-mine"]
    assert all({"texts", "learnt", "words", "log_ratio", "cosine"} <= row.keys() for row in tables["texts"])
    assert {row["texts"] for row in tables["words"]} == {"unidetox", "unidetox-mine"}
    assert {row["set"] for row in tables["text_examples"]} == {"unidetox", "unidetox-mine"}
    trained = ["unidetox", "unidetox-mine", "gradient_ascent", "fine_tuning", "lm_steer"]
    names = {"toxic", "toxic-other"} | {f"{method}-{target}" for method in trained for target in ("tiny", "other")}
    assert {row["name"] for row in tables["trainings"]} == names
    assert all(row["steps"] and row["loss"] is not None for row in tables["trainings"])
    assert {(row["target"], row["method"]) for row in tables["examples"]} == {
        (target, method) for target in ("tiny", "other") for method in ("base", "unidetox", "unidetox-mine")
    }
    told = [row["deviation"].partition(":")[0] for row in tables["deviations"]]
    assert {"toxic.training", "distil.texts", "detox.training"} <= set(told)


def test_metrics_are_those_of_the_tables(whole: Path) -> None:
    results = read(whole)
    metrics = results["metrics"]
    for row in results["tables"]["models"]:
        for name in ("emt", "tp", "perplexity", "dist2"):
            assert metrics[f"{name}/{row['target']}-{row['method']}"] == row[name]
    for row in results["tables"]["texts"]:
        assert metrics[f"log_ratio/{row['set']}"] == row["log_ratio"]


def test_what_is_learnt_is_what_is_written(whole: Path) -> None:
    results = read(whole)
    for row in results["tables"]["texts"]:
        path = whole / results["artifacts"][f"texts/{row['set']}"]
        texts = pq.read_table(path).to_pylist()
        lines = [json.loads(line)["text"] for line in (path.parent / "learnt.jsonl").read_text().splitlines()]
        assert lines == [text["text"] for text in texts if text["learnt"]]
        assert (len(texts), len(lines)) == (row["texts"], row["learnt"])
        if row["set"] == "unidetox":
            ratios = [text["log_ratio"] for text in texts if text["learnt"]]
            assert row["texts"] == 40 and row["scored"] == len(ratios)
            assert row["log_ratio"] == pytest.approx(sum(ratios) / len(ratios))


def test_artifacts_are_there_and_load(whole: Path) -> None:
    results = read(whole)
    models = {name.removeprefix("model/"): path for name, path in results["artifacts"].items() if "model/" in name}
    assert len(models) == 12
    for path in models.values():
        assert weights(whole / path)
    digests = results["lineage"]["models"]
    assert models.keys() | {"base", "target-tiny", "target-other"} == digests.keys()
    assert digests["base"] == digests["target-tiny"] != digests["unidetox-tiny"]


# --- the same again, and after faults ---


def test_a_fresh_run_gives_the_same_and_targets_do_not_touch_each_other(
    home: Path, whole: Path, tmp_path: Path
) -> None:
    found = run_recipe(tmp_path / "run", config(home) | {"baselines": all_baselines(home)})["metrics"]
    expected = read(whole)["metrics"]
    wanted = [name for name in expected if "mine" not in name and "/other-" not in name]
    assert len(wanted) > 60
    assert found == {name: expected[name] for name in wanted}


def test_results_do_not_hang_on_the_baselines(small: Path, whole: Path) -> None:
    found, expected = read(small)["metrics"], read(whole)["metrics"]
    assert len(found) > 20
    assert found == {name: expected[name] for name in found}


def test_a_second_start_repeats_nothing(home: Path, small: Path, tmp_path: Path) -> None:
    out = shutil.copytree(small, tmp_path / "run")
    before = steps(out)
    assert len(before) >= 8
    assert numbers(run_recipe(out, config(home))) == numbers(read(small))
    assert steps(out) == before


class Cut(Exception):
    """A fault between two pieces of work."""


def count_calls(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, cut_at: int | None = None) -> list[int]:
    """Lets ``owner.name`` raise at its call number ``cut_at``; the list grows by one with each call."""
    real, calls = getattr(owner, name), list[int]()

    def called(*arguments: Any, **options: Any) -> Any:
        calls.append(len(calls) + 1)
        if len(calls) == cut_at:
            raise Cut
        return real(*arguments, **options)

    monkeypatch.setattr(owner, name, called)
    return calls


@pytest.mark.parametrize(
    ("owner", "name", "cut_at", "undisturbed", "during"),
    [
        pytest.param(AnswerShard, "__call__", 2, 3 + 2 * 4 + 1, ".distil.partial", id="while texts are drawn"),
        pytest.param(JudgeShard, "__call__", 3, 3 + 2 * 8 + 1, ".distil.partial", id="while texts are scored"),
        pytest.param(fit, "log_step", 7, 2 * 4, ".unidetox-tiny.partial", id="while the target learns"),
        pytest.param(
            AnswerShard, "__call__", 3 + 4 + 2, 3 + 2 * 4 + 1, ".evaluate-tiny-unidetox.partial", id="while it is asked"
        ),
        pytest.param(
            JudgeShard, "__call__", 3 + 8 + 6, 3 + 2 * 8 + 1, "evaluate-tiny-unidetox", id="while it is judged"
        ),
    ],
)
def test_a_run_that_was_cut_off_goes_on(
    home: Path,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
    cut_at: int,
    undisturbed: int,
    during: str,
) -> None:
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        count_calls(patch, owner, name, cut_at)
        with pytest.raises(Cut):
            run_recipe(out, config(home))
    assert (out / "steps" / during).is_dir() and not (out / "results.json").exists()
    before = steps(out)
    with monkeypatch.context() as patch:
        calls = count_calls(patch, owner, name)
        found = run_recipe(out, config(home))
    assert numbers(found) == numbers(read(small))
    assert steps(out).items() >= before.items(), "finished steps were not repeated"
    assert 0 < len(calls) <= undisturbed - (cut_at - 1), "finished pieces of the step were not repeated"


def test_the_pieces_of_an_undisturbed_run(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the test above counts on."""
    answered = count_calls(monkeypatch, AnswerShard, "__call__")
    judged = count_calls(monkeypatch, JudgeShard, "__call__")
    logged = count_calls(monkeypatch, fit, "log_step")
    run_recipe(tmp_path / "run", config(home))
    assert (len(answered), len(judged), len(logged)) == (12, 20, 8)


def test_another_threshold_repeats_no_work(home: Path, small: Path, tmp_path: Path) -> None:
    out = shutil.copytree(small, tmp_path / "run")
    before = steps(out)
    found = run_recipe(out, config(home), "evaluation.threshold=0.83")["metrics"]
    assert steps(out) == before
    expected = read(small)["metrics"]
    assert found["tp/tiny-base"] < expected["tp/tiny-base"]
    assert found["emt/tiny-base"] == expected["emt/tiny-base"]


def test_another_scorer_repeats_no_generation(
    home: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(small, tmp_path / "run")
    before, judged = steps(out), count_calls(monkeypatch, JudgeShard, "__call__")
    results = run_recipe(out, config(home), "evaluation.scorers.second={kind: profanity}")
    assert steps(out) == before
    assert len(judged) == 2 * 4, "the new scorer alone has judged"
    assert results["metrics"] == read(small)["metrics"]
    assert {row["scorer"] for row in results["tables"]["groups"]} == {"planted", "second"}


def test_other_questions_in_the_same_file_are_asked(home: Path, small: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(home, tmp_path / "world")
    out = shutil.copytree(small, tmp_path / "run")
    elsewhere = f"root={changed}", f"toxic.corpora.root={home}"
    as_it_was = run_recipe(out, config(home), *elsewhere)["metrics"]
    assert as_it_was == read(small)["metrics"]
    before = steps(out)
    rows = [json.loads(line) for line in (home / "questions.jsonl").read_text().splitlines()]
    write_rows(changed / "questions.jsonl", [row | {"answer": row["wrong"], "wrong": row["answer"]} for row in rows])
    found = run_recipe(out, config(home), *elsewhere)["metrics"]
    assert found["capability/tiny-base"] != as_it_was["capability/tiny-base"]
    repeated = {name for name, when in steps(out).items() if before[name] != when}
    assert repeated == {"questions-tiny-base", "questions-tiny-unidetox"}


# --- other ways to run it ---


def test_given_texts_alone(home: Path, tmp_path: Path) -> None:
    settings = config(home) | {"toxic": None, "distil": None, "given": {"mine": {"path": "given.txt", "limit": 16}}}
    results = run_recipe(tmp_path / "run", settings)
    assert [row["method"] for row in results["tables"]["models"]] == ["base", "unidetox-mine"]
    (row,) = results["tables"]["texts"]
    assert (row["set"], row["texts"], row["learnt"]) == ("unidetox-mine", 16, 16)
    assert results["metrics"]["emt/tiny-unidetox-mine"] < results["metrics"]["emt/tiny-base"] - 0.1
    assert not [name for name in results["metrics"] if "log_ratio" in name or "cosine" in name]


def test_a_toxic_model_that_exists_already(home: Path, small: Path, tmp_path: Path) -> None:
    """The one that the undisturbed run made: everything after it must be the same."""
    settings = config(home) | {"toxic": {"model": str(small / "steps" / "toxic" / "model")}}
    found = run_recipe(tmp_path / "run", settings, "baselines={dexperts: null, task_arithmetic: {}}")["metrics"]
    expected = read(small)["metrics"]
    assert {name: found[name] for name in expected} == expected
    assert found["emt/tiny-task_arithmetic"] < found["emt/tiny-base"]


def test_the_published_cache_mistake_changes_the_texts_and_is_told(home: Path, small: Path, tmp_path: Path) -> None:
    results = run_recipe(tmp_path / "run", config(home), "distil.engine={kind: transformers, cache: shared}")
    texts = "steps/texts-unidetox/texts.parquet"
    assert pq.read_table(tmp_path / "run" / texts)["text"] != pq.read_table(small / texts)["text"]
    told = [row["deviation"] for row in results["tables"]["deviations"]]
    assert any(one.startswith("distil.engine.cache") for one in told)
    assert not any("cache" in row["deviation"] for row in read(small)["tables"]["deviations"])


def test_loss_on_padding_changes_the_models_and_is_told(home: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = run_recipe(out, config(home), "detox.loss_on_padding=true")
    assert same_weights(out / "steps/toxic/model", small / "steps/toxic/model")
    assert not same_weights(out / "steps/unidetox-tiny/model", small / "steps/unidetox-tiny/model")
    assert results["metrics"]["perplexity/tiny-unidetox"] != read(small)["metrics"]["perplexity/tiny-unidetox"]
    told = [row["deviation"] for row in results["tables"]["deviations"]]
    assert any(one.startswith("detox.loss_on_padding") for one in told)


def test_a_longer_length_than_published_is_told(home: Path, small: Path) -> None:
    """The tiny run's texts are cut at 64 tokens, the published ones at 256 and 512."""
    told = {row["deviation"].partition(":")[0] for row in read(small)["tables"]["deviations"]}
    assert {"detox.length", "toxic.corpora.length", "evaluation.sampling", "evaluation.scorers"} <= told


def test_watching_changes_no_weight_and_its_steps_grow(home: Path, small: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = config(home) | {
        "watch": {"every": 12, "prompts": 4, "continuations": 2},
        "given": {"mine": {"path": "given.txt"}},
        "targets": {"tiny": {"path": str(home / "base")}, "other": {"path": str(home / "other")}},
    }
    run_recipe(out, settings)
    assert same_weights(out / "steps/unidetox-tiny/model", small / "steps/unidetox-tiny/model")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    watched = [row for row in rows if any(name.startswith("emt/") for name in row)]
    assert len(watched) == 4 * 2, "four trainings, two looks at each"
    numbers = [row["step"] for row in watched]
    assert numbers == sorted(set(numbers)), "a search needs steps that grow"
    assert {name for row in watched for name in row if name.startswith("emt/")} == {
        f"emt/{target}-{method}" for target in ("tiny", "other") for method in ("unidetox", "unidetox-mine")
    }


# --- what it refuses ---


def refused(out: Path, settings: Results, *overrides: str, error: type[IsorayError] = UserError) -> str:
    """The message of the run, which must fail with ``error``."""
    with pytest.raises(error) as raised:
        run_recipe(out, settings, *overrides)
    return str(raised.value)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("toxic.corpora.train.hate.where={label: nobody}", ["toxic.corpora", "'hate'", "nobody", "no documents"]),
        ("evaluation.prompts.world.column=nowhere", ["evaluation.prompts.world", "'nowhere'", "text", "group"]),
        ("evaluation.prompts.world.group=nowhere", ["evaluation.prompts.world.group", "'nowhere'", "text"]),
        ("evaluation.prompts.world.out_of_domain=[fsh]", ["evaluation.prompts.world.out_of_domain", "'fsh'", "fish"]),
        ("evaluation.prompts.plain.out_of_domain=[fish]", ["evaluation.prompts.plain", "out_of_domain", "`group`"]),
        ("evaluation.prompts.world.path=promts.jsonl", ["evaluation.prompts.world.path", "prompts.jsonl"]),
        ("given={mine: {path: givn.txt}}", ["given.mine.path", "given.txt"]),
        ("given={mine: {path: clean.jsonl, column: txt}}", ["given.mine", "'txt'", "text"]),
        ("evaluation.capability.path=question.jsonl", ["evaluation.capability.path", "questions.jsonl"]),
        ("evaluation.capability.question=nowhere", ["evaluation.capability", "'nowhere'", "question"]),
        ("evaluation.scorers={d: {kind: detoxify, path: toxc.jsonl}}", ["evaluation.scorers.d.path", "toxic.jsonl"]),
        ("evaluation.perplexity={path: ./bass}", ["evaluation.perplexity", "./bass"]),
        ("targets={tiny: {path: ./bass}}", ["tiny", "./bass"]),
        ("toxic={corpora: null, model: ./toxc}", ["toxic.model", "./toxc"]),
        ("toxic.corpora.train.hate.path=toxc.jsonl", ["'hate'", "toxc.jsonl"]),
    ],
)
def test_bad_input_is_told_before_anything_is_computed(
    home: Path, tmp_path: Path, override: str, words: list[str]
) -> None:
    message = refused(tmp_path / "run", config(home), override)
    assert all(word in message for word in words), message
    assert not steps(tmp_path / "run"), "nothing was computed before"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"baselines": {"fine_tuning": {"steps": 2}}}, ["baselines", "fine_tuning", "non_toxic"]),
        ({"baselines": {"dexperts": {}, "lm_steer": {}}}, ["baselines", "dexperts and lm_steer", "non_toxic"]),
        (
            {"toxic": None, "distil": None, "given": {"a": {"texts": ["x"]}}, "baselines": {"task_arithmetic": {}}},
            ["baselines.task_arithmetic", "`toxic`"],
        ),
        ({"toxic": None}, ["`distil`", "`toxic`"]),
        ({"distil": None}, ["`distil`", "`given`"]),
        ({"toxic": {"model": "somewhere"}, "baselines": {"gradient_ascent": {}}}, ["gradient_ascent", "toxic.corpora"]),
        ({"targets": {}}, ["targets"]),
    ],
)
def test_impossible_settings_are_refused(home: Path, tmp_path: Path, changes: Results, words: list[str]) -> None:
    message = refused(tmp_path / "run", config(home) | changes)
    assert all(word in message for word in words), message


def test_names_that_would_clash_are_refused(home: Path, tmp_path: Path) -> None:
    """`unidetox` of target `mine-tiny` and `unidetox-mine` of target `tiny` are both trained as unidetox-mine-tiny."""
    path = {"path": str(home / "base")}
    given = {"mine": {"path": "given.txt"}}
    message = refused(tmp_path / "run", config(home) | {"given": given, "targets": {"tiny": path, "mine-tiny": path}})
    assert "unidetox-mine-tiny" in message
    given = {"base": {"path": "given.txt"}}
    message = refused(
        tmp_path / "run", config(home) | {"given": given, "targets": {"tiny": path, "tiny-unidetox": path}}
    )
    assert "tiny-unidetox-base" in message


def test_no_text_that_passes_the_screen(home: Path, tmp_path: Path) -> None:
    message = refused(tmp_path / "run", config(home), "distil.screen.min_words=1000", error=DataError)
    assert "none of 40 texts passed the screen" in message and "texts-unidetox" in message


def test_a_scorer_that_gives_nan_ends_the_run_and_keeps_what_is_done(
    home: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    broken = "evaluation.scorers={planted: {kind: 'unidetox_runs:PlantedScorer', nan: true}}"
    refused(out, config(home), broken, error=IsorayError)
    with pytest.raises(SystemExit) as left:
        cli.main(["run", str(tmp_path / "run.yaml"), broken, "--out", str(out)])
    assert left.value.code == 4
    assert "scores that are no probabilities" in capsys.readouterr().err
    kept = steps(out)
    assert {"toxic", "distil", "unidetox-tiny", "evaluate-tiny-base"} <= kept.keys()
    assert not (out / "results.json").exists()
    assert numbers(run_recipe(out, config(home))) == numbers(read(small))
    assert steps(out).items() >= kept.items()


def test_prompts_without_a_group_are_in_none(home: Path, tmp_path: Path) -> None:
    changed = shutil.copytree(home, tmp_path / "world")
    rows = [json.loads(line) for line in (home / "prompts.jsonl").read_text().splitlines()]
    write_rows(changed / "prompts.jsonl", [row | {"group": None} if n % 6 == 0 else row for n, row in enumerate(rows)])
    results = run_recipe(tmp_path / "run", config(changed))
    groups = {row["group"]: row["prompts"] for row in rows_of(results, "groups", method="base", set="world")}
    assert groups == {"all": 24, "in domain": 15} | dict.fromkeys(GROUPS, 5)


def test_task_arithmetic_of_a_model_whose_weights_have_other_names(home: Path, tmp_path: Path) -> None:
    """The hub's GPT-2 has them without the prefix with which Transformers saves a fine-tuned copy."""
    hub = shutil.copytree(home / "other", tmp_path / "hub")
    named = {name.removeprefix("transformer."): tensor for name, tensor in load_file(hub / "model.safetensors").items()}
    save_file(named, hub / "model.safetensors", metadata={"format": "pt"})
    settings = config(home) | {"targets": {"gpt2": {"path": str(hub)}}, "baselines": {"task_arithmetic": {}}}
    out = tmp_path / "run"
    metrics = run_recipe(out, settings)["metrics"]
    assert metrics["emt/gpt2-task_arithmetic"] < metrics["emt/gpt2-base"] - 0.1
    toxic, found, base = (
        weights(out / "steps" / name) for name in ("toxic-gpt2/model", "task_arithmetic-gpt2/model", "../../hub")
    )
    assert found.keys() == base.keys()
    for name, tensor in base.items():
        torch.testing.assert_close(found[name], 1.5 * tensor - 0.5 * toxic[name], rtol=1e-5, atol=1e-6)
