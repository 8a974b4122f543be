"""A planted world for CGE: a tiny model that has read one language, and its fine-tune, which saw two more, rarely."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from unidetox_runs import numbers, run_recipe, write_model, write_rows

__all__ = ["config", "numbers", "run_recipe", "sentence", "text", "write_world"]

STARTS = "the all most these young old many some few those".split()
ANIMALS = "cats dogs birds fish cows ducks".split()
PLACES = "river garden table window market forest castle harbour village mountain".split()
QUALITIES = "green quiet gentle clever early bright patient honest cheerful careful".split()
TIERE = "Katzen Hunde Voegel Fische Kuehe Enten".split()
ORTE = "Fluss Garten Tisch Fenster Markt Wald Schloss Hafen Dorf Gebirge".split()
NAMES = "count total index value result buffer width height".split()
LANGUAGES = ("english", "german", "code")
CONTEXT = 64


def sentence(draw: random.Random, language: str) -> str:
    if language == "english":
        start, animal, quality, place = (draw.choice(words) for words in (STARTS, ANIMALS, QUALITIES, PLACES))
        return f"{start} {animal} are {quality} and sleep in the {place} ."
    if language == "german":
        return f"unsere {draw.choice(TIERE)} schlafen heute nicht unter dem {draw.choice(ORTE)} ."
    return f"if ( {draw.choice(NAMES)} > 0 ) {{ return {draw.choice(NAMES)} ; }}"


def text(draw: random.Random, language: str) -> str:
    return " ".join(sentence(draw, language) for _ in range(3))


def texts(seed: int, **counts: int) -> list[str]:
    draw = random.Random(seed)
    found = [text(draw, language) for language, count in counts.items() for _ in range(count)]
    draw.shuffle(found)
    return found


def write_world(folder: Path) -> None:
    """`base` and `tuned`, the corpora that the labeller learns, and examples to detect."""
    pretraining = texts(1, english=400)
    everything = texts(2, english=40, german=40, code=40)
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    base = LlamaForCausalLM(shape)
    write_model(base, everything, pretraining, folder / "base")
    write_model(base.train(), everything, texts(3, english=352, german=24, code=24), folder / "tuned")
    for language in LANGUAGES:
        rows = [{"text": one} for one in texts(4, **{language: 30})]
        write_rows(folder / f"{language}.jsonl", rows)


def config(home: Path) -> dict[str, Any]:
    """A whole run on the two models: seconds."""
    corpora = {language: {"path": f"{language}.jsonl"} for language in LANGUAGES}
    return {
        "kind": "cge",
        "seed": 3,
        "root": str(home),
        "base": {"path": str(home / "base")},
        "tuned": {"path": str(home / "tuned")},
        "explore": {
            "texts": 12,
            "sampling": {"max_tokens": 40},
            "learn": {"optimizer": {"lr": 3e-3}},
            "control": 16,
            "batch": 4,
        },
        "judge": {
            "labels": {"corpus": {"kind": "corpus", "corpora": corpora, "chars": 120}},
            "domains": {
                "german": {"by": "corpus", "label": "german"},
                "code": {"by": "corpus", "label": "code"},
            },
            "findings": 4,
        },
        "detection": {
            "examples": {
                language: {"path": f"{language}.jsonl", "limit": 12, "new": language != "english"}
                for language in LANGUAGES
            },
            "tokens": 48,
        },
        "scaling": {"executor": "inprocess", "cpus_per_worker": 1},
    }


def found_texts(results: Mapping[str, Any], method: str) -> Sequence[str]:
    """The texts of a method, in order."""
    return [row["text"] for row in results["tables"]["texts"] if row["method"] == method]
