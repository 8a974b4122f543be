"""CGE on a planted world: what the method must do, how it goes on after a fault, what it refuses."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cge_runs import CONTEXT, config, found_texts, numbers, run_recipe, write_world
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import AutoModelForCausalLM

from isoray.errors import DataError, IsorayError, UserError
from isoray.exploration.config import LearnConfig
from isoray.exploration.jobs import Draw
from isoray.exploration.ngrams import Counts, rank
from isoray.exploration.reference import Reference, Tokens
from isoray.generation.batch import answer
from isoray.generation.contrast import ContrastConfig
from isoray.generation.engine import Request
from isoray.generation.sampling import SamplingConfig, seed_of
from isoray.generation.transformers import TransformersEngine
from isoray.models.load import load
from isoray.training.config import ComputeConfig
from isoray.training.parallel import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")
Results = dict[str, Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """The planted world. Tests that change it copy it."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    return folder


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an undisturbed run. Tests that run in it copy it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    run_recipe(out, config(home))
    return out


def read(out: Path) -> Results:
    results: Results = json.loads((out / "results.json").read_text())
    return results


def brief(home: Path, *, methods: tuple[str, ...] = ("iterative",), **explore: Any) -> dict[str, Any]:
    """One method, few texts, no labels."""
    settings = config(home)
    given = {"texts": 4, "methods": list(methods), "control": 4}
    return settings | {"explore": settings["explore"] | given | explore, "judge": {}, "detection": None}


# --- what the method must do ---


def test_iterative_finds_both_new_languages_and_static_repeats_one(whole: Path) -> None:
    metrics = read(whole)["metrics"]
    assert metrics["new"] == 1 and metrics["divergence_low"] > 0
    assert metrics["coverage/iterative"] == 1.0
    assert metrics["coverage/static"] == 0.5 and metrics["precision/static"] == 1.0
    assert metrics["precision/sampling"] < 0.5 < metrics["precision/iterative"]
    assert metrics["distinct_2/static"] < metrics["distinct_2/iterative"]


def test_findings_tell_what_is_new_and_what_is_not(whole: Path) -> None:
    tables = read(whole)["tables"]
    assert sum(row["texts"] for row in tables["findings"]) == 12
    new = [row for row in tables["findings"] if row["above_ordinary"] == 1.0]
    assert {row["domain"]["name"] for row in new} == {"german", "code"}
    assert all(row["domain"]["share"] == 1.0 for row in new)
    words = {row["domain"]["name"]: row["words"] for row in new}
    assert "schlafen" in words["german"] and "return" in words["code"]
    for row in tables["findings"]:
        if row not in new:  # what is left when both were learnt
            assert row["domain"]["name"] is None and row["log_ratio"] < 1
    for row in tables["examples"]:
        assert len(row["pieces"]) == len(row["contrast"]) == 40


def test_given_examples_of_the_new_languages_rank_first(whole: Path) -> None:
    results = read(whole)
    assert results["metrics"]["auroc/contrast"] == 1.0
    of = {row["of"] for row in results["tables"]["detection"] if row["score"] == "contrast"}
    assert of == {None, "german", "code"}


def test_a_reference_that_learns_a_text_finds_it_less_and_less_new(home: Path) -> None:
    tuned, base = load(home / "tuned"), load(home / "base")
    reference = a_reference(home, base.model)
    text = (0, *tuned.tokenizer("if ( width > 0 ) { return index ; }").input_ids)
    contrasts = []
    for times in range(6):
        reference.learn([text] * times)
        contrasts.append(log_likelihood(tuned.model, text) - log_likelihood(base.model, text))
    assert all(after < before for before, after in itertools.pairwise(contrasts))


def test_without_contrast_texts_are_plain_beam_samples_of_the_fine_tune(home: Path, tmp_path: Path) -> None:
    results = run_recipe(tmp_path / "run", brief(home, methods=("static",), alpha=0, gamma=0))
    seeds = [seed_of(seed_of(3, 0), number) for number in range(4)]
    contrast = ContrastConfig(positive=str(home / "tuned"), normalise=False)
    sampling = SamplingConfig(max_tokens=40, beams=4, eos="forbid")
    with TransformersEngine(TransformersEngine.Config(slots=64), contrast) as engine:
        answered = answer(engine, [Request(str(seed), [0], sampling, seed) for seed in seeds])
    assert found_texts(results, "static") == [answered[str(seed)].text for seed in seeds]


def test_one_explorer_is_the_published_serial_algorithm(home: Path, tmp_path: Path) -> None:
    results = run_recipe(tmp_path / "run", brief(home))
    assert found_texts(results, "iterative") == serial(home, 4)


