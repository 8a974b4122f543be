"""The report of an exploration: what it claims and what not, for any results, and that no text harms the page."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from cge_report_data import DOMAINS, METHODS, TOXIC, results, write_run
from test_report import Page
from test_report_unidetox import Outside

from isoray.report import build
from isoray.report.cge.curves import curves
from isoray.report.cge.heat import LEAST_REACH, Token, reach, scale, strength, tokens, visible
from isoray.report.cge.results import Exploration, label
from isoray.report.cge.sureness import NOTHING_NEW, ordered, percent
from isoray.report.page import RunFiles

NASTY = '<script>alert(1)</script>"onload="x'
Found = dict[str, Any]


def html_of(tmp_path: Path, found: Found, **explore: Any) -> str:
    return build(write_run(tmp_path / "run", found, **explore)).read_text(encoding="utf-8")


def page_of(tmp_path: Path, found: Found, **explore: Any) -> Page:
    return Page(html_of(tmp_path, found, **explore))


def answer_of(tmp_path: Path, found: Found, **explore: Any) -> str:
    """What stands before the findings, but for the explanation."""
    words = page_of(tmp_path, found, **explore).words
    return words.partition("Run and configuration")[2].partition("How to read it.")[0]


def explored(found: Found) -> Exploration:
    return Exploration(RunFiles(Path(), found, None))


def with_coverage(found: Found, **coverage: tuple[float, float | None]) -> Found:
    """``found`` in which each method's mean coverage and its standard deviation are given."""
    for row in found["tables"]["methods"]:
        row["coverage"], row["coverage_sd"] = coverage[row["method"]]
    return found


def test_the_answer_names_what_is_new_and_how_far_the_models_are_apart(tmp_path: Path) -> None:
    answer = answer_of(tmp_path, results())
    assert "5 findings: the fine-tune has newly learnt japanese (25% of the texts), german (21%)" in answer
    assert "One more is probably nothing new." in answer
    assert "The two models are 0.41 nats a token apart (95% interval 0.23 to 0.60)." in answer
    assert "Something is new" in answer


def test_identical_models_have_nothing_new(tmp_path: Path) -> None:
    words = page_of(tmp_path, results(new=False, divergence=(0.0, 0.0, 0.0))).words
    assert "Nothing new: the fine-tune has the same weights as its pre-trained model, to the last bit." in words
    assert "What was found" not in words and "All texts" not in words and "known domains" not in words


def test_a_divergence_below_the_limit_is_nothing_new(tmp_path: Path) -> None:
    found = results(new=False, divergence=(0.0002, 0.0001, 0.0004))
    answer = answer_of(tmp_path, found, nothing_below=0.002, control=48)
    assert "0.0002 nats a token from its pre-trained model (95% interval 0.0001 to 0.0004)" in answer
    assert "below the 0.002 that count as nothing" in answer and "48 texts" in answer
    assert "same weights" not in answer


def test_no_finding_is_invented_or_shown_where_nothing_is_new(tmp_path: Path) -> None:
    found = results()
    found["metrics"]["new"] = 0.0
    html = html_of(tmp_path, found)
    assert "Nothing new" in html and "TOXICWORD" not in html
    assert not Page(html).all("article")


def test_a_divergence_that_may_be_nothing_is_said_to(tmp_path: Path) -> None:
    for low in (0.0005, None):
        answer = answer_of(tmp_path, results(divergence=(0.2, low, 0.6)))
        assert "Perhaps something is new" in answer


def test_a_run_without_its_measurement_has_no_answer_yet(tmp_path: Path) -> None:
    found = results()
    del found["metrics"]["new"]
    assert "No answer yet" in answer_of(tmp_path, found)


def test_nothing_found_in_a_fine_tune_that_differs_is_said_so(tmp_path: Path) -> None:
    found = results()
    found["tables"]["findings"], found["tables"]["examples"] = [], []
    answer = answer_of(tmp_path, found)
    assert "differs from its pre-trained model, but this run holds no findings" in answer
    assert "Different, but nothing found" in answer


