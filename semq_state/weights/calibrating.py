"""A calibration text read by a model whose layers are quantised as they are first reached.

All windows are read as one batch. When a linear layer is first called, it is quantised from what it was just given,
and computes with its new weights; so does the next. One pass does it all, every layer sees what quantised layers
before it make, and no more is in memory than the activations of the layer that computes and one Hessian. No list of
blocks is needed: the order is the model's own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from semq_state.weights.layer import Inputs

Reached = Callable[[str, nn.Module, Inputs], nn.Module]
"""Called with a layer's name, the layer, and its inputs; gives the layer that computes from now on."""


def windows(tokenizer: Any, text: Any, n: int, length: int) -> torch.Tensor:
    """Token ids `(n, length)` of windows evenly spread over a text.

    Raises:
        CalibrationError: the text has fewer than `n * length` tokens.
    """
    from semq_state.measuring.contexts import pieces

    return torch.cat(pieces(tokenizer, [text] if isinstance(text, str) else list(text), n, length))


def read(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The last hidden states of all windows, `(n, length, hidden)`; logits where no part of the model has them."""
    inner = getattr(model, "base_model", model)
    given = {"input_ids": ids.to(model.device)}
    if model.config.is_encoder_decoder:
        given["decoder_input_ids"] = given["input_ids"]
    out = inner(**given, **_without_cache(model))
    found: torch.Tensor = out.last_hidden_state if hasattr(out, "last_hidden_state") else out.logits
    return found


def _without_cache(model: Any) -> dict[str, Any]:
    return {"use_cache": False} if hasattr(model.config.get_text_config(decoder=True), "use_cache") else {}


@contextlib.contextmanager
def heard(layers: Mapping[str, nn.Module], reached: Reached) -> Iterator[None]:
    """Calls `reached` when a layer is called for the first time.

    Layers that share their inputs, queries, keys and values say, share one `Inputs`, and so one Hessian.

    Args:
        layers: by name.
        reached: what is done with each.
    """
    standing: dict[str, nn.Module] = {}
    last: list[tuple[torch.Tensor, Inputs]] = []

    def call(name: str, module: nn.Module, given: torch.Tensor) -> Any:
        if name not in standing:
            if not last or last[0][0] is not given:
                last[:] = [(given, Inputs(given.detach().flatten(0, -2), name))]
            standing[name] = reached(name, module, last[0][1])
        now = standing[name]
        return type(module).forward(module, given) if now is module else now(given)

    for name, module in layers.items():
        module.forward = partial(call, name, module)
    try:
        with torch.no_grad():
            yield
    finally:
        for module in layers.values():
            module.__dict__.pop("forward", None)
