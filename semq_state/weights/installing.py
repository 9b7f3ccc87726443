"""Quantised weights put into a model."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from semq_state.errors import FormatError, ModelMismatchError
from semq_state.weights.held import QuantizedWeights
from semq_state.weights.linear import QuantizedLinear, is_linear, is_turned
from semq_state.weights.matrix import QuantizedMatrix

Dequantize = Literal["load", "call"]
"""When weights are dequantised: once, or at each call of their layer, which takes a quarter of the memory."""


def install(model: Any, held: QuantizedWeights, *, dequantize: Dequantize = "load") -> None:
    """Gives a model of the same configuration these weights.

    Embeddings and the output layer are dequantised once either way.

    Args:
        model: the model, with any weights or none.
        held: what it gets.
        dequantize: see `Dequantize`.

    Raises:
        FormatError: a tensor has no place in the model, or another shape than its place.
        ModelMismatchError: a parameter of the model is not among them.
    """
    if dequantize not in ("load", "call"):
        raise ValueError(f"`dequantize` must be 'load' or 'call', got {dequantize!r}")
    named = dict(model.state_dict(keep_vars=True))
    given = {*held.plain, *(f"{name}.weight" for name in held.matrices), *held.tied}
    if missing := sorted(set(named) - given):
        raise _lacking(missing)
    for name, tensor in held.plain.items():
        put(model, name, tensor)
    for name, matrix in held.matrices.items():
        put_matrix(model, name, matrix, activation_bits=held.activation_bits, dequantize=dequantize)
    for name, of in held.tied.items():
        owner, _, last = of.rpartition(".")
        put(model, name, getattr(model.get_submodule(owner), last))
    model.semq_weights = held
    model.eval()


def put(model: Any, name: str, tensor: torch.Tensor) -> None:
    """Makes `tensor` the parameter or buffer of that name.

    Raises:
        FormatError: there is none, or of another shape.
    """
    path, _, last = name.rpartition(".")
    owner = _module(model, path, name)
    old: torch.Tensor | None = owner._parameters.get(last)
    old = owner._buffers.get(last) if old is None else old
    if old is None or old.shape != tensor.shape:
        raise _misplaced(name, "none" if old is None else f"one of {tuple(old.shape)}", tuple(tensor.shape))
    tensor = tensor if old.device.type == "meta" else tensor.to(old.device)
    if last in owner._parameters:
        kept = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
        owner._parameters[last] = kept
    else:
        owner._buffers[last] = tensor


def put_matrix(
    model: Any, name: str, matrix: QuantizedMatrix, *, activation_bits: int = 0, dequantize: Dequantize = "load"
) -> None:
    """Gives the module of that name a quantised weight, in place or as a module of its own.

    Raises:
        FormatError: there is no such module, or its weight has another shape.
    """
    module = _module(model, name, name)
    if not is_linear(module) or _is_output(model, module) or (dequantize == "load" and not activation_bits):
        made = matrix.weight()
        put(model, f"{name}.weight", made.T.contiguous() if is_turned(module) else made)
        return
    weight = module._parameters["weight"]
    shape = () if weight is None else tuple(weight.T.shape if is_turned(module) else weight.shape)
    if shape != (matrix.rows, matrix.cols):
        raise _misplaced(f"{name}.weight", f"one of {shape}", (matrix.rows, matrix.cols))
    path, _, last = name.rpartition(".")
    standing = QuantizedLinear(
        matrix,
        module._parameters.get("bias"),
        turned=is_turned(module),
        activation_bits=activation_bits,
        hold=dequantize == "load",
    )
    standing.to(next(iter(_devices(weight)), "cpu"))
    setattr(model.get_submodule(path), last, standing.eval())


def _devices(weight: torch.Tensor | None) -> list[torch.device]:
    return [] if weight is None or weight.device.type == "meta" else [weight.device]


def _is_output(model: Any, module: nn.Module) -> bool:
    found = getattr(model, "get_output_embeddings", lambda: None)()
    return found is module


def _module(model: Any, path: str, name: str) -> nn.Module:
    try:
        found: nn.Module = model.get_submodule(path)
    except AttributeError as error:
        raise _misplaced(name, "no such module", "a tensor for it") from error
    return found


def _misplaced(name: str, expected: str, found: object) -> FormatError:
    return FormatError(
        f"weight {name:.120}",
        expected=f"a place for it in the model; it has {expected}",
        found=f"{found!r:.80}",
        do="these weights are of another model; use the configuration that they came with",
    )


def _lacking(missing: list[str]) -> ModelMismatchError:
    from semq_state.errors import Difference

    shown = ", ".join(missing[:4])
    return ModelMismatchError(
        [Difference("weights", f"every parameter of the model, {shown} among them", f"{len(missing)} fewer")],
        do="use the configuration that these weights came with",
    )
