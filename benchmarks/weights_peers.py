"""Weight quantisers of other packages as peers: auto-round, here on the CPU.

auto-round pads a layer's last group when its columns do not divide: `bits_per_weight` counts it whole, as it would
be stored. What it would write itself: packed integers, scales in float16, zero points of as many bits as weights.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import logging
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from semq_state.weights.calibrating import windows

PIP_LINE = "pip install auto-round==0.16.1"
SCALE_BITS = 16


def bits_per_weight(bits: int, group: int, sym: bool = False, cols: int | None = None) -> float:
    """Bits that are stored for each weight of a layer, with its scales and (unless `sym`) zero points.

    Args:
        bits: of a weight and of a zero point.
        group: weights that share a scale; 0 for a row of `cols`.
        sym: without zero points.
        cols: of the layer; without them every group is taken to be whole.

    Raises:
        ValueError: `group` is 0 and `cols` is not given.
    """
    if group == 0 and cols is None:
        raise ValueError("a scale for each row: `cols` must be given")
    beside = SCALE_BITS + (0 if sym else bits)
    if cols is None:
        return bits + beside / group
    return bits + beside * -(-cols // (group or cols)) / cols


def mean_bits_per_weight(model: Any, bits: int, group: int, sym: bool = False) -> float:
    """`bits_per_weight` over all weights that `run` quantises."""
    sizes = [(layer.weight.numel(), layer.in_features) for _, layer in linears(model)]
    stored = sum(n * bits_per_weight(bits, group, sym, cols) for n, cols in sizes)
    return stored / sum(n for n, _ in sizes)


def linears(model: Any) -> list[tuple[str, nn.Linear]]:
    """The linear layers by name, without the output head."""
    head = model.get_output_embeddings()
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]


def run(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    bits: int,
    group: int,
    iters: int,
    n_windows: int,
    window: int,
    neuqi: bool = False,
) -> Any:
    """The model with its linear weights, but the head's, rounded by auto-round in place, in bfloat16 on the CPU.

    Weights only, asymmetric. It calibrates on the windows that our own methods read.

    Args:
        model: a transformers model.
        tokenizer: its tokenizer.
        text: to calibrate on.
        bits: of a weight.
        group: weights that share a scale and a zero point; 0 for a whole row.
        iters: steps of signed gradients for each block (auto-round's own default is 200). 0: to the nearest; in
            version 0.16 that is the plain grid from minimum to maximum, without the text, unless `neuqi` is set.
        n_windows: pieces of the text.
        window: tokens of each.
        neuqi: auto-round's own NeUQI, a search of scale and zero point weighted by the inputs' squares; with
            `iters` only rounding is then tuned, from a search without those weights.

    Raises:
        ImportError: auto-round is not installed.
    """
    model.to(device="cpu", dtype=torch.bfloat16).eval()
    ids = windows(tokenizer, text, n_windows, window)
    # It leaves hooks, attributes and a wrapped forward behind, so it works on a copy.
    worked = copy.deepcopy(model)
    with _alone():
        given = importlib.import_module("auto_round").AutoRound(
            worked,
            tokenizer,
            scheme="W4A16",
            alg_configs=_algorithm(bits, group, iters, neuqi),
            dataset=[row[None] for row in ids],
            seqlen=window,
            nsamples=n_windows,
            batch_size=min(8, n_windows),
            device_map="cpu",
            enable_torch_compile=False,
            quant_lm_head=False,
            disable_model_free=True,
        )
        rounded, _ = given.quantize()
    found = dict(linears(rounded))
    with torch.no_grad():
        for name, layer in linears(model):
            layer.weight.copy_(found[name].weight)
    return model


def _algorithm(bits: int, group: int, iters: int, neuqi: bool) -> Any:
    # Its `AutoRound(bits=..., iters=...)` does the same, with a warning for each.
    scheme = {"bits": bits, "group_size": group or -1, "sym": False, "data_type": "int", "act_bits": 16}
    where = "auto_round.algorithms.quantization"
    if iters:
        made = importlib.import_module(f"{where}.sign_round.config").SignRoundConfig
        return made(iters=iters, enable_neuqi=neuqi, **scheme)
    made = importlib.import_module(f"{where}.rtn.config").RTNConfig
    return made(disable_opt_rtn=False, enable_neuqi=neuqi, **scheme)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """auto-round without a word, a hub or a file left; random states, too, are as before."""
    hub: Any = importlib.import_module("huggingface_hub.constants")
    before, offline = dict(os.environ), hub.HF_HUB_OFFLINE
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        torch.random.fork_rng(devices=[]),
    ):
        os.environ.update(HF_HUB_OFFLINE="1", AR_WORK_SPACE=folder, AR_LOG_LEVEL="ERROR")
        hub.HF_HUB_OFFLINE = True
        try:
            importlib.import_module("auto_round")
        except ImportError as error:
            raise ImportError(f"auto-round is not installed: {PIP_LINE}") from error
        log = logging.getLogger("autoround")
        level = log.level
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)
            hub.HF_HUB_OFFLINE = offline
            os.environ.clear()
            os.environ.update(before)