def serial(home: Path, count: int) -> list[str]:
    """The algorithm as it is written down: draw a text, take a step of AdamW on it, go on; a new engine each time."""
    model = AutoModelForCausalLM.from_pretrained(home / "base", dtype=torch.float32).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    base, tuned = load(home / "base"), load(home / "tuned")
    contrast = ContrastConfig(positive="tuned", negative="base", alpha=0.1, gamma=1.0, normalise=False)
    sampling = SamplingConfig(max_tokens=40, beams=4, eos="forbid")
    texts = []
    for number in range(count):
        base.model.load_state_dict(model.state_dict())
        engine = TransformersEngine(TransformersEngine.Config(), contrast, {"positive": tuned, "negative": base})
        (found,) = answer(engine, [Request("a", [0], sampling, seed_of(seed_of(3, 0), number))]).values()
        texts.append(found.text)
        ids = torch.tensor([[0, *found.token_ids]])
        logits = model(ids).logits[0, :-1]
        functional.cross_entropy(logits, ids[0, 1:]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return texts


def test_explorers_draw_from_one_reference_and_share_what_they_find(home: Path, tmp_path: Path) -> None:
    one = found_texts(run_recipe(tmp_path / "one", brief(home)), "iterative")
    three = found_texts(run_recipe(tmp_path / "three", brief(home, texts=7, explorers=3)), "iterative")
    assert len(three) == 7 and three[0] == one[0]  # nothing had been learnt yet
    parts = brief(home, texts=7, explorers=3, batch=2)
    assert found_texts(run_recipe(tmp_path / "parts", parts), "iterative") == three  # however they are dealt out
    static = found_texts(run_recipe(tmp_path / "static", brief(home, methods=("static",), texts=7)), "static")
    assert three[:3] == static[:3] and three[3:] != static[3:]


@pytest.mark.parametrize("private", [False, True])
def test_a_base_and_fine_tune_of_the_run_s_own_are_explored(home: Path, tmp_path: Path, private: bool) -> None:
    if private:
        pytest.importorskip("opacus", reason="private training needs Opacus: pip install 'isoray[privacy]'")
    settings = brief(home, methods=("iterative", "sampling"))
    privacy = {"noise_multiplier": 0.5} if private else None
    corpus = {"length": CONTEXT, "packing": False}
    english = {"english": {"path": "english.jsonl"}}
    settings |= {
        "base": {
            "create": {"hidden_size": 32, "layers": 1, "heads": 2, "context": CONTEXT, "tokenizer": {"vocab_size": 512}}
        },
        "pretraining": {"corpora": {**corpus, "train": english}, "training": {"steps": 20, "optimizer": {"lr": 1e-2}}},
        "fine_tuning": {
            "corpora": {**corpus, "train": {**english, "code": {"path": "code.jsonl"}}},
            "training": {"steps": 10, "optimizer": {"lr": 1e-2}, "privacy": privacy},
        },
    }
    del settings["tuned"]
    results = run_recipe(tmp_path / "run", settings)
    assert [row["name"] for row in results["tables"]["trainings"]] == ["base", "tuned"]
    assert results["metrics"]["new"] == 1 and set(results["artifacts"]) == {"model/base", "model/tuned"}
    told = {row["name"]: row["epsilon"] for row in results["tables"]["trainings"]}
    assert told["base"] is None and told["tuned"] == results["metrics"].get("epsilon")
    assert (told["tuned"] is not None) == private


# --- that nothing is new ---


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_nothing_new_is_said_and_nothing_is_invented(home: Path, tmp_path: Path, noise: float) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(home / "base", copy)
    weights = load_file(copy / "model.safetensors")
    torch.manual_seed(0)
    save_file(
        {k: v + noise * torch.randn_like(v) for k, v in weights.items()}, copy / "model.safetensors", {"format": "pt"}
    )
    results = run_recipe(tmp_path / "run", config(home) | {"tuned": {"path": str(copy)}})
    assert results["metrics"]["new"] == 0 and results["metrics"]["divergence"] == pytest.approx(0, abs=1e-4)
    assert not results["tables"]["findings"] and not results["tables"]["texts"] and not results["tables"]["methods"]


# --- faults ---


def test_a_run_that_is_cut_off_goes_on_with_the_same_texts(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    drawn: list[str] = []
    draw = Draw.run

    def cut_off(self: Draw, bench: Any) -> Any:
        if self.key == "iterative-0-00005":
            raise KeyboardInterrupt
        drawn.append(self.key)
        return draw(self, bench)

    monkeypatch.setattr(Draw, "run", cut_off)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(out, config(home))
    assert "iterative-0-00004" in drawn
    before, drawn[:] = list(drawn), []
    monkeypatch.setattr(Draw, "run", lambda self, bench: (drawn.append(self.key), draw(self, bench))[1])
    results = run_recipe(out, config(home))
    assert not set(before) & set(drawn), "texts were drawn again"
    assert numbers(results) == numbers(read(whole))


def test_a_second_start_computes_nothing(
    home: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    monkeypatch.setattr("isoray.exploration.bench.load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert numbers(run_recipe(out, config(home))) == numbers(read(whole))


# --- bad input ---


def test_texts_longer_than_the_context_are_refused(home: Path, tmp_path: Path) -> None:
    settings = brief(home, sampling={"max_tokens": CONTEXT})
    assert f"set at most {CONTEXT - 1}" in refused(tmp_path / "run", settings)


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copied"
    shutil.copytree(home, folder)
    return folder


def refused(out: Path, settings: dict[str, Any]) -> str:
    with pytest.raises(IsorayError) as caught:
        run_recipe(out, settings)
    assert isinstance(caught.value, UserError | DataError)
    assert not (out / "results.json").exists()
    return str(caught.value)


def test_models_of_different_tokenizers_are_refused(copied: Path, tmp_path: Path) -> None:
    file = copied / "tuned" / "tokenizer.json"
    tokens = json.loads(file.read_text())
    vocabulary = tokens["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    tokens["model"]["merges"] = []
    file.write_text(json.dumps(tokens))
    told = refused(tmp_path / "run", config(copied))
    assert "base and tuned" in told and "token 300" in told


def test_missing_weights_are_told(copied: Path, tmp_path: Path) -> None:
    (copied / "tuned" / "model.safetensors").unlink()
    assert str(copied / "tuned") in refused(tmp_path / "run", config(copied))


def test_examples_that_are_not_there_are_told_before_anything_is_computed(copied: Path, tmp_path: Path) -> None:
    (copied / "code.jsonl").unlink()
    settings = config(copied) | {"judge": {}}
    assert "detection.examples.code.path" in refused(tmp_path / "run", settings)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"tuned": None}, "exactly one of `tuned`"),
        ({"explore": {"alpha": 0}}, "alpha is 0"),
        ({"explore": {"methods": []}}, "at least one method"),
        ({"judge": {"domains": {"a": {"by": "corpus", "label": "b"}}}}, "no labeller"),
        ({"detection": {"examples": {"a": {"path": "x"}, "b": {"path": "y"}}}}, "some that are `new`"),
        ({"base": {"create": {}}, "tuned": {"path": "x"}}, "give `pretraining`"),
    ],
)
def test_impossible_configs_are_refused(home: Path, tmp_path: Path, change: dict[str, Any], told: str) -> None:
    assert told in refused(tmp_path / "run", config(home) | change)


# --- n-grams ---


def test_ngrams_put_texts_of_their_own_first_and_no_text_explains_itself() -> None:
    common, new, odd = "a b a b c a b".split(), "x y x y x y z".split(), "q r s t u v w".split()
    ranked = rank([common, new, new[::-1], common, odd], [common] * 4, n=3)
    assert ranked[0] in (1, 2) and set(ranked[:3]) >= {1}
    assert ranked.index(1) < ranked.index(4), "what occurs in one text only is no pattern"


def test_ngram_probabilities_sum_to_one() -> None:
    texts = ["a b a b c".split(), "b a c".split()]
    counts = Counts(texts, 3)
    vocabulary = ["a", "b", "c", "d"]
    for beginning in ([], ["a"], ["a", "b"], ["d"], ["c", "a"]):
        total = sum(np.exp(_last(counts, [*beginning, unit], len(vocabulary))) for unit in vocabulary)
        assert total == pytest.approx(1.0)


def _last(counts: Counts, text: list[str], vocabulary: int) -> float:
    whole = counts.log_probability(text, vocabulary) * len(text)
    before = counts.log_probability(text[:-1], vocabulary) * (len(text) - 1) if len(text) > 1 else 0.0
    return whole - before


def a_reference(home: Path, model: torch.nn.Module) -> Reference:
    learn = LearnConfig.model_validate({"optimizer": {"lr": 1e-3}})
    return Reference(model, home / "base", learn, ranks=Ranks(), compute=ComputeConfig(), seed=0)


def test_a_reference_goes_back_to_the_start_and_is_what_its_texts_make_it(home: Path) -> None:
    tuned = load(home / "tuned")
    texts: list[Tokens] = [
        (0, *tuned.tokenizer(text).input_ids) for text in ("the cats are green .", "return value ; }", "unsere")
    ]
    once, again = load(home / "base").model, load(home / "base").model
    reference, straight = a_reference(home, once), a_reference(home, again)
    for known in ([texts[2]], texts[:1], texts[:2], texts):
        reference.learn(known)
    straight.learn(texts)
    assert reference.learnt == tuple(texts)
    for name, value in once.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    reference.learn(())
    fresh = load(home / "base").model.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in once.state_dict().items())


def log_likelihood(model: Any, text: Tokens) -> float:
    ids = torch.tensor([text])
    with torch.no_grad():
        logits = model.eval()(ids).logits[0, :-1]
    return -float(functional.cross_entropy(logits, ids[0, 1:]))
