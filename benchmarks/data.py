"""Read, tokenise and pack at least 50 MB of text: isoray beside what one would use instead.

    python benchmarks/data.py [--megabytes 50] [--rounds 3] [--processes CORES] [--save]

Contenders, each in a process of its own, in turn, ``--rounds`` times:

* ``bare``: the fast tokenizer in a loop over batches of lines, with its own threads; nothing is packed or written.
* ``datasets``: ``load_dataset("json")``, ``map`` to tokens, ``map`` to blocks, with ``--processes`` processes.
* ``datatrove``: ``JsonlReader`` and ``DocumentTokenizer`` (which shuffles documents) on its local executor.
* ``isoray``: ``isoray.corpora.build`` in one process with the tokenizer's own threads. ``isoray-ray``: the same through
  Ray Data with ``--processes`` actors.

The seconds are those of the work itself, from the files to what is on disk: imports and ``ray.init`` are not in them,
the start of worker processes and actors is. Memory is the greatest sum of proportional set sizes over the process tree,
measured five times a second. The text is real (ISORAY_DATA, else ../shared/data, else the standard library's sources)
and repeated, with its lines in another order, until it is large enough.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from measuring import CORES, REPOSITORY, environment, run, save, show_environment

LENGTH = 1024
FILES = 8
EOS = "</s>"
CONTENDERS = ("bare", "datasets", "datatrove", "isoray", "isoray-ray")


def main() -> None:
    """Parse the command line, run all contenders, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=CORES)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--growth", type=int, default=3, help="how much larger the memory check's input is; 0: none")
    parser.add_argument("--save", action="store_true", help="write benchmarks/baselines/data.json")
    parser.add_argument("--one", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        run_one(arguments.one, arguments.work, arguments.processes)
        return
    with tempfile.TemporaryDirectory(prefix="isoray-benchmark-") as folder:
        results = compare(Path(folder), arguments)
    if arguments.save:
        save("data", results)


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Run everything below ``folder``; returns what is printed."""
    found = environment("ray", "tokenizers", "transformers", "datasets", "datatrove", "pyarrow", "numpy")
    show_environment(found)
    size = write_input(folder / "input", arguments.megabytes * 10**6)
    train_tokenizer(folder / "tokenizer", folder / "input")
    amount = f"{size / 1e6:.1f} MB in {FILES} files"
    print(f"{amount}; blocks of {LENGTH} tokens; {arguments.processes} processes\n")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in arguments.contenders}
    for turn in range(arguments.rounds):
        for name in arguments.contenders[turn % len(runs) :] + arguments.contenders[: turn % len(runs)]:
            runs[name].append(measure(name, folder, arguments.processes))
            print(f"round {turn + 1}  {name:11} {runs[name][-1]['seconds']:7.2f} s", flush=True)
    table = {name: summarise(every) for name, every in runs.items()}
    print_table(table, size)
    results: dict[str, Any] = {"environment": found, "megabytes": size / 1e6, "results": table}
    if arguments.growth:
        results["memory_growth"] = check_growth(folder, arguments, table)
    return results


def summarise(runs: list[dict[str, float]]) -> dict[str, Any]:
    """Medians, and the single times they come from."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "each": [round(run["seconds"], 2) for run in runs],
        "process_seconds": statistics.median(run["process_seconds"] for run in runs),
        "peak_mb": max(run["peak_mb"] for run in runs),
        "tokens": runs[0]["tokens"],
    }


def print_table(table: dict[str, dict[str, Any]], size: int) -> None:
    """Medians and their ratios to isoray's."""
    head = f"{'':11} {'median s':>9} {'MB/s':>6} {'ktok/s':>7} {'tokens':>11} {'peak MB':>8} {'process s':>10}"
    print(f"\n{head}   isoray is")
    for name, row in table.items():
        speed = f"{row['seconds']:9.2f} {size / 1e6 / row['seconds']:6.2f} {row['tokens'] / 1e3 / row['seconds']:7.0f}"
        ratios = [
            f"{other} {row['seconds'] / table[other]['seconds']:.2f}x as fast"
            for other in ("isoray", "isoray-ray")
            if other in table and not name.startswith("isoray")
        ]
        rest = f"{row['tokens']:11,.0f} {row['peak_mb']:8.0f} {row['process_seconds']:10.2f}"
        print(f"{name:11} {speed} {rest}   {', '.join(ratios)}")


def check_growth(folder: Path, arguments: argparse.Namespace, table: dict[str, Any]) -> dict[str, Any]:
    """Peak memory of isoray on an input several times as large."""
    grown = {}
    size = write_input(folder / "input", arguments.growth * arguments.megabytes * 10**6)
    for name in (name for name in table if name.startswith("isoray")):
        peak = measure(name, folder, arguments.processes)["peak_mb"]
        grown[name] = {"megabytes": size / 1e6, "peak_mb": peak, "peak_mb_before": table[name]["peak_mb"]}
        print(f"memory of {name}: {table[name]['peak_mb']:.0f} MB -> {peak:.0f} MB for {size / 1e6:.0f} MB of input")
    return grown


