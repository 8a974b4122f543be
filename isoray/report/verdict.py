"""What the numbers of an UnTrac run allow one to say, in sentences: the answer, and how sure it is.

Every sentence is computed; none is a fixed claim. Thresholds are named here and explained in the report itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from isoray.report.numbers import critical_pearson, mean, plain, sd, short
from isoray.report.scores import GRADIENT_BASELINES, TRUTH, Agreement, Scores, label

STRONG, WEAK = 0.7, 0.3
"""Mean Pearson correlation with the truth from which a ranking counts as confirmed, and below which as contradicted."""

Kind = Literal["good", "warn", "bad", "info"]


@dataclass(frozen=True)
class Finding:
    """A sentence and its tone."""

    kind: Kind
    text: Markup


@dataclass(frozen=True)
class TestVerdict:
    """The answer on one test set. ``same_top`` and ``named_by`` are (how many, out of how many)."""

    __test__ = False

    test: str
    ranking: list[str]
    truth: list[str]
    pearson: float | None
    pearson_sd: float | None
    same_top: tuple[int, int]
    named_by: tuple[int, int]
    tied: bool
    kind: Kind
    level: str


@dataclass(frozen=True)
class Verdict:
    """The whole answer: a lead sentence, a level of confidence with its reason, findings, and one row per test set."""

    lead: Markup
    kind: Kind
    level: str
    reason: Markup
    findings: list[Finding]
    tests: list[TestVerdict]


def judge(scores: Scores, agreement: Agreement, *, peak: dict[str, tuple[float, float, float]]) -> Verdict:
    """The verdict on a run. ``peak`` maps estimators to (best step, correlation there, correlation at the end)."""
    tests = [_judge_test(scores, agreement, test) for test in scores.tests if scores.ranking(scores.main, test)]
    kind, level, reason = _overall(scores, agreement, tests)
    findings = [
        *_truth_findings(scores, tests),
        *_comparison(scores, agreement, peak),
        *_spread_findings(scores, tests),
        *_other_findings(scores, tests),
    ]
    return Verdict(_lead(scores, tests), kind, level, reason, findings, tests)


def names(corpora: Sequence[str]) -> Markup:
    """``A, B and C`` with every name marked up and escaped."""
    marked = [Markup("<b>{}</b>").format(c) for c in corpora]
    if len(marked) < 2:
        return Markup("").join(marked)
    return Markup(", ").join(marked[:-1]) + Markup(" and ") + marked[-1]


def _judge_test(scores: Scores, agreement: Agreement, test: str) -> TestVerdict:
    main = scores.main
    ranking = scores.ranking(main, test)
    truth = scores.ranking(TRUTH, test) if scores.truth_measured else []
    tops = [r[0] for seed in scores.seeds(main) if (r := scores.ranking(main, test, seed))]
    others = [r[0] for e in scores.estimated if e != main and (r := scores.ranking(e, test))]
    per_seed = agreement.of_test(main, test)
    r = mean(per_seed)
    tied = False
    if len(ranking) > 1 and len(tops) > 1:
        gap = (scores.mean(main, test, ranking[0]) or 0.0) - (scores.mean(main, test, ranking[1]) or 0.0)
        tied = gap < (scores.sd(main, test, ranking[0]) or 0.0) + (scores.sd(main, test, ranking[1]) or 0.0)
    same_top = sum(t == ranking[0] for t in tops), len(tops)
    kind, level = _test_level(ranking, truth, r, stable=same_top[0] == same_top[1] > 1 and not tied)
    named_by = sum(t == ranking[0] for t in others), len(others)
    return TestVerdict(test, ranking, truth, r, sd(per_seed), same_top, named_by, tied, kind, level)


def _test_level(ranking: list[str], truth: list[str], r: float | None, *, stable: bool) -> tuple[Kind, str]:
    if truth and r is not None:
        same = truth[0] == ranking[0]
        if r >= STRONG and same:
            return "good", "confirmed"
        if r >= STRONG or (r >= WEAK and (same or truth[0] in ranking[:2])) or (same and r > 0):
            return "warn", "partly confirmed"
        return "bad", "not confirmed"
    return ("info", "stable, unchecked") if stable else ("warn", "unstable, unchecked")


def _lead(scores: Scores, tests: list[TestVerdict]) -> Markup:
    if not tests:
        return Markup("This run holds no influence scores yet, so the question is still open.")
    known = [t for t in tests if t.truth]
    if not known:
        source = Markup("By {}, ").format(label(scores.main))
        return source + _ranked([(t.test, t.ranking) for t in tests]) + Markup(".")
    source = Markup("Retraining without each corpus in turn shows that ")
    lead = source + _ranked([(t.test, t.truth) for t in known])
    same = sum(t.truth[0] == t.ranking[0] for t in known)
    name = label(scores.main)
    if len(known) == 1:
        again = Markup("agrees on the first") if same else Markup("puts {} first instead").format(names(known[0].ranking[:1]))
        return lead + Markup(". {}, which needs no retraining, {}.").format(name, again)
    return lead + Markup(". {}, which needs no retraining, names the same first corpus on {} of {} test sets.").format(
        name, same, len(known)
    )


def _ranked(rankings: Sequence[tuple[str, list[str]]]) -> Markup:
    if len(rankings) == 1:
        test, order = rankings[0]
        text = Markup("{} helped most on \u201c{}\u201d").format(names(order[:1]), test)
        if len(order) > 3:
            text += Markup(", then {}").format(names(order[1:3]))
        return text + Markup("; {} helped least").format(names(order[-1:])) if len(order) > 1 else text
    n = len(rankings)
    tops = Counter(order[0] for _, order in rankings).most_common()
    (last, last_times), *_ = Counter(order[-1] for _, order in rankings).most_common(1)
    if len(tops) == 1:
        text = Markup("{} helped most on all {} test sets").format(names([tops[0][0]]), n)
    elif len(tops) <= 4 and tops[0][1] > 1:
        first = Markup("{} helped most on {} of {} test sets, ").format(names([tops[0][0]]), tops[0][1], n)
        text = first + _join([Markup("{} on {}").format(names([c]), k) for c, k in tops[1:]])
    else:
        text = Markup("no single corpus stands out: {} different corpora come first on the {} test sets").format(len(tops), n)
    if last_times > 1 and not (len(tops) == 1 and last == tops[0][0]):
        text += Markup("; {} most often comes last (on {})").format(names([last]), last_times)
    return text


def _join(parts: Sequence[Markup]) -> Markup:
    return Markup(", ").join(parts[:-1]) + Markup(" and ") + parts[-1] if len(parts) > 1 else Markup("").join(parts)


def _overall(scores: Scores, agreement: Agreement, tests: list[TestVerdict]) -> tuple[Kind, str, Markup]:
    if not tests:
        return "info", "No answer yet", Markup("Run it again; it goes on where it stopped.")
    main, seeds = scores.main, len(scores.seeds(scores.main))
    if not scores.truth_measured:
        stable = sum(t.level.startswith("stable") for t in tests)
        if main == TRUTH:
            return "info", "Truth only", Markup("Only leave-one-out retraining was run: the direct answer, by one training each.")
        if seeds < 2:
            return "warn", "Unchecked", Markup("One seed, and no leave-one-out truth to compare with: take it as a first hint.")
        text = Markup("No leave-one-out truth to compare with; {} of {} test sets keep a clear first corpus over {} seeds.")
        level: tuple[Kind, str] = ("info", "Stable, but unchecked") if stable >= 0.75 * len(tests) else ("warn", "Unchecked")
        return *level, text.format(stable, len(tests), seeds)
    r, spread = agreement.overall(main)
    known = [t for t in tests if t.truth]
    same = sum(t.truth[0] == t.ranking[0] for t in known)
    if r is None:
        return "warn", "Unclear", Markup("The correlation with leave-one-out truth could not be computed.")
    within = Markup(" \u00b1 {} over seeds").format(plain(spread)) if spread is not None else Markup("")
    near = sum(t.truth[0] in t.ranking[:2] for t in known)
    if len(known) == 1:
        where = "it puts the right corpus first" if same else "but it puts the wrong corpus first"
    else:
        where = f"its first corpus is the right one on {same} of {len(known)} test sets"
        where += f", among its first two is the right one on {near}" if len(scores.corpora) > 3 else ""
    reason = Markup("Over the corpora {} correlates with leave-one-out truth at r = {}{}; {}.").format(
        label(main), plain(r), within, where
    )
    if r >= STRONG and (same >= 0.7 * len(known) or (len(scores.corpora) > 3 and near >= 0.9 * len(known))):
        return "good", "Confirmed by retraining" + ("" if seeds > 1 else " (one seed)"), reason
    if r >= WEAK:
        return "warn", "Partly confirmed by retraining", reason
    return "bad", "Not confirmed by retraining", reason


def _truth_findings(scores: Scores, tests: list[TestVerdict]) -> list[Finding]:
    if scores.main in ("", TRUTH):
        return []
    if not scores.truth_measured:
        text = Markup(
            "Leave-one-out truth was not measured in this run, so nothing here checks the rankings against "
            "retrained models. Seeds that agree show that the estimate is steady, not that it is right."
        )
        return [Finding("warn", text)]
    n = max((len(t.truth) for t in tests), default=0)
    findings = []
    if n < 3:
        findings.append(Finding("bad", Markup("With {} corpora a correlation says nothing: it is always 1 or \u22121.").format(n)))
    else:
        text = Markup(
            "With {} corpora, chance alone exceeds a correlation of {} on a single test set once in twenty times; "
            "the mean over several test sets is firmer."
        )
        text = text.format(n, plain(critical_pearson(n)))
        low = len(tests) == 1 and tests[0].pearson is not None and abs(tests[0].pearson) < critical_pearson(n)
        only = Markup(" There is one test set here, and {} stays below that.").format(label(scores.main))
        findings.append(Finding("warn", text + only) if low else Finding("info", text))
    raw = [v for t in scores.tests for c in scores.corpora if (v := scores.raw(TRUTH, t, c)) is not None]
    if raw:
        top = max(raw, key=abs)
        text = Markup("The largest effect of leaving a corpus out was a change of the test loss by {} nats.").format(short(top))
        if max(raw) < 0:
            text += Markup(
                " Every corpus looks harmful in absolute terms: models trained without it saw more of the others "
                "in the same number of steps. The order still counts."
            )
        findings.append(Finding("info", text))
    return findings


def _comparison(scores: Scores, agreement: Agreement, peak: dict[str, tuple[float, float, float]]) -> list[Finding]:
    ours, spread = agreement.overall("untrac")
    if ours is None:
        return []
    findings = []
    baselines = [e for e in GRADIENT_BASELINES if e in agreement.estimators]
    best = agreement.best(baselines)
    if best is not None:
        name, other = best
        numbers = (plain(ours), label(name), plain(other))
        if ours > other:
            text = Markup("UnTrac follows the truth more closely than every gradient baseline: mean r = {}, best of them {} with {}.")
            close = spread is not None and ours - other < spread
            text = text.format(*numbers) + (Markup(" The lead is within UnTrac's own spread over seeds.") if close else Markup(""))
            findings.append(Finding("warn" if close else "good", text))
        else:
            text = Markup("UnTrac does <em>not</em> beat the gradient baselines here: mean r = {}, while {} reaches {}.")
            findings.append(Finding("bad", text.format(*numbers) + _why_behind(scores, agreement, name, peak)))
    inverse = agreement.overall("untrac_inv")[0]
    if inverse is not None and abs(inverse - ours) >= 0.1:
        which = ("UnTrac-Inv", "UnTrac") if inverse > ours else ("UnTrac", "UnTrac-Inv")
        pair = sorted((plain(ours), plain(inverse)), key=[plain(max(ours, inverse)), plain(min(ours, inverse))].index)
        text = Markup("Of the two unlearning estimators {} is closer to the truth here than {} ({} against {}).")
        findings.append(Finding("info", text.format(*which, *pair)))
    return findings


def _why_behind(scores: Scores, agreement: Agreement, rival: str, peak: dict[str, tuple[float, float, float]]) -> Markup:
    """What the run's own numbers say about why UnTrac fell behind ``rival``."""
    reasons = []
    ours, spread = agreement.overall("untrac")
    other = agreement.overall(rival)[0]
    if ours is not None and other is not None and spread is not None and other - ours < spread:
        reasons.append(Markup("the gap is smaller than UnTrac's own spread over seeds ({})").format(plain(spread)))
    if "untrac" in peak:
        step, best, end = peak["untrac"]
        if best - end >= 0.1:
            text = Markup("its agreement peaked at step {} with r = {} and was {} at the end: unlearning went on for too long here")
            reasons.append(text.format(short(step), plain(best), plain(end)))
    gaps = []
    for test in scores.tests:
        mine, theirs = mean(agreement.of_test("untrac", test)), mean(agreement.of_test(rival, test))
        if mine is not None and theirs is not None:
            gaps.append((mine - theirs, test))
    if len(gaps) > 1:
        behind = sum(g < 0 for g, _ in gaps)
        text = Markup("it is behind on {} of {} test sets, most of all on \u201c{}\u201d ({})")
        reasons.append(text.format(behind, len(gaps), min(gaps)[1], plain(min(gaps)[0])))
    return Markup(" What the numbers show: {}.").format(_join(reasons)) if reasons else Markup("")


