"""SpecQuant's premise on a real model: how much of the energy lies in the lowest frequencies."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from semq_state.cli.models import load_model
from semq_state.quantizers import spectrum

SHARE = 0.2
KEPT = 16
N_TOKENS = 1024


def measured(model: Any, tokenizer: Any, text: str) -> list[dict[str, Any]]:
    """Of each kind of tensor, rows along which the frequencies run, and their energy."""
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][:, :N_TOKENS]
    rows = [_row("normal numbers", [torch.randn(4096, 576, generator=torch.Generator().manual_seed(0))])]
    kinds: dict[str, list[torch.Tensor]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head"):
            kinds.setdefault(name.rpartition(".")[2], []).append(module.weight.detach().float())
    rows += [_row(f"{kind}, rows along the inputs", found) for kind, found in kinds.items()]
    rows += [_row(kind, found) for kind, found in _states(model, ids)]
    return rows


@torch.inference_mode()
def _states(model: Any, ids: torch.Tensor) -> Iterator[tuple[str, list[torch.Tensor]]]:
    out = model.model(ids, use_cache=True, output_hidden_states=True)
    pairs = [(layer.keys[0].float(), layer.values[0].float()) for layer in out.past_key_values.layers]
    # The first tokens are sinks, which stay exact wherever states are coded.
    for name, series in (
        ("keys, channels along the tokens", [keys.transpose(1, 2).flatten(0, 1) for keys, _ in pairs]),
        ("values, channels along the tokens", [values.transpose(1, 2).flatten(0, 1) for _, values in pairs]),
        ("hidden states, channels along the tokens", [h[0].float().T for h in out.hidden_states[1:]]),
        ("hidden states, tokens along the channels", [h[0, 4:].float() for h in out.hidden_states[1:]]),
    ):
        yield name, [rows[:, 4:].contiguous() if "along the tokens" in name else rows for rows in series]


def _row(kind: str, found: list[torch.Tensor]) -> dict[str, Any]:
    """Shares of the energy in percent: mean over all rows, and without the mean of each row."""
    low, spread, first, few, peaks = [], [], [], [], []
    for rows in found:
        energy = spectrum.energy(rows).double()
        total = energy.sum(1).clamp(min=1e-30)
        n = round(SHARE * energy.shape[1])
        low.append(energy[:, :n].sum(1) / total)
        first.append(energy[:, 0] / total)
        few.append(energy[:, :KEPT].sum(1) / total)
        without = (total - energy[:, 0]).clamp(min=1e-30)
        spread.append(energy[:, 1:n].sum(1) / without)
        kept = spectrum.branch(rows, torch.full((len(rows),), KEPT)).values(rows.shape[1])
        peaks.append((rows - kept).abs().amax(1) / rows.abs().amax(1).clamp(min=1e-30))
    joined = [torch.cat([part.double() for part in parts]) * 100 for parts in (low, spread, first, few, peaks)]
    names = (
        f"lowest {SHARE:.0%} of frequencies", "the same without the mean", "the mean alone",
        f"lowest {KEPT}", f"largest magnitude left by {KEPT}",
    )  # fmt: skip
    told = {name: float(part.mean()) for name, part in zip(names, joined, strict=True)}
    return {"tensor": kind, "length": int(found[0].shape[1]), **told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, dtype="float32")
    print(json.dumps(measured(model, tokenizer, given.text.read_text())))


if __name__ == "__main__":
    main()