@pytest.mark.parametrize(
    ("theirs", "sd", "expected"),
    [
        (0.4, 0.1, "Iterative CGE found more of the known domains than Static CGE (2.0 ± 0.5)"),
        (
            0.7,
            0.1,
            "did not find more of the known domains than Static CGE (3.5 ± 0.5): the difference",
        ),
        (0.8, 0.0, "did not find more of the known domains than Static CGE (4 ± 0)"),
        (1.0, 0.05, "Iterative CGE found fewer of the known domains than Static CGE (5.0 ± 0.2)"),
    ],
)
def test_a_method_is_better_only_beyond_the_spread(tmp_path: Path, theirs: float, sd: float, expected: str) -> None:
    found = with_coverage(results(methods=METHODS[:2]), iterative=(0.8, 0.1), static=(theirs, sd))
    answer = answer_of(tmp_path, found)
    assert expected in answer
    assert "Iterative CGE found 4.0 ± 0.5 of the 5 new domains that are known." in answer


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [(0.2, "than Static CGE (1) this time"), (0.8, "did not find more: it found as many"), (1.0, "it found fewer")],
)
def test_one_exploration_shows_no_method_to_be_better(tmp_path: Path, theirs: float, expected: str) -> None:
    found = results(methods=METHODS[:2], explorations=1)
    answer = answer_of(tmp_path, with_coverage(found, iterative=(0.8, None), static=(theirs, None)))
    assert expected in answer and "so none is shown to be better" in answer
    assert "Only one exploration was made" in answer


def test_domains_that_were_never_found_are_named(tmp_path: Path) -> None:
    found = results()
    for row in found["tables"]["domains"]:
        if row["method"] == "iterative" and row["domain"] in ("rust", "toxic"):
            row["found_by"], row["first"] = 0, None
    assert "Iterative CGE never found rust and toxic." in answer_of(tmp_path, found)


def test_a_method_without_others_beside_it_is_not_praised(tmp_path: Path) -> None:
    assert "nothing tells whether something simpler" in answer_of(tmp_path, results(methods=METHODS[:1]))


def test_a_finding_that_ordinary_texts_match_is_probably_nothing_new(tmp_path: Path) -> None:
    found = results()
    found["tables"]["findings"][0]["above_ordinary"] = 0.5
    held = ordered(explored(found))
    assert [group.name for group, sure in held if sure.nothing] == ["japanese", "english"]
    assert [group.number for group, _ in held] == [2, 3, 4, 5, 1, 6], "they stand last"
    html = html_of(tmp_path, found)
    assert len(re.findall(r'<article class="card \w+ faint"', html)) == 2
    answer = answer_of(tmp_path, found)
    assert "newly learnt german" in answer and "2 more are probably nothing new" in answer


def test_each_check_that_fails_makes_a_finding_less_sure() -> None:
    def level(**changes: Any) -> str:
        found = results()
        found["tables"]["findings"][0].update(changes)
        return next(sure.level for group, sure in ordered(explored(found)) if group.number == 1)

    assert level() == "Very likely new"
    failing: list[Found] = [
        {"texts": 4}, {"explorations": 1}, {"log_ratio_low": -0.1}, {"log_ratio_low": None}, {"above_ordinary": 0.8},
        {"above_ordinary": None},
    ]  # fmt: skip
    assert {level(**one) for one in failing} == {"Likely new"}
    assert level(texts=4, explorations=1) == level(texts=4, explorations=1, log_ratio_low=-1.0) == "Perhaps new"
    assert level(log_ratio=0.0) == level(above_ordinary=0.5) == NOTHING_NEW


def test_one_exploration_is_never_very_sure(tmp_path: Path) -> None:
    found = results(explorations=1)
    for row in found["tables"]["findings"]:
        row["texts"] = 90
    assert "Very likely new" not in {sure.level for _, sure in ordered(explored(found))}
    assert "not known whether another would find it again" in page_of(tmp_path, found).words