def _spread_findings(scores: Scores, tests: list[TestVerdict]) -> list[Finding]:
    if not tests or scores.main == TRUTH:
        return []
    seeds = len(scores.seeds(scores.main))
    if seeds < 2:
        text = "There is only one seed, so the spread of the scores is unknown and near ties cannot be told from chance."
        return [Finding("warn", Markup(text))]
    findings = []
    steady = sum(t.same_top[0] == t.same_top[1] for t in tests)
    on = f"on {steady} of {len(tests)} test sets" if len(tests) > 1 else "on the test set" if steady else "on no test set"
    text = Markup("All {} seeds put the same corpus first {}.").format(seeds, on)
    findings.append(Finding("good" if steady == len(tests) else "warn", text))
    tied = [t for t in tests if t.tied]
    if tied:
        pairs = [Markup("{} (\u201c{}\u201d)").format(names(t.ranking[:2]), t.test) for t in tied[:3]]
        more = Markup(" and {} more").format(len(tied) - 3) if len(tied) > 3 else Markup("")
        text = Markup("The first two overlap within their spread over seeds, so read them as tied: {}{}.")
        findings.append(Finding("warn", text.format(Markup("; ").join(pairs), more)))
    return findings


def _other_findings(scores: Scores, tests: list[TestVerdict]) -> list[Finding]:
    findings = []
    total = sum(t.named_by[1] for t in tests)
    others = [e for e in scores.estimated if e != scores.main]
    if total and len(others) == 1:
        text = Markup("{} puts the same corpus first as {} on {} of {} test sets.")
        same = sum(t.named_by[0] for t in tests)
        text = text.format(label(others[0]), label(scores.main), same, total)
        if total == 1:
            text = Markup("{} puts {} corpus first.").format(label(others[0]), "the same" if same else "another")
        findings.append(Finding("info", text))
    elif total:
        share = sum(t.named_by[0] for t in tests) / total
        text = Markup("The other estimators put the same corpus first as {} in {}% of all cases.")
        findings.append(Finding("info", text.format(label(scores.main), round(100 * share))))
    elif tests and scores.main != TRUTH:
        findings.append(Finding("info", Markup("Only {} was run, so no other estimator backs it.").format(label(scores.main))))
    missing = [e for e in scores.estimators for t in scores.tests if len(scores.ranking(e, t)) < len(scores.corpora)]
    if missing:
        lacking = ", ".join(label(e) for e in dict.fromkeys(missing))
        findings.append(Finding("warn", Markup("Some scores are missing ({}); comparisons use what is there.").format(lacking)))
    if scores.dropped:
        text = Markup("{} scores were not finite numbers and are left out.").format(scores.dropped)
        findings.append(Finding("bad", text))
    return findings
