"""Texts of the corpora themselves, for training a tokenizer on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from isoray.corpora.config import CorporaConfig
from isoray.corpora.documents import CorpusPlan, document_key, read_documents
from isoray.corpora.files import find_files
from isoray.corpora.select import mix_keys
from isoray.corpora.splits import plan_tasks


def iterate_text(config: CorporaConfig, *, max_bytes_per_corpus: int = 1 << 26) -> Iterator[str]:
    """Texts (prompt and response joined) of the training corpora, corpus after corpus.

    Of a corpus larger than ``max_bytes_per_corpus`` on disk, documents are drawn at random (a function of `seed` and
    of where they stand) with a probability that makes up about as much. `limit` and `max_tokens` are not applied.
    """
    for corpus in config.train:
        files = tuple(find_files(corpus, config))
        tasks = tuple(tuple(task) for task in plan_tasks(files, corpus))
        plan = CorpusPlan(corpus, files, tasks, Path())
        share = min(1.0, max_bytes_per_corpus / max(1, sum(file.bytes for file in files)))
        for split in (split for task in tasks for split in task):
            label = files[split.file].label if files else ""
            for document in read_documents(plan, split):
                if share < 1.0:
                    key = mix_keys(np.array([document_key(label, document.position)], np.uint64), config.seed)
                    if float(key[0]) >= share * 2.0**64:
                        continue
                yield document.text if document.prompt is None else document.prompt + config.separator + document.text


def inputs_of(config: CorporaConfig) -> list[object]:
    """What :func:`iterate_text` depends on, JSON-able: the corpora's settings, and their files' sizes and times."""
    return [
        [corpus.model_dump(mode="json"), [[one.label, one.bytes, one.modified] for one in find_files(corpus, config)]]
        for corpus in config.train
    ]
