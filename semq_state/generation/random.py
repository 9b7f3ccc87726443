"""torch's random state, taken and put back. `generate` draws from these global generators."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from semq_state.errors import IncompleteStateError


def dump_rng(model: Any) -> dict[str, torch.Tensor]:
    """The state of the CPU's generator and of each CUDA device that holds a part of `model`."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        state |= {f"cuda:{d.index}": torch.cuda.get_rng_state(d) for d in devices}
    return state


def restore_rng(state: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `dump_rng`. A device that is not here cannot go on with its stream; a warning says so.

    Raises:
        IncompleteStateError: a state is not one of torch's.
    """
    for name, value in state.items():
        try:
            if name == "cpu":
                torch.set_rng_state(value.cpu())
            elif torch.cuda.is_available() and int(name.partition(":")[2]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(value.cpu(), name)
            else:
                warnings.warn(
                    f"the random stream of {name} cannot go on, that device is not here: what is sampled next "
                    "will differ from the uninterrupted run",
                    stacklevel=3,
                )
        except (RuntimeError, TypeError, ValueError) as error:
            raise IncompleteStateError(
                f"random state of {name!r}",
                expected="a state of torch's generator",
                found=str(error),
                do="use another copy of the file, or pass seed=",
            ) from error


def seed_rng(seed: int) -> None:
    """Starts a new stream on every device."""
    torch.manual_seed(seed)