def measure(name: str, folder: Path, processes: int) -> dict[str, float]:
    """Run one contender in a process of its own."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=f"{name}-") as scratch:
        work = Path(scratch)
        for shared in ("input", "tokenizer"):
            (work / shared).symlink_to(folder / shared)
        command = [sys.executable, __file__, "--one", name, "--work", scratch, "--processes", str(processes)]
        cost = run([command], log=work / "log")
        found = json.loads((work / "result.json").read_text())
        return {**found, "process_seconds": cost.seconds, "peak_mb": cost.peak_mb}


def texts() -> Iterator[str]:
    """Real texts."""
    root = Path(os.environ.get("ISORAY_DATA") or REPOSITORY.parent / "shared" / "data") / "corpora"
    found = sorted(root.glob("*.jsonl.gz"))
    for path in found:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    if not found:
        for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
            yield path.read_text(encoding="utf-8", errors="replace")


def write_input(folder: Path, size: int) -> int:
    """Write JSONL files of ``size`` bytes of text or a little more; returns how many bytes of text they hold."""
    folder.mkdir(exist_ok=True)
    originals = list(texts())
    draw = random.Random(0)
    written, number = 0, 0
    outputs = [(folder / f"part-{part}.jsonl").open("w", encoding="utf-8") for part in range(FILES)]
    while written < size:
        lines = originals[number % len(originals)].splitlines(keepends=True)
        if number >= len(originals):
            draw.shuffle(lines)
        text = "".join(lines)
        if text.strip():
            outputs[number % FILES].write(json.dumps({"text": text, "id": str(number)}, ensure_ascii=False) + "\n")
            written += len(text.encode())
        number += 1
    for output in outputs:
        output.close()
    return written


def train_tokenizer(folder: Path, source: Path) -> None:
    """A byte-level BPE of 32,000 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    fast = Tokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32_000, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    fast.train_from_iterator(
        (json.loads(line)["text"] for line in (source / "part-0.jsonl").open(encoding="utf-8")), trainer
    )
    folder.mkdir()
    fast.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": EOS, "tokenizer_class": "PreTrainedTokenizerFast"})
    )


def run_one(name: str, work: Path, processes: int) -> None:
    """Do the work of one contender in this process; write its seconds and tokens as JSON."""
    contenders: dict[str, Callable[[Path, int], tuple[float, int]]] = {
        "bare": run_bare,
        "datasets": run_datasets,
        "datatrove": run_datatrove,
        "isoray": run_isoray,
        "isoray-ray": run_isoray_on_ray,
    }
    seconds, tokens = contenders[name](work, processes)
    (work / "result.json").write_text(json.dumps({"seconds": seconds, "tokens": tokens}))


def run_bare(work: Path, _: int) -> tuple[float, int]:
    """The tokenizer in a loop."""
    from tokenizers import Tokenizer

    begin = time.perf_counter()
    fast = Tokenizer.from_file(str(work / "tokenizer" / "tokenizer.json"))
    tokens = 0
    for path in sorted((work / "input").iterdir()):
        with path.open(encoding="utf-8") as lines:
            rows = [json.loads(line)["text"] for line in lines]
        for start in range(0, len(rows), 1000):
            tokens += sum(len(encoding.ids) + 1 for encoding in fast.encode_batch(rows[start : start + 1000]))
    return time.perf_counter() - begin, tokens


def run_datasets(work: Path, processes: int) -> tuple[float, int]:
    """Two maps, as in the language-modelling example of Transformers."""
    import datasets
    from transformers import PreTrainedTokenizerFast

    datasets.disable_progress_bars()
    fast = PreTrainedTokenizerFast(tokenizer_file=str(work / "tokenizer" / "tokenizer.json"), eos_token=EOS)

    def tokenise(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        return {"input_ids": [[*ids, fast.eos_token_id] for ids in fast(batch["text"])["input_ids"]]}

    def pack(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        joined = [token for ids in batch["input_ids"] for token in ids]
        return {"input_ids": [joined[start : start + LENGTH] for start in range(0, len(joined), LENGTH)]}

    begin = time.perf_counter()
    files = [str(path) for path in sorted((work / "input").iterdir())]
    rows = datasets.load_dataset("json", data_files=files, split="train", cache_dir=str(work / "cache"))
    tokens = rows.map(tokenise, batched=True, num_proc=processes, remove_columns=rows.column_names)
    blocks = tokens.map(pack, batched=True, num_proc=processes)
    seconds = time.perf_counter() - begin
    return seconds, sum(len(ids) for ids in blocks.with_format("arrow")["input_ids"])


def run_datatrove(work: Path, processes: int) -> tuple[float, int]:
    """Its JSONL reader and its tokenizing writer."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    begin = time.perf_counter()
    LocalPipelineExecutor(
        pipeline=[
            JsonlReader(str(work / "input")),
            DocumentTokenizer(
                output_folder=str(work / "out"),
                tokenizer_name_or_path=str(work / "tokenizer" / "tokenizer.json"),
                eos_token=EOS,
                seed=0,
            ),
        ],
        tasks=processes,
        workers=processes,
        logging_dir=str(work / "logs"),
    ).run()
    seconds = time.perf_counter() - begin
    return seconds, sum(path.stat().st_size for path in (work / "out").rglob("*.ds")) // 2


def run_isoray(work: Path, _: int) -> tuple[float, int]:
    """In one process."""
    return build(work, executor="inprocess")


def run_isoray_on_ray(work: Path, processes: int) -> tuple[float, int]:
    """With Ray Data."""
    import ray

    ray.init(
        address="local",
        include_dashboard=False,
        num_cpus=processes + 2,
        object_store_memory=100 * 2**20,
        logging_level="ERROR",
        log_to_driver=False,
    )
    return build(work, executor="ray", workers=processes)


def build(work: Path, **how: Any) -> tuple[float, int]:
    """The stores of the input."""
    from isoray.corpora.build import build
    from isoray.corpora.config import CorporaConfig

    corpora = {"input": {"path": str(work / "input" / "*.jsonl")}}
    config = CorporaConfig.model_validate({"train": corpora, "length": LENGTH})
    begin = time.perf_counter()
    (store,) = build(config, work / "tokenizer", work / "out", **how).train
    return time.perf_counter() - begin, store.manifest.tokens


if __name__ == "__main__":
    main()