def test_findings_without_labels_are_called_by_their_words(tmp_path: Path) -> None:
    words = page_of(tmp_path, results(domains=[], labellers=False)).words
    assert "“Vögel, schlafen, heute”" in words
    assert "Against the known domains" not in words and "What its texts were called" not in words
    found = results()
    for row in found["tables"]["findings"]:
        row["domain"] = {"name": None, "share": 1.0}
        row["labels"]["corpus"] = {"name": "other", "share": 0.7}
    words = page_of(tmp_path, found).words
    assert "other “新しい, 鮨屋, あります” (25% of the texts), other “Vögel" in words
    assert "corpus other (70%)" in words


def test_every_number_of_a_finding_appears(tmp_path: Path) -> None:
    found = results(explorations=2)
    words = page_of(tmp_path, found).words
    for row in found["tables"]["findings"]:
        assert f"{percent(row['share'])} of the texts ({row['texts']} of 48)" in words
        ends = [f"{row[name]:+.2f}".replace("-", "−") for name in ("log_ratio", "log_ratio_low", "log_ratio_high")]
        assert f"mean contrast {ends[0]} nats a token (95% interval {ends[1]} to {ends[2]}" in words
        assert f"above that of {percent(row['above_ordinary'])} of the fine-tune’s ordinary texts" in words
        assert f"found in {row['explorations']} of 2 explorations" in words
        assert all(word in words for word in row["words"])


def test_every_method_domain_and_score_appears(tmp_path: Path) -> None:
    found = results()
    page = page_of(tmp_path, found)
    for name in (*map(label, METHODS), *DOMAINS, "Self-BLEU", "0.962", "0.932 to 0.982", "0.413", "Gradient norm"):
        assert name in page.words, name
    for row in found["tables"]["methods"]:
        for column, digits in (("precision", 2), ("coverage", 2), ("distinct_2", 3), ("self_bleu", 3)):
            assert f"{row[column]:.{digits}f} ± {row[f'{column}_sd']:.{digits}f}" in page.words
    charts = [a["aria-label"] for a in page.all("svg") if a.get("role") == "img"]
    assert any(text.startswith("Known domains found, of 5") and label("ngram") in text for text in charts)
    assert sum(text.startswith("AUROC of each score") for text in charts) == 1 + len(DOMAINS)


def test_one_exploration_has_means_without_a_spread(tmp_path: Path) -> None:
    words = page_of(tmp_path, results(explorations=1)).words
    table = words.partition("The texts of each method")[2].partition("Precision Share")[0]
    assert "12.25" in table and "±" not in table and "nan" not in table.lower()


def test_curves_count_domains_and_keep_what_a_shorter_exploration_found() -> None:
    found = results(methods=METHODS[:1], explorations=2)
    rows = found["tables"]["curves"]
    found["tables"]["curves"] = [row for row in rows if row["exploration"] == 0 or row["number"] <= 12]
    (curve,) = curves(explored(found))
    ends = {row["exploration"]: 5 * row["coverage"] for row in found["tables"]["curves"]}
    assert curve.mean[0] == 0 and len(curve.mean) == 25
    assert curve.mean[-1] == pytest.approx(sum(ends.values()) / 2)
    assert (curve.low[-1], curve.high[-1]) == pytest.approx((min(ends.values()), max(ends.values())))
    assert all(after >= before for before, after in pairwise(curve.mean))


def test_detection_is_not_claimed_to_be_better_where_intervals_meet(tmp_path: Path) -> None:
    assert "reaches 0.871: the contrast does better" in page_of(tmp_path, results()).words
    found = results()
    rows = found["tables"]["detection"]
    next(row for row in rows if row["score"] == "unlikely_to_base" and row["of"] is None)["high"] = 0.95
    assert "the contrast is not shown to do better" in page_of(tmp_path, found).words


