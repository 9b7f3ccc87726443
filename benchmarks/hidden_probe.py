"""A linear probe on decoded hidden states: the class of the next token."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import semq_state as sq
from benchmarks.report import Row
from semq_state.codecs import Rotated, Semq, Uniform
from semq_state.snapshot import ABSENT, CacheState, GenerationState, HiddenRows

N_FREQUENT = 50
_ROUNDS, _C = 400, 0.01

CLASSES = (
    "frequent word",
    "word",
    "capitalised word",
    "rest of a word",
    "number",
    "punctuation",
    "mark of the text",
)


@dataclass(frozen=True, eq=False)
class Task:
    """States with the class of the token that follows, and those that are held out."""

    train: HiddenRows
    test: HiddenRows
    train_labels: NDArray[Any]
    test_labels: NDArray[Any]
    site: str


def classes_of(
    record: Any, tokenizer: Any, frequent: frozenset[int] | None = None
) -> tuple[Any, NDArray[Any], Any]:
    """Rows of a record that have a next token, its class, and the frequent words of this text."""
    ids, tokens = record.ids, record.token_ids
    follows = np.flatnonzero((ids[1:, 0] == ids[:-1, 0]) & (ids[1:, 1] == ids[:-1, 1] + 1))
    after = tokens[follows + 1]
    if frequent is None:
        counts = Counter(int(t) for t in after if _kind(tokenizer.convert_ids_to_tokens(int(t))) == 1)
        frequent = frozenset(t for t, _ in counts.most_common(N_FREQUENT))
    kinds = {int(t): _kind(tokenizer.convert_ids_to_tokens(int(t))) for t in np.unique(after)}
    labels = np.array([0 if int(t) in frequent else kinds[int(t)] for t in after])
    return follows, labels, frequent


def _kind(token: str) -> int:
    """Of a byte-level piece, in which a leading space is `Ġ`."""
    text = token.lstrip("Ġ")
    if text in ("@", "<", "unk", ">", "@-@", "@,@", "@.@"):
        return 6
    if text and text[0].isdigit():
        return 4
    if not any(c.isalpha() for c in text):
        return 5
    if not token.startswith("Ġ"):
        return 3
    return 2 if text[0].isupper() else 1


def methods() -> Iterator[tuple[str, Any]]:
    """Name and codec of every row, float32 first."""
    yield "raw (float32)", "raw"
    yield "exact", "exact"
    yield "bfloat16, raw", torch.bfloat16
    yield "bfloat16, exact", (torch.bfloat16, "exact")
    for bits in (2, 3, 4, 5, 6):
        yield f"semq, quant {bits} bits, scaled", Semq(parameter=2 ** (bits - 1), centred=True, scaled=True)
    for bits in (3, 4):
        yield f"semq, quant {bits} bits, SEMQ's own", Semq(parameter=2 ** (bits - 1), c=2.0, renormalised=False)
    yield "semq, quant 4 bits, centred only", Semq(centred=True)
    yield "semq, phase 16, scaled", Semq(operator="phase", centred=True, scaled=True)
    yield "semq, orbit 50, scaled", Semq(operator="orbit", centred=True, scaled=True)
    for step in (1.05, 0.55, 0.27, 0.13):
        yield f"rotated, step {step:g}", Rotated(step=step)
    yield "uniform, 4 bits, 64 of a token", Uniform(bits=4, along="token", group=64)
    yield "uniform, 8 bits, a whole token (int8)", Uniform(bits=8, along="token", group=4096, symmetric=True)
    yield "uniform, 4 bits, 64 of a channel", Uniform(bits=4, along="channel", group=64)


def rows_of(task: Task) -> Iterator[Row]:
    """Size, error and accuracy of every method."""
    whole: Any = None
    base: dict[str, Any] = {}
    for name, codec in methods():
        (train, n_train), (test, n_test) = (
            _through_file(rows, task.site, codec) for rows in (task.train, task.test)
        )
        n_bytes = (n_train + n_test) / (len(task.train) + len(task.test))
        probe = _fitted(train, task.train_labels)
        whole = whole or probe
        exact = task.test.states[task.site].float()
        found: dict[str, Any] = {
            "method": name,
            "bytes_per_token": n_bytes,
            "bits_per_value": 8 * n_bytes / exact.shape[1],
            "relative_error": _relative(exact, test),
            "cosine": float(torch.nn.functional.cosine_similarity(exact, test, dim=-1).mean()),
            "accuracy, decoded": 100 * _accuracy(probe, test, task.test_labels),
            "accuracy, float": 100 * _accuracy(whole, test, task.test_labels),
        }
        base = base or found
        off = {f"difference, {n}": found[f"accuracy, {n}"] - base[f"accuracy, {n}"] for n in ("decoded", "float")}
        yield {key: round(v, 3) if isinstance(v, float) else v for key, v in (found | off).items()}


def _through_file(rows: HiddenRows, site: str, codec: Any) -> tuple[torch.Tensor, float]:
    """The states as they come back from a file, and the bytes that they take in it; ids of rows do not count."""
    dtype, codec = codec if isinstance(codec, tuple) else (None, codec)
    dtype, codec = (codec, "raw") if isinstance(codec, torch.dtype) else (dtype, codec)
    states = rows.states[site] if dtype is None else rows.states[site].to(dtype)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "states.safetensors")
        info = sq.save(_alone(rows, site, states), path, codec=codec)
        found = sq.load(path).hidden["sequence"].states[site].float()
        header = json.loads(path.read_bytes()[8:][: int.from_bytes(path.read_bytes()[:8], "little")])
    if info.coding is not None:
        return found, info.coding.bits_per_value * states.numel() / 8
    own = [s["data_offsets"] for name, s in header.items() if name.startswith(f"hidden.sequence.states.{site}")]
    return found, float(sum(stop - start for start, stop in own))


def _alone(rows: HiddenRows, site: str, states: torch.Tensor) -> sq.Snapshot:
    """A snapshot of these rows and nothing else."""
    return sq.Snapshot(
        cache=CacheState(ABSENT),
        generation=GenerationState(
            input_ids=torch.zeros(1, 0, dtype=torch.int64),
            prompt_length=0,
            n_cached=0,
            finished=torch.zeros(1, dtype=torch.bool),
        ),
        provenance=sq.Provenance("", {}, {}, None, {}, {}, "float32"),
        hidden={"sequence": HiddenRows(rows.rows, rows.token_ids, {site: states})},
    )


def _fitted(states: torch.Tensor, labels: NDArray[Any]) -> Any:
    """A standardised logistic regression: some channels are a hundred times larger than others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=_C, max_iter=_ROUNDS))
    return probe.fit(states.numpy(), labels)


def _accuracy(probe: Any, states: torch.Tensor, labels: NDArray[Any]) -> float:
    return float(np.mean(probe.predict(states.numpy()) == labels))


def _relative(exact: torch.Tensor, decoded: torch.Tensor) -> float:
    """Median over the rows, of which a few have a norm a hundred times that of the others."""
    return float(((exact - decoded).norm(dim=-1) / exact.norm(dim=-1)).median())
