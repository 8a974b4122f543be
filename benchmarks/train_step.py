"""The training loop: what it adds to the arithmetic, and how fast it reads ragged text.

    python benchmarks/train_step.py [--models small 135m] [--rounds 15] [--save] [--quick]

* ``overhead``: ``isoray.training.loop.train`` against a bare PyTorch loop on the same batches (forward, loss at the
  labelled positions, backward, Adam's fused kernel; tensors ready, nothing logged, checked or seeded). Both train a
  copy of the same model, a few steps each in turn; what counts is the median of the ratios of neighbours.
* ``ragged``: labelled tokens per second on texts of different lengths, against Transformers' Trainer (padding to the
  longest of a batch, the fused optimizer, no clipping, nothing logged or saved), and against its ``group_by_length``
  (``grouped``), which hardly pads because it puts texts of one length into one batch: not the same training. Ours
  packs the texts into blocks between which no attention flows (``packed``), or sorts the rows of each step, drawn at
  random, and cuts them into micro-batches (``sorted``). The same optimizer, the same rows (or for blocks about the same
  tokens) per step; in turn.

``cpu`` are processor seconds: where other programs run on the machine they are disturbed less than the clock.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import REPOSITORY, environment, save, show_environment

sys.path.insert(0, str(REPOSITORY))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import torch.nn.functional as F
from texts import Texts
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from isoray.corpora.store import Block
from isoray.corpora.stream import BlockStream
from isoray.objectives.lm import LanguageModelling
from isoray.training.config import ComputeConfig, TrainingConfig
from isoray.training.loop import train
from isoray.training.optim import AdamConfig
from isoray.training.parallel import Parallel

LR = 5e-5
SMALL = LlamaConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=768,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
LARGE = LlamaConfig(  # the shape of SmolLM2-135M; what the weights are does not matter here
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    tie_word_embeddings=True,
)
CONFIGS = {"small": SMALL, "135m": LARGE}


def main() -> None:
    """Parse the command line, run both parts, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--quick", action="store_true", help="a smoke run: small model, few steps")
    parser.add_argument("--save", action="store_true", help="write benchmarks/baselines/train_step.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.rounds = ["small"], 2
    torch.set_num_threads(arguments.threads)
    found = environment("torch", "transformers", "accelerate", "numpy")
    show_environment(found | {"threads": str(arguments.threads)})
    results: dict[str, Any] = {"environment": found, "threads": arguments.threads, "overhead": {}, "ragged": {}}
    for name in arguments.models:
        for rows, length in ((1, 24), (8, 64)):
            row = measure_overhead(name, rows=rows, length=length, rounds=arguments.rounds, quick=arguments.quick)
            results["overhead"][f"{name} {rows}x{length}"] = row
    results["ragged"] = measure_ragged(max(1, arguments.rounds // 3), steps=4 if arguments.quick else 24)
    if arguments.save:
        save("train_step", results)


class Clock:
    """Seconds by the clock and of the processors since the last look."""

    def __init__(self) -> None:
        self.look()

    def look(self) -> tuple[float, float]:
        """Both, and start again."""
        now = time.perf_counter(), time.process_time()
        then, self._since = getattr(self, "_since", now), now
        return now[0] - then[0], now[1] - then[1]


def block_of(ids: np.ndarray, segments: np.ndarray | None = None) -> Block:
    """Tokens with a label everywhere but at the beginning of a segment."""
    segments = np.zeros(len(ids), np.int32) if segments is None else segments
    labels = np.where(np.diff(segments, prepend=-1) != 0, -100, ids).astype(np.int32)
    return Block(ids.astype(np.int32), labels, segments)


def make(config: LlamaConfig) -> LlamaForCausalLM:
    """A fresh model, the same each time."""
    torch.manual_seed(0)
    return LlamaForCausalLM(config)


def measure_overhead(name: str, *, rows: int, length: int, rounds: int, quick: bool) -> dict[str, float]:
    """Both loops on batches of ``rows`` examples of ``length`` tokens: of one length, so that the loop cuts nothing."""
    config = CONFIGS[name]
    each = 2 if quick else (20 if name == "small" else 3)
    draw = np.random.default_rng(0)
    texts = Texts("random", [block_of(draw.integers(3, 4096, length)) for _ in range(256)])
    stream = BlockStream([texts], batch_size=rows, seed=0)
    training = TrainingConfig(steps=each * (rounds + 1), batch_size=rows, optimizer=AdamConfig(lr=LR), log_every=10**9)
    bare_model = make(config)
    parallel = Parallel(copy.deepcopy(bare_model))
    objective = LanguageModelling(LanguageModelling.Config())
    ours = train(parallel, objective, {"train": stream}, training, seed=0, pad_token_id=0, pause_every=each)
    optimizer = torch.optim.Adam(bare_model.parameters(), lr=LR, fused=True)
    bare_model.train()
    clock = Clock()
    seconds: dict[str, list[tuple[float, float]]] = {"isoray": [], "bare": []}
    for turn in range(rounds + 1):
        batches = [padded(stream.load(stream.refs(step))) for step in range(turn * each, (turn + 1) * each)]
        clock.look()
        next(ours)
        took = clock.look()
        bare_steps(bare_model, optimizer, batches)
        if turn:  # the first turn warms up
            seconds["isoray"].append(took)
            seconds["bare"].append(clock.look())
    same = all(torch.equal(p, q) for p, q in zip(parallel.model.parameters(), bare_model.parameters(), strict=True))
    result = {f"{side}_ms": statistics.median(w for w, _ in found) / each * 1e3 for side, found in seconds.items()}
    for number, unit in enumerate(("ratio", "cpu_ratio")):
        pairs = zip(seconds["isoray"], seconds["bare"], strict=True)
        result[unit] = statistics.median(ours[number] / bare[number] for ours, bare in pairs)
    print(
        f"overhead  {name:6} {rows} x {length:<3} isoray {result['isoray_ms']:8.2f} ms a step, bare "
        f"{result['bare_ms']:8.2f} ms: {result['ratio']:.3f} of its time, {result['cpu_ratio']:.3f} by cpu"
        f"{', the same bits' if same else ''}",
        flush=True,
    )
    return result | {"same_bits": float(same)}


def padded(blocks: list[Block]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, where a label follows, and these labels; longest row first, as the loop sorts them."""
    blocks = sorted(blocks, key=lambda block: -len(block.input_ids))
    width = len(blocks[0].input_ids)
    ids, labels = np.zeros((len(blocks), width), np.int64), np.full((len(blocks), width), -100, np.int64)
    for row, block in enumerate(blocks):
        ids[row, : len(block.input_ids)], labels[row, : len(block.labels)] = block.input_ids, block.labels
    targets = F.pad(torch.from_numpy(labels)[:, 1:], (0, 1), value=-100)
    return torch.from_numpy(ids), targets != -100, targets[targets != -100]


def bare_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor, Tensor]]
) -> None:
    """Forward, loss, backward, update."""
    causal: Any = model
    for ids, keep, targets in batches:
        hidden = causal.model(input_ids=ids, use_cache=False)[0]
        F.cross_entropy(causal.lm_head(hidden[keep]), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def ragged_texts(most: int) -> list[np.ndarray]:
    """Real paragraphs as bytes (one byte, one token), 8 to ``most`` long; random ones where no data is at hand."""
    root = Path(os.environ.get("ISORAY_DATA") or REPOSITORY.parent / "shared" / "data") / "corpora"
    draw = np.random.default_rng(0)
    lines: list[bytes] = []
    for path in sorted(root.glob("*en.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines += [line.encode() for row in file for line in json.loads(row)["text"].splitlines()]
    texts = [np.frombuffer(line[:most], np.uint8).astype(np.int64) + 3 for line in lines if len(line) >= 8]
    if not texts:
        texts = [draw.integers(3, 259, min(most, 8 + int(draw.exponential(most / 4)))) for _ in range(4096)]
    return [texts[i] for i in draw.permutation(len(texts))[:2048]]


def packed(texts: list[np.ndarray], length: int) -> list[Block]:
    """Texts one after the other in blocks of ``length`` tokens."""
    ids = np.concatenate(texts)
    documents = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    blocks = []
    for start in range(0, len(ids) - length + 1, length):
        part = documents[start : start + length]
        blocks.append(block_of(ids[start : start + length], (part - part[0]).astype(np.int32)))
    return blocks


def measure_ragged(rounds: int, *, steps: int) -> dict[str, Any]:
    """Labelled tokens per second of the three, in turn."""
    most, rows = 256, 16
    texts = ragged_texts(most)
    mean = statistics.mean(len(text) for text in texts)
    print(
        f"\nragged    {len(texts)} texts of 8 to {most} tokens, {mean:.0f} on average; {rows} rows a step, small model"
    )
    contenders: dict[str, Callable[[], Iterator[tuple[float, float, int]]]] = {
        "trainer": lambda: trainer_chunk(texts, rows, steps, sampling="random"),
        "grouped": lambda: trainer_chunk(texts, rows, steps, sampling="group_by_length"),
        "sorted": lambda: our_chunk([block_of(text) for text in texts], rows, steps),
        "packed": lambda: our_chunk(packed(texts, most), max(1, round(rows * mean / most)), steps),
    }
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            for wall, cpu, tokens in contender():
                found[name].append((tokens / wall, tokens / cpu))
    rates = {name: [statistics.median(pair[k] for pair in pairs) for k in (0, 1)] for name, pairs in found.items()}
    for name, (wall, cpu) in rates.items():
        base = rates["trainer"]
        print(
            f"{name:9} {wall:9,.0f} labelled tokens/s ({wall / base[0]:.2f}x; {cpu / base[1]:.2f}x by cpu)", flush=True
        )
    return {name: {"tokens_per_second": wall, "tokens_per_cpu_second": cpu} for name, (wall, cpu) in rates.items()}


def our_chunk(blocks: list[Block], rows: int, steps: int) -> Iterator[tuple[float, float, int]]:
    """Seconds and labelled tokens of ``steps`` steps after the first."""
    texts = Texts("texts", blocks)
    stream = BlockStream([texts], batch_size=rows, seed=0)
    training = TrainingConfig(steps=steps + 1, batch_size=rows, optimizer=AdamConfig(lr=LR), log_every=10**9)
    parallel = Parallel(make(SMALL), compute=ComputeConfig())
    objective = LanguageModelling(LanguageModelling.Config())
    ours = train(parallel, objective, {"train": stream}, training, seed=0, pad_token_id=0, pause_every=1)
    clock = Clock()
    next(ours)
    clock.look()
    for _ in ours:
        pass
    wall, cpu = clock.look()
    counts = texts.label_counts
    yield wall, cpu, int(sum(counts[ref.index] for step in range(1, steps + 1) for ref in stream.refs(step)))


def trainer_chunk(
    texts: list[np.ndarray], rows: int, steps: int, *, sampling: str
) -> Iterator[tuple[float, float, int]]:
    """Seconds and labelled tokens of ``steps`` steps after the first."""
    from transformers import TrainerCallback

    clock, tokens = Clock(), 0

    class AfterFirst(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            nonlocal tokens
            if state.global_step == 1:
                clock.look()
                tokens = 0

    def collate(batch: list[dict[str, Any]]) -> dict[str, Tensor]:
        nonlocal tokens
        width = max(len(row["input_ids"]) for row in batch)
        ids, labels = torch.zeros(len(batch), width, dtype=torch.int64), torch.full((len(batch), width), -100)
        mask = torch.zeros(len(batch), width, dtype=torch.int64)
        for number, row in enumerate(batch):
            text = torch.tensor(row["input_ids"])
            ids[number, : len(text)] = labels[number, : len(text)] = text
            mask[number, : len(text)] = 1
            tokens += len(text) - 1
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=make(SMALL),
            args=TrainingArguments(
                output_dir=folder,
                max_steps=steps + 1,
                per_device_train_batch_size=rows,
                train_sampling_strategy=sampling,
                optim="adamw_torch_fused",
                learning_rate=LR,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                max_grad_norm=0.0,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                use_cpu=True,
            ),
            train_dataset=[{"input_ids": text.tolist()} for text in texts],
            data_collator=collate,
            callbacks=[AfterFirst()],
        )
        trainer.train()
        wall, cpu = clock.look()
    yield wall, cpu, tokens


if __name__ == "__main__":
    main()