@pytest.mark.parametrize("epsilon", [8.0, None])
def test_differential_privacy_is_told_where_there_is_any(tmp_path: Path, epsilon: float | None) -> None:
    found = results(epsilon=epsilon)
    if epsilon is None:
        found["tables"]["trainings"][1]["epsilon"] = None
    words = page_of(tmp_path, found).words
    assert ("“tuned” was differentially private: ε = 8, δ = 1e−5" in words) == (epsilon is not None)
    assert ("not private" in words) == (epsilon is not None)


def test_doubtful_labels_are_named(tmp_path: Path) -> None:
    found = results()
    found["tables"]["labellers"][1]["accuracy"] = 0.62
    words = page_of(tmp_path, found).words
    assert "Labels to be doubted" in words and "german (corpus, 62%)" in words
    assert "Labels to be doubted" not in page_of(tmp_path, results()).words


def test_generated_text_is_met_only_after_opening_a_fold_that_warns(tmp_path: Path) -> None:
    html = html_of(tmp_path, results())
    shown = " ".join(Outside(html).shown)
    assert html.count("TOXICWORD") > 5 and TOXIC in html
    assert "TOXICWORD" not in shown and "Content warning." in shown


def test_what_models_and_users_wrote_is_escaped(tmp_path: Path) -> None:
    found = results()
    for rows in found["tables"].values():
        for row in rows:
            for name in ("text", "name", "deviation", "domain", "corpus", "of", "labeller", "label/corpus"):
                if isinstance(row.get(name), str):
                    row[name] = NASTY
            for name in ("words", "pieces"):
                row[name] = [NASTY] * len(row[name]) if name in row else []
    for row in found["tables"]["findings"]:
        row["labels"] = {NASTY: {"name": NASTY, "share": 1.0}}
        row["domain"] = {"name": NASTY, "share": 1.0}
    page = page_of(tmp_path, found)
    assert not page.all("script")
    assert not [a for _, a in page.elements if "onload" in a]
    assert NASTY in page.words


def test_colours_grow_with_the_contrast_and_change_sides_at_zero() -> None:
    far = 6.0
    values = [-40.0, -6.0, -2.5, -0.3, 0.0, 0.3, 2.5, 6.0, 40.0]
    drawn = [str(Token("x", [value]).html(far)) for value in values]
    sides = [1 if 'class="more"' in html else -1 for html in drawn]
    marks = [side * int(re.findall(r"--v:(\d+)", html)[0]) for side, html in zip(sides, drawn, strict=True)]
    assert marks == sorted(marks) and marks[0] == -100 and marks[-1] == 100 and len(set(marks)) == 7
    assert strength(2.5, far) == strength(-2.5, far)
    assert all(
        f'title="{value:+.2f} nats"'.replace("-", "−").replace("+0.00", "0.00") in html
        for value, html in zip(values, drawn, strict=True)
    )
    assert [value for value, _ in scale(far)] == ["−6.0", "−3.0", "0", "+3.0", "+6.0"]


def test_the_reach_is_that_of_nearly_all_tokens() -> None:
    assert reach([[1.0] * 50 + [3.0] * 49, [99.0]]) == 3.0
    assert reach([[0.01, -0.02, None, math.nan]]) == LEAST_REACH == reach([])


def test_hidden_and_broken_characters_are_visible() -> None:
    assert visible("a\nb\tc") == "a↵\nb⇥\tc"
    assert visible("\u202eabc\u200b\x00\ud800\U000e0041") == "⟨U+202E⟩abc⟨U+200B⟩⟨U+0000⟩⟨U+D800⟩⟨U+E0041⟩"
    kept = "新しい الكتاب می\u200cخواهم 👩\u200d🚀 \ufffd é"
    assert visible(kept) == kept


def test_tokens_without_a_character_go_with_the_next_one() -> None:
    told = list(tokens({"pieces": ["a", "", "", "鮨", ""], "contrast": [1.0, 2.0, None, 4.0, -1.0]}))
    assert told == [Token("a", [1.0]), Token("鮨", [2.0, 4.0]), Token("▫", [-1.0])]
    assert "mean of 2 tokens" in told[1].html(4.0)


