"""The report of a run: what it says, that it says it for any results, and that it is one safe, accessible file."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_data import CORPORA, NOISE, TESTS, results, write_run

from isoray.errors import UserError
from isoray.report import build

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Elements with their attributes, and the text of the page; fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


def page_of(tmp_path: Path, found: dict[str, Any]) -> Page:
    return Page(build(write_run(tmp_path / "run", found)).read_text(encoding="utf-8"))


def with_scores(estimators: dict[str, list[list[float]]], *, tests: int = 1) -> dict[str, Any]:
    """Results whose scores are given: for each estimator one list of corpus scores a seed."""
    found = results(noise={}, truth=False)
    found["tables"] = {"influence": []}
    for estimator, seeds in estimators.items():
        for test in range(tests):
            for seed, scores in enumerate(seeds):
                number = None if estimator == "truth" else seed
                found["tables"]["influence"] += [
                    {"estimator": estimator, "seed": number, "test": f"test {test}", "corpus": f"c{i}", "score": s}
                    for i, s in enumerate(scores)
                ]
    return found


def test_writes_one_file_into_the_run_folder(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", results())
    before = {p.name for p in folder.iterdir()}
    path = build(folder)
    assert path == folder / "report.html"
    assert {p.name for p in folder.iterdir()} == before | {"report.html"}


def test_an_old_report_survives_when_the_new_one_cannot_be_made(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", results())
    build(folder)
    old = (folder / "report.html").read_bytes()
    (folder / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json cannot be read as JSON"):
        build(folder)
    assert (folder / "report.html").read_bytes() == old


def test_answer_comes_first_and_names_the_corpus_that_helped(tmp_path: Path) -> None:
    page = page_of(tmp_path, with_scores({"truth": [[5, 1, 0, -3]], "untrac": [[4, 2, 0, -3], [5, 2, 0, -3]]}))
    words = page.words
    assert "c0 helped most on “test 0”" in words
    assert "c3 helped least" in words
    assert "UnTrac, which needs no retraining, agrees on the first" in words
    assert "Confirmed by retraining" in words
    first_section = next(a["id"] for a in page.all("section"))
    assert first_section == "answer"


def test_an_estimate_that_contradicts_the_truth_is_not_confirmed(tmp_path: Path) -> None:
    words = page_of(tmp_path, with_scores({"truth": [[5, 1, 0, -3]], "untrac": [[-4, 0, 1, 3], [-5, 0, 1, 3]]})).words
    assert "Not confirmed by retraining" in words
    assert "c0 helped most" in words, "the measured truth is the answer, not the estimate"
    assert "UnTrac, which needs no retraining, puts c3 first instead" in words


def test_says_that_truth_was_not_measured(tmp_path: Path) -> None:
    words = page_of(tmp_path, results(truth=False)).words
    assert "Leave-one-out truth was not measured in this run" in words
    assert "By UnTrac, " in words
    assert "Confirmed by retraining" not in words


def test_says_that_there_is_only_one_seed(tmp_path: Path) -> None:
    words = page_of(tmp_path, results(seeds=1)).words
    assert "There is only one seed" in words
    assert "There are no error bars because there is only one seed" in words
    assert "There is only one seed" not in page_of(tmp_path, results(seeds=2)).words


def test_says_when_a_gradient_baseline_wins_and_why(tmp_path: Path) -> None:
    words = page_of(tmp_path, results(noise={**NOISE, "untrac": 3.0, "grad_cos": 0.05})).words
    assert "UnTrac does not beat the gradient baselines here" in words
    assert "while GradCos has" in words
    assert "What the numbers show:" in words
    better = page_of(tmp_path, results(noise={**NOISE, "untrac": 0.05})).words
    assert "UnTrac follows the truth more closely than every gradient baseline" in better
    assert "does not beat" not in better


def test_why_names_the_step_at_which_agreement_peaked(tmp_path: Path) -> None:
    found = with_scores({"truth": [[3, 2, 1]], "untrac": [[1, 2, 3]], "grad_dot": [[3, 2, 1]]})
    losses = {0: [1, 1, 1], 16: [4, 3, 2], 32: [4, 5, 6]}
    found["tables"]["curves"] = [
        {"estimator": "untrac", "seed": 0, "corpus": f"c{i}", "set": "test 0", "step": step, "loss": loss}
        for step, row in losses.items()
        for i, loss in enumerate(row)
    ]
    words = page_of(tmp_path, found).words
    assert "agreement peaked at step 16 with r = 1.00 and was −1.00 at the end" in words


def test_says_when_the_first_two_overlap(tmp_path: Path) -> None:
    tied = with_scores({"untrac": [[2.0, 1.8, 0, -3], [1.8, 2.0, 0, -3], [2.0, 1.9, 0, -3]]})
    assert "read them as tied: c0 and c1" in page_of(tmp_path, tied).words
    clear = with_scores({"untrac": [[9.0, 1.8, 0, -3], [8.9, 1.8, 0, -3], [9.1, 1.9, 0, -3]]})
    assert "tied:" not in page_of(tmp_path, clear).words


def test_says_that_magnitudes_mean_nothing_once(tmp_path: Path) -> None:
    assert page_of(tmp_path, results()).words.count("Only the order of the corpora means something") == 1


@pytest.mark.parametrize("shape", ["usual", "one test", "no truth"])
def test_page_is_self_contained_and_accessible(tmp_path: Path, shape: str) -> None:
    found = {
        "usual": results,
        "one test": lambda: results(tests=["digits"], corpora=["a", "b", "c"], seeds=1),
        "no truth": lambda: results(truth=False, noise={"untrac_inv": 0.5}),
    }[shape]()
    page = page_of(tmp_path, found)
    assert not page.all("script")
    assert not page.all("img")
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        outside = [v for n, v in attributes.items() if n in ("src", "href") and not v.startswith(("#", "data:"))]
        assert not outside or tag == "a", (tag, attributes)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")} <= set(ids)
    charts = [a for a in page.all("svg") if "aria-hidden" not in a]
    assert charts
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in charts)
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert len(page.all("figure")) == len(page.all("figcaption")) > 2


def test_names_from_the_data_are_escaped(tmp_path: Path) -> None:
    nasty = '<script>alert(1)</script>"onload="x'
    found = results(corpora=[nasty, "plain", "other", "more"], tests=[nasty + "t", "ok"])
    found["environment"] = {nasty: nasty}
    found["tables"]["phases"][0]["phase"] = nasty
    found["tables"]["corpora"][0].update(license=nasty, digest=nasty, issues={nasty: 2})
    found["tables"]["deviations"] = [{"option": nasty, "value": nasty, "paper": nasty}]
    found["metrics"] = {nasty: 1.0}
    page = page_of(tmp_path, found)
    assert not page.all("script")
    assert not [a for _, a in page.elements if "onload" in a]
    assert nasty in page.words


@pytest.mark.parametrize("table", [*results()["tables"], "all"])
def test_missing_tables_never_break_the_report(tmp_path: Path, table: str) -> None:
    found = results()
    found["tables"] = {} if table == "all" else {k: v for k, v in found["tables"].items() if k != table}
    words = page_of(tmp_path, found).words
    assert "The answer" in words
    assert ("the question is still open" in words) == (table in ("influence", "all"))


def test_rows_that_lack_values_or_hold_none_and_nan_never_break_the_report(tmp_path: Path) -> None:
    found = results()
    for rows in found["tables"].values():
        for position, row in enumerate(rows):
            key = sorted(row)[position % len(row)]
            if position % 3 == 0:
                row[key] = None
            elif position % 3 == 1 and isinstance(row[key], float):
                row[key] = float("nan")
            elif position % 3 == 2 and position % 2:
                del row[key]
    assert "The answer" in page_of(tmp_path, found).words


def test_scores_that_are_not_finite_are_reported(tmp_path: Path) -> None:
    found = results()
    for row in found["tables"]["influence"][:3]:
        row["score"] = row["standardised"] = float("nan")
    words = page_of(tmp_path, found).words
    assert "3 scores were not finite numbers" in words
    assert "Some scores are missing (Leave-one-out truth)" in words


def test_agreement_is_computed_where_the_table_is_missing(tmp_path: Path) -> None:
    full = results()
    bare = {**full, "tables": {k: v for k, v in full["tables"].items() if not k.startswith("agreement")}}
    lead = "Over the corpora UnTrac correlates with leave-one-out truth at r = "
    quoted = [page_of(tmp_path, f).words.partition(lead)[2].split(";")[0] for f in (full, bare)]
    assert quoted[0] and quoted[0] == quoted[1]


def test_standardised_scores_are_computed_from_raw_ones(tmp_path: Path) -> None:
    page = page_of(tmp_path, with_scores({"untrac": [[2, 0, -2]]}))
    bars = [a["aria-label"] for a in page.all("svg") if a.get("aria-label", "").startswith("Standardised")]
    assert bars == ["Standardised UnTrac scores on test 0: c0 1.2, c1 0.0, c2 −1.2"]


def test_many_test_sets_and_estimators_stay_light(tmp_path: Path) -> None:
    path = build(write_run(tmp_path / "run", results(tests=[f"group/{i}" for i in range(26)])))
    assert path.stat().st_size < 1.5e6
    assert "14 more test sets" in Page(path.read_text()).words


def test_shows_data_cost_and_configuration(tmp_path: Path) -> None:
    words = page_of(tmp_path, results()).words
    for expected in (*CORPORA, *TESTS, "broken json: 1", "leave-one-out", "28 min 53 s", "unlearning.batch_size",
                     "arXiv 2401.15241", "3fa9c17e2b04", '"learning_rate": 5e-05', "2.9.1"):  # fmt: skip
        assert expected in words


def test_other_recipes_get_a_plain_page(tmp_path: Path) -> None:
    found = {"recipe": "charts", "metrics": {"loss": 1.25}, "tables": {"scores": [{"name": "<b>", "value": 0.5}]}}
    page = page_of(tmp_path, found)
    assert "Results of the recipe charts" in page.words
    assert "1.2500" in page.words and "<b>" in page.words and not page.all("b")


def test_refuses_a_folder_without_results(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no run folder"):
        build(tmp_path / "absent")
    with pytest.raises(UserError, match=r"holds no results\.json.*Give the folder"):
        build(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has not finished; run the same command again"):
        build(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match="holds no results of a run"):
        build(tmp_path)


def test_loads_neither_torch_nor_ray_and_jinja_only_when_building(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", results(seeds=1, tests=TESTS[:1]))
    script = (
        "import sys; from pathlib import Path; import isoray.report\n"
        "assert 'jinja2' not in sys.modules\n"
        f"isoray.report.build(Path({str(folder)!r}))\n"
        "assert not {'torch', 'ray', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


def test_says_that_the_noise_of_a_single_truth_is_unknown(tmp_path: Path) -> None:
    words = page_of(tmp_path, with_scores({"truth": [[3, 1, 0]], "untrac": [[3, 2, 0]]})).words
    assert "its own noise is unknown" in words
    assert "by 3 nats" in words


def test_says_when_every_corpus_looks_harmful(tmp_path: Path) -> None:
    words = page_of(tmp_path, with_scores({"truth": [[-1, -2, -3]], "untrac": [[3, 2, 0]]})).words
    assert "Every corpus looks harmful in absolute terms" in words
    assert "c0 helped most" in words
