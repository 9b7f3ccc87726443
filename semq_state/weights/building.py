"""A model from quantised weights alone: no network, no class but transformers' own, no memory beyond the file's."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from semq_state.container import shown
from semq_state.errors import FormatError
from semq_state.stores import atomic_write
from semq_state.weights.configuration import config_of, generation_config_of
from semq_state.weights.file import load_weights, save_weights
from semq_state.weights.held import QuantizedWeights
from semq_state.weights.info import WeightsInfo
from semq_state.weights.installing import Dequantize, install

WEIGHTS_FILE = "weights.semq.safetensors"
"""The file of a quantised folder that holds its weights."""

_ATTENTION = ("sdpa", "eager")
_SPARE = 64 << 20  # bytes of tables beyond the weights: rotary embeddings, masks of old models
_FLAT = 1024  # parameters beyond those of the file: tied ones

_Registered = Callable[[nn.Module, str, nn.Parameter | None], nn.Parameter | None]


def build(held: QuantizedWeights, *, dequantize: Dequantize = "load", where: str = "quantised weights") -> Any:
    """The model that these weights belong to.

    Args:
        held: the weights, from a file or of another model.
        dequantize: once, or at each call of a layer.
        where: the file's name, for messages.

    Returns:
        The model on the CPU, in eval mode, its tokenizer not known.

    Raises:
        FormatError: configuration and tensors are not of one model that transformers knows.
        ModelMismatchError: a tensor of the model is not among them.
    """
    n_tensors = len(held.plain) + len(held.matrices) + len(held.tied)
    # Once without memory, to hold every shape against the file; then again for the tables that a model computes
    # when it is made, with room for parameters asked for and given back unused.
    with torch.device("meta"), _registering(_counted(n_tensors + _FLAT, where)):
        found = _made(held, where)
    _check_shapes(held, found, where)
    with _registering(_without_memory):
        model = _made(held, where)
    model.generation_config = generation_config_of(held.generation_config, where)
    install(model, held, dequantize=dequantize)
    return model


def open_weights(path: str | os.PathLike[str], *, dequantize: Dequantize = "load") -> Any:
    """The model of a weights file, or of the folder that `semq-state quantize` wrote.

    Raises:
        StoreError: there is none.
        FormatError, IntegrityError, ModelMismatchError: it is damaged, or not of one model.
    """
    path = Path(path)
    file = path / WEIGHTS_FILE if path.is_dir() else path
    return build(load_weights(file), dequantize=dequantize, where=str(file))


def save_folder(
    held: QuantizedWeights,
    folder: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    progress: Callable[[int, int], None] | None = None,
) -> WeightsInfo:
    """Writes a folder that `open_weights` and `semq-state run` take.

    Beside the weights stand `config.json`, `generation_config.json` and the tokenizer's files, for people and for
    `AutoTokenizer`; the model is made from what is in the weights file.

    Raises:
        StoreError: the folder or disk refused.
    """
    folder = Path(folder)
    with contextlib.suppress(OSError):  # atomic_write names what is wrong with it
        folder.mkdir(parents=True, exist_ok=True)
    info = save_weights(held, folder / WEIGHTS_FILE, progress=progress)
    for name, told in (("config", held.config), ("generation_config", held.generation_config)):
        with atomic_write(folder / f"{name}.json") as file:
            file.write(json.dumps(told, indent=2, sort_keys=True).encode())
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return info


def _made(held: QuantizedWeights, where: str) -> Any:
    """An object of the model, from its configuration."""
    from semq_state.weights.architectures import auto_class

    config = config_of(held.config, where)
    attention = {"attn_implementation": held.origin.attention} if held.origin.attention in _ATTENTION else {}
    state = torch.get_rng_state()
    try:
        return auto_class(config).from_config(config, trust_remote_code=False, **attention)
    except FormatError:
        raise
    except Exception as error:  # what a class of transformers makes of any values at all
        raise FormatError(
            f"{where}, config",
            expected="a configuration that a model can be made from",
            found=f"{type(error).__name__}: {error!s:.200}",
            do="use another copy of the file, or update transformers",
        ) from error
    finally:
        torch.set_rng_state(state)


@contextlib.contextmanager
def _registering(registered: _Registered) -> Iterator[None]:
    """Asks `registered` about every parameter that a module of this thread gets."""
    own = threading.get_ident()

    def of_this_thread(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        return registered(module, name, parameter) if threading.get_ident() == own else None

    handle = register_module_parameter_registration_hook(of_this_thread)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _counted(most: int, where: str) -> _Registered:
    """Refuses a model of more parameters than the file can fill, while it is made."""
    n = 0

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal n
        n += parameter is not None
        if n > most:
            raise FormatError(
                f"{where}, config",
                expected=f"a model of at most {most} tensors",
                found="a larger one",
                do="no writer makes such a file; do not trust it",
            )

    return registered


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or parameter.device.type == "meta":
        return None
    return nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)


def _check_shapes(held: QuantizedWeights, model: Any, where: str) -> None:
    """Proves that no tensor of the model is larger than the file's, and that tables beside them are small."""
    sizes = {name: tensor.numel() for name, tensor in held.plain.items()}
    sizes |= {f"{name}.weight": matrix.rows * matrix.cols for name, matrix in held.matrices.items()}
    sizes |= {name: sizes[of] for name, of in held.tied.items()}
    saved = model.state_dict(keep_vars=True)
    # A table that a model computes may be given as well: of another precision, say.
    places = {**dict(model.named_buffers()), **saved}
    wrong = sorted(n for n in {*saved, *sizes} if n not in places or sizes.get(n) != places[n].numel())
    if wrong:
        raise FormatError(
            f"{where}, config",
            expected="the model whose tensors these are",
            found=f"another one: {shown(wrong)}",
            do="the file was put together wrongly; use another copy",
        )
    tables = sum(t.nbytes for name, t in model.named_buffers() if name not in saved)
    if tables > _SPARE + 4 * sum(sizes.values()):
        raise FormatError(
            f"{where}, config",
            expected=f"tables of at most {_SPARE + 4 * sum(sizes.values())} bytes beside the weights",
            found=str(tables),
            do="no writer makes such a file; do not trust it",
        )