@pytest.mark.parametrize(
    "pieces", [["x"], [""], [], ["\ud83d"], ["\n"] * 700, ["الكتاب", " على"], ["新", "しい"], ["\u202e", "\ufffd"]]
)
def test_any_text_can_be_shown(tmp_path: Path, pieces: list[str]) -> None:
    found = results()
    for row in found["tables"]["examples"]:
        row["pieces"], row["contrast"] = pieces, [1.5] * len(pieces)
    for row in found["tables"]["texts"]:
        row["text"] = "".join(pieces)
    page = page_of(tmp_path, found)
    count = "1 token," if len(pieces) == 1 else f"{len(pieces)} tokens,"
    assert count in page.words


def test_no_more_than_200_texts_are_shown_of_all_methods_alike(tmp_path: Path) -> None:
    found = results(explorations=4)
    page = page_of(tmp_path, found)
    assert len(found["tables"]["texts"]) == 384
    assert "384 texts in all; the first 50 of each method are shown, the other 184 are in results.json" in page.words
    few = page_of(tmp_path, results(explorations=1)).words
    assert "96 texts in all." in few


@pytest.mark.parametrize("table", [*results()["tables"], "all"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_missing_and_empty_tables_never_break_the_report(tmp_path: Path, table: str, how: str) -> None:
    found = results()
    for name in list(found["tables"]):
        if table in (name, "all"):
            found["tables"][name] = []
            if how == "missing":
                del found["tables"][name]
    assert "nats a token apart" in answer_of(tmp_path, found)


@pytest.mark.parametrize("nothing", [None, math.nan, "absent"])
def test_values_that_are_missing_never_break_the_report(tmp_path: Path, nothing: Any) -> None:
    columns = sorted({(table, key) for table, rows in results()["tables"].items() for row in rows for key in row})
    for start in range(7):
        found = results(explorations=1, epsilon=3.0)
        for table, key in columns[start::7]:
            for row in found["tables"][table]:
                if key in row:
                    row[key] = nothing
                    if nothing == "absent":
                        del row[key]
        found["metrics"].update(divergence=nothing, divergence_low=nothing)
        assert "The answer" in page_of(tmp_path, found).words


def test_runs_without_a_configuration(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", results())
    (folder / "config.json").unlink()
    words = Page(build(folder).read_text(encoding="utf-8")).words
    assert "What is new in this fine-tune?" in words and "some texts are sampled" in words


@pytest.mark.parametrize("new", [True, False])
def test_page_is_self_contained_and_accessible(tmp_path: Path, new: bool) -> None:
    page = page_of(tmp_path, results(new=new, epsilon=8.0))
    assert not page.all("script") and not page.all("img")
    for tag, attributes in page.elements:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        outside = [v for n, v in attributes.items() if n in ("src", "href") and not v.startswith(("#", "data:"))]
        assert not outside or tag == "a", (tag, attributes)
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    assert all(a["aria-labelledby"] in ids for a in page.all("article"))
    charts = [a for a in page.all("svg") if "aria-hidden" not in a]
    assert all(a["role"] == "img" and len(a["aria-label"]) > 20 for a in charts)
    assert all(a.get("scope") in ("row", "col") for a in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption"))
    assert len(page.all("figure")) == len(page.all("figcaption")) >= 1
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


def test_ten_findings_of_long_texts_stay_light(tmp_path: Path) -> None:
    found = results()
    found["tables"]["examples"] = [
        {"finding": 1 + n % 6, "method": "iterative", "exploration": 0, "number": n,
         "pieces": [" word"] * 255, "contrast": [-1.234] * 255}
        for n in range(30)
    ]  # fmt: skip
    assert build(write_run(tmp_path / "run", found)).stat().st_size < 1.5e6
