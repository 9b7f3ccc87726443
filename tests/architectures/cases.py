"""One case an architecture: how to build it small, what to give to `generate`, and why not where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from architectures.shrink import shrunk

N_PROMPT = 20


def tokens(n_rows: int = 1, n: int = N_PROMPT) -> torch.Tensor:
    """A prompt of ordinary tokens, none of them special, `(n_rows, n)`."""
    return torch.randint(60, 190, (n_rows, n), generator=torch.Generator().manual_seed(7))


@dataclass(frozen=True)
class Case:
    """How one entry of a mapping is tried.

    Args:
        changes: fields over the general reduction of `shrink`, `text_config.num_hidden_layers` say; `...` drops.
        config: makes the configuration where reducing the default one is not the way.
        prepare: what has to be done to the built model (a default language, say).
        inputs: what `generate` is given besides its settings, from the model; a text prompt by default.
        impossible: why transformers itself cannot build it small or continue it in memory, in one line.
    """

    changes: Mapping[str, Any] = field(default_factory=dict)
    config: Callable[[], Any] | None = None
    prepare: Callable[[Any], None] = lambda model: None
    inputs: Callable[[Any], dict[str, Any]] = lambda model: {"input_ids": tokens()}
    impossible: str = ""


def build(case: Case, name: str, mapping: Any) -> Any:
    """The model of entry `name` of one of transformers' auto mappings, with random weights, ready to generate."""
    kind = CONFIG_MAPPING[name]
    config = case.config() if case.config is not None else shrunk(kind(), case.changes)
    classes = mapping[kind]
    torch.manual_seed(0)
    model = (classes[0] if isinstance(classes, tuple) else classes)._from_config(config).eval()
    case.prepare(model)
    return model
