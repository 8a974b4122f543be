"""Documents' tokens become blocks. Pure functions on flat arrays.

Packed, documents stand one after the other and the whole is cut every ``length`` tokens: a document that does not fit
goes on in the next block as a segment of its own. No token attends to, or is predicted from, another segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

GATHER_TOKENS = 1 << 20


class Flat(NamedTuple):
    """Segments, one after the other."""

    tokens: npt.NDArray[Any]
    """uint16 or uint32 [tokens]"""
    starts: npt.NDArray[np.int64]
    """int64 [segments], where each begins."""
    labels: npt.NDArray[np.bool_] | None
    """bool [tokens]: whether a token carries a label; None: all do. (A segment's first token never does.)"""


class Cuts(NamedTuple):
    """Blocks: the arguments of :func:`isoray.corpora.shards.write_shard`."""

    tokens: npt.NDArray[Any]
    offsets: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    labels: npt.NDArray[np.bool_] | None


def gather(tokens: npt.NDArray[Any], begins: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[Any]:
    """The pieces of ``tokens`` that begin at ``begins`` and have ``lengths``, joined in that order."""
    ends = np.cumsum(lengths)
    out = np.empty(int(ends[-1]) if len(ends) else 0, tokens.dtype)
    first = 0
    while first < len(lengths):
        # Whole pieces up to about GATHER_TOKENS at a time: the index array below takes 8 bytes per token.
        done = int(ends[first] - lengths[first])
        last = max(first + 1, int(np.searchsorted(ends, done + GATHER_TOKENS, side="right")))
        if last == first + 1:
            out[done : ends[first]] = tokens[begins[first] : begins[first] + lengths[first]]
        else:
            piece = slice(first, last)
            shift = begins[piece] - (ends[piece] - lengths[piece])
            index = np.repeat(shift, lengths[piece]) + np.arange(done, ends[last - 1])
            out[done : ends[last - 1]] = tokens[index]
        first = last
    return out


def flatten(tokens: npt.NDArray[Any], lengths: npt.NDArray[np.int64], prompts: npt.NDArray[np.int64]) -> Flat:
    """Documents that stand one after the other in ``tokens``; the first ``prompts`` tokens of each carry no label."""
    starts = np.cumsum(lengths) - lengths
    if not prompts.any():
        return Flat(tokens, starts, None)
    change = np.zeros(len(tokens) + 1, np.int8)
    change[starts] += 1
    change[starts + np.minimum(prompts, lengths)] -= 1
    return Flat(tokens, starts, np.cumsum(change[:-1], dtype=np.int8) == 0)


def join(parts: Sequence[Flat]) -> Flat:
    """The segments of all ``parts``, in order."""
    offsets = np.cumsum([0] + [len(part.tokens) for part in parts])
    starts = [part.starts + offset for part, offset in zip(parts, offsets, strict=False)]
    labels = None
    if any(part.labels is not None for part in parts):
        labels = np.concatenate(
            [np.ones(len(part.tokens), np.bool_) if part.labels is None else part.labels for part in parts]
        )
    return Flat(np.concatenate([part.tokens for part in parts]), np.concatenate(starts), labels)


def pack(flat: Flat, length: int) -> tuple[Cuts, Flat]:
    """Blocks of exactly ``length`` tokens, and the tokens at the end that fill none."""
    whole = len(flat.tokens) // length * length
    starts = flat.starts[(flat.starts % length != 0) & (flat.starts < whole)]
    labels = None if flat.labels is None else flat.labels[:whole]
    offsets = np.arange(0, whole + 1, length, dtype=np.int64)
    rest = flat.starts[flat.starts >= whole] - whole
    if len(flat.tokens) > whole and (not len(rest) or rest[0] != 0):
        rest = np.append(0, rest)
    rest_labels = None if flat.labels is None else flat.labels[whole:]
    return Cuts(flat.tokens[:whole], offsets, starts, labels), Flat(flat.tokens[whole:], rest, rest_labels)


def with_rest(cuts: Cuts, rest: Flat) -> Cuts:
    """``cuts`` and one more, shorter block that holds ``rest``."""
    if not len(rest.tokens):
        return cuts
    end = len(cuts.tokens)
    joined = join([Flat(cuts.tokens, cuts.starts, cuts.labels), rest])
    offsets = np.append(cuts.offsets, end + len(rest.tokens))
    return Cuts(joined.tokens, offsets, np.append(cuts.starts, rest.starts[1:] + end), joined.labels)


def one_per_block(
    tokens: npt.NDArray[Any],
    lengths: npt.NDArray[np.int64],
    prompts: npt.NDArray[np.int64],
    *,
    length: int,
    prefix: int,
) -> Cuts:
    """One block per document, at most ``length`` tokens long.

    A prompt that is too long loses tokens after its first ``prefix`` (the special ones), so that the response keeps its
    own; what is still too long loses its end.
    """
    excess = np.maximum(lengths - length, 0)
    from_prompt = np.minimum(excess, np.maximum(prompts - prefix, 0))
    if excess.any():
        keep = np.ones(len(tokens), np.bool_)
        ends = np.cumsum(lengths)
        for index in np.flatnonzero(excess):
            begin, end = ends[index] - lengths[index], ends[index]
            keep[begin + prefix : begin + prefix + from_prompt[index]] = False
            keep[end - (excess[index] - from_prompt[index]) : end] = False
        tokens, lengths, prompts = tokens[keep], lengths - excess, prompts - from_prompt
    flat = flatten(tokens, lengths, prompts)
    offsets = np.append(flat.starts, len(tokens))
    return Cuts(tokens, offsets, np.zeros(0, np.int64), flat.labels)


def count_labels(
    offsets: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], labels: npt.NDArray[np.bool_] | None
) -> npt.NDArray[np.int32]:
    """int32 [blocks]: tokens of each block that carry a label: all (or those in ``labels``) but the first of a segment.

    ``starts``: where a second, third, ... segment starts inside a block.
    """
    lengths = np.diff(offsets)
    if labels is None:
        segments = np.diff(np.searchsorted(starts, offsets)) + (lengths > 0)
        return np.asarray(lengths - segments, np.int32)
    mask = np.append(carries_label(offsets, starts, labels), False)
    counts = np.add.reduceat(mask, offsets[:-1], dtype=np.int64) if len(lengths) else lengths
    return np.asarray(np.where(lengths > 0, counts, 0), np.int32)


def carries_label(
    offsets: npt.NDArray[np.int64], starts: npt.NDArray[np.int64], labels: npt.NDArray[np.bool_]
) -> npt.NDArray[np.bool_]:
    """bool [tokens]: ``labels`` without the first token of each segment."""
    mask = labels.copy()
    mask[offsets[:-1][np.diff(offsets) > 0]] = False
    mask[starts] = False
    return mask


def without_unlabelled(cuts: Cuts) -> Cuts:
    """``cuts`` less the blocks in which no token carries a label: there is nothing to learn from them."""
    keep = count_labels(cuts.offsets, cuts.starts, cuts.labels) > 0
    if keep.all():
        return cuts
    lengths = np.diff(cuts.offsets)
    kept = np.repeat(keep, lengths)
    moved = np.append(0, np.cumsum(kept))
    return Cuts(
        cuts.tokens[kept],
        np.append(0, np.cumsum(lengths[keep])),
        moved[cuts.starts[kept[cuts.starts]]],
        None if cuts.labels is None else cuts.labels[kept],
    )
