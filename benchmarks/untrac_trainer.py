"""One process of the published way to do UnTrac: unlearn one set with Transformers' Trainer, watch the test set.

``python untrac_trainer.py SPEC.json``; :mod:`untrac` writes the specification and says why it is as it is.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Import, load, train with evaluations, write the curve."""
    begin = time.perf_counter()
    spec = json.loads(Path(sys.argv[1]).read_text())

    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    torch.set_num_threads(spec["threads"])
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.float32)

    class Unlearner(Trainer):
        """The loss of an example is the mean over its labelled tokens; training turns its sign round."""

        def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            targets = inputs["labels"][:, 1:]
            nll = F.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
            loss = (nll.view_as(targets).sum(1) / (targets != -100).sum(1)).mean()
            loss = -loss if model.training else loss
            return (loss, outputs) if return_outputs else loss

        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(spec["train"])  # the order that isoray draws

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        width = max(len(row["input_ids"]) for row in rows)
        fill = {"input_ids": spec["pad"], "labels": -100, "attention_mask": 0}
        rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
        return {
            name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
            for name, value in fill.items()
        }

    trainer = Unlearner(
        model=model,
        args=TrainingArguments(
            output_dir=str(Path(sys.argv[1]).parent / "trainer"),
            per_device_train_batch_size=1,
            per_device_eval_batch_size=spec["eval_batch"],
            num_train_epochs=1,
            learning_rate=spec["lr"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=0.0,
            eval_strategy="steps",
            eval_steps=spec["eval_steps"],
            eval_on_start=True,
            logging_steps=spec["eval_steps"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            prediction_loss_only=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            use_cpu=True,
            seed=0,
        ),
        train_dataset=spec["train"],
        eval_dataset=spec["test"],
        data_collator=collate,
    )
    loaded = time.perf_counter()
    trainer.train()
    curve = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    done = time.perf_counter()
    result = {"curve": curve, "start_seconds": loaded - begin, "work_seconds": done - loaded}
    Path(spec["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
