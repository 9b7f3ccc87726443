"""A model that is tried out, and left as it was: attributes, buffers, modes and random state."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch

_BUFFER_VALUES = 1 << 20  # of a buffer whose values are put back


@contextlib.contextmanager
def undisturbed(model: Any) -> Iterator[None]:
    """Runs without gradients or dropout; modules and the random state are as before afterwards."""
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        put_back(list(model.modules())),
        torch.no_grad(),
        torch.random.fork_rng(devices=devices),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        model.eval()
        yield


@contextlib.contextmanager
def put_back(modules: list[Any]) -> Iterator[None]:
    """Gives these modules their attributes and buffers, and small buffers their values, again."""
    held = [(m, dict(vars(m)), dict(m._buffers), _copies(m)) for m in modules]
    try:
        yield
    finally:
        for module, attributes, buffers, copies in held:
            for name in vars(module).keys() - attributes.keys():
                del vars(module)[name]
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, copy in copies.items():
                if not torch.equal(buffers[name], copy):
                    buffers[name].copy_(copy)


def _copies(module: Any) -> dict[str, torch.Tensor]:
    """What a forward pass may overwrite in place: small floating buffers."""
    return {
        name: buffer.detach().clone()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and buffer.numel() <= _BUFFER_VALUES
    }
