"""`sq.quantize`: a model with its weights as symbols."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn

from semq_state.errors import CalibrationError, UnsupportedModelError
from semq_state.fingerprint import fingerprint, weights_of
from semq_state.generation.seams import base_model
from semq_state.provenance import plain
from semq_state.weights import calibrating, distill
from semq_state.weights.held import QuantizedWeights
from semq_state.weights.installing import Dequantize, put_matrix
from semq_state.weights.layer import Inputs, quantized
from semq_state.weights.linear import QuantizedLinear, is_linear, is_turned
from semq_state.weights.matrix import QuantizedMatrix
from semq_state.weights.recipes import METHODS, Recipe, recipe_of

Progress = Callable[[str, int, int], None]
"""Called with what is being done, the steps of it done so far and in all."""

_EMBEDDINGS = Recipe("rtn", compensated=False)


def quantize(
    model: Any,
    method: str | Recipe = "neuqi",
    bits: int = 3,
    group: int = 128,
    calibration_text: str | Sequence[str] | None = None,
    *,
    tokenizer: Any = None,
    embedding_bits: int = 8,
    activation_bits: int = 0,
    dequantize: Dequantize = "load",
    distill_steps: int = 0,
    skip: Collection[str] = (),
    n_windows: int = 16,
    window: int = 2048,
    seed: int = 0,
    progress: Progress | None = None,
) -> Any:
    """Quantises the linear layers of a model, in place, and gives the model back.

    It runs under transformers as before. What `semq-state quantize` and capsules store stands in
    `model.semq_weights`: symbols, scales, the identity of the original weights. Layers are quantised in the order
    in which the model calls them, each from what the quantised layers before it make of the text; no more than one
    layer's activations and one Hessian are in memory beyond the model. What is no linear layer stays as it is, and
    is listed in `model.semq_weights.recipe["left"]`.

    Args:
        model: a transformers model; read in one batch of `n_windows * window` tokens.
        method: `rtn`, `gptq`, `septq`, `neuqi`, `specquant`, `semq`, or a `Recipe`.
        bits: of a weight's symbol, 2 to 8.
        group: neighbouring input channels that share a scale and zero point; 0 for all of a row. Where it does not
            divide a row, the last group has fewer.
        calibration_text: one text or several. `rtn`, `neuqi` and `semq` do without; the last two then round to the
            nearest.
        tokenizer: for the text.
        embedding_bits: of embeddings and output layer, a scale for each row; 0 leaves them as they are.
        activation_bits: round the inputs of the layers too, token by token (simulated: products are of floats).
        dequantize: weights are dequantised once (`load`), or at each call of their layer (`call`): slower, and a
            quarter of the memory.
        distill_steps: steps of training scales and zero points on the original's last hidden states.
        skip: layers to leave as they are, by name or by the last part of it.
        n_windows: pieces of the text.
        window: tokens of each.
        seed: of the order in which distillation takes the windows.
        progress: called with what is done, and how much of it.

    Returns:
        The same model.

    Raises:
        CalibrationError: the method needs a text, and there is none, no tokenizer for it, or too little of it.
        QuantizationError: a weight or an input is NaN or infinite, or a Hessian cannot be inverted, of which layer.
        UnsupportedModelError: there is no linear layer, or the model is quantised already.
        ValueError: an argument is out of range.

    Example:
        >>> sq.quantize(model, "neuqi", bits=3, calibration_text=text, tokenizer=tokenizer)  # doctest: +SKIP
    """
    _check(bits, group, embedding_bits, activation_bits, n_windows, window, dequantize)
    began, inner = time.monotonic(), base_model(model, generates=False)
    recipe = recipe_of(method, text=calibration_text is not None)
    layers, tables = _layers(inner, skip)
    ids = _ids(inner, tokenizer, calibration_text, n_windows, window)
    if ids is None and (recipe.needs_text or distill_steps):
        what = f"method {recipe.method!r}" if recipe.needs_text else "distillation"
        raise _lacking(what, "a calibration text", "none", f"give one, or take {_free()}")
    tell = progress or (lambda words, done, total: None)
    origin = fingerprint(inner, tokenizer)
    config, generation = _configs(inner)
    target = None
    if distill_steps and ids is not None:
        target = distill.targets(inner, ids, tell)
    matrices: dict[str, QuantizedMatrix] = {}

    def reached(name: str, module: nn.Module, inputs: Inputs | None) -> nn.Module:
        weight = module.get_parameter("weight")
        made = quantized(
            weight.T if is_turned(module) else weight, recipe, bits, group or 1 << 30, inputs, activation_bits
        )
        matrices[name] = made
        tell("quantise", len(matrices), len(layers))
        if activation_bits:
            return QuantizedLinear(made, module._parameters.get("bias"), activation_bits=activation_bits, hold=True)
        put_matrix(inner, name, made)
        return module

    was_training = inner.training
    inner.eval()
    try:
        if ids is not None and (recipe.needs_text or recipe.fit == "neuqi" or activation_bits):
            with calibrating.heard(layers, reached):
                calibrating.read(inner, ids)
        unreached = [name for name in layers if name not in matrices]
        for name in unreached:
            reached(name, layers[name], None)
    finally:
        inner.train(was_training)
    if target is not None and ids is not None:
        matrices, lost = distill.distilled(inner, matrices, ids, target, distill_steps, activation_bits, seed, tell)
    else:
        lost = []
    for name, table in tables.items() if embedding_bits else ():
        matrices[name] = quantized(table, _EMBEDDINGS, embedding_bits, 1 << 30, None)
    told = {
        "method": recipe.method,
        "bits": bits,
        "group": group,
        "parts": recipe.as_dict(),
        "embedding_bits": embedding_bits,
        "n_windows": 0 if ids is None else ids.shape[0],
        "window": 0 if ids is None else ids.shape[1],
        "distill_steps": distill_steps if lost else 0,
        "distill_loss": lost[:1] + lost[-1:],
        "seed": seed,
        "unreached": unreached if ids is not None else [],
    }
    held = _held(inner, plain(told), origin, config, generation, matrices, activation_bits)
    for name, matrix in held.matrices.items():
        put_matrix(inner, name, matrix, activation_bits=activation_bits, dequantize=dequantize)
    _tie(inner, held)
    inner.semq_weights = held
    tell(f"done in {time.monotonic() - began:.0f} s", 1, 1)
    return model


def _check(
    bits: int, group: int, embedding_bits: int, activation_bits: int, n_windows: int, window: int, dequantize: str
) -> None:
    for holds, words in (
        (type(bits) is int and 2 <= bits <= 8, f"`bits` must be 2 to 8, got {bits!r}"),
        (type(group) is int and group >= 0, f"`group` must be a count, 0 for a whole row, got {group!r}"),
        (embedding_bits == 0 or embedding_bits in range(2, 9),
         f"`embedding_bits` must be 0, or 2 to 8, got {embedding_bits!r}"),
        (activation_bits == 0 or activation_bits in range(2, 9),
         f"`activation_bits` must be 0, or 2 to 8, got {activation_bits!r}"),
        (n_windows > 0 and window > 1, f"`n_windows` and `window` must be counts, got {n_windows!r}, {window!r}"),
        (dequantize in ("load", "call"), f"`dequantize` must be 'load' or 'call', got {dequantize!r}"),
    ):  # fmt: skip
        if not holds:
            raise ValueError(words)


def _layers(model: Any, skip: Collection[str]) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter]]:
    """Linear layers to quantise, by name; and the tables of embeddings and output layer.

    A weight that several modules hold is in neither, unless it is the embeddings' own: it is quantised once.

    Raises:
        UnsupportedModelError: there is none, or they are symbols already.
        ValueError: `skip` names a layer that is not there.
    """
    if any(isinstance(module, QuantizedLinear) for module in model.modules()) or hasattr(model, "semq_weights"):
        raise _unsupported(model, "weights that are not quantised", "a model that `quantize` made")
    if getattr(model, "hf_quantizer", None) is not None:
        raise _unsupported(model, "weights that are not quantised", "a model quantised by another library")
    output = getattr(model, "get_output_embeddings", lambda: None)()
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    known: set[str] = set()
    layers, tables = {}, {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        parameter = module._parameters.get("weight")
        if parameter is None or not parameter.is_floating_point():
            continue
        skipped = {name, name.rpartition(".")[2]} & set(skip)
        known |= skipped
        if skipped:
            continue
        if (type(module) is nn.Embedding or module is output) and parameter.ndim == 2:
            if id(parameter) not in seen:
                tables[name] = parameter
            seen.add(id(parameter))
        elif is_linear(module) and holders[id(parameter)] == 1 and min(parameter.shape) > 1:
            layers[name] = module
    if unknown := sorted(set(skip) - known):
        raise ValueError(f"`skip` names layers that the model does not have: {', '.join(unknown)}")
    if not layers:
        raise _unsupported(model, "linear layers", "none")
    return layers, tables


def _ids(
    model: Any, tokenizer: Any, text: str | Sequence[str] | None, n_windows: int, window: int
) -> torch.Tensor | None:
    if text is None:
        return None
    if tokenizer is None:
        raise _lacking("calibration text", "a tokenizer to read it", "none", "pass tokenizer=…")
    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    length = min(window, most) if isinstance(most, int) and most > 1 else window
    return calibrating.windows(tokenizer, text, n_windows, length)


def _configs(model: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Configurations as transformers writes them, without the places that a model was read from."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "quantization_config")}
    generation = getattr(model, "generation_config", None)
    return plain(config), {} if generation is None else plain(generation.to_dict())


def _held(
    model: Any,
    told: dict[str, Any],
    origin: Any,
    config: dict[str, Any],
    generation: dict[str, Any],
    matrices: dict[str, QuantizedMatrix],
    activation_bits: int,
) -> QuantizedWeights:
    # Buffers that a model computes when it is made may have been changed since, rounded by `model.to` say.
    buffers = dict(model.named_buffers())
    computed = {name: tensor for name, tensor in weights_of(model) if name in buffers}
    named = {**computed, **model.state_dict(keep_vars=True)}
    weights = {f"{name}.weight" for name in matrices}
    first: dict[int, str] = {}
    # A name under which a matrix goes comes first, so that what shares its tensor is tied to it.
    for name in sorted(named, key=lambda name: (name not in weights, name)):
        first.setdefault(id(named[name]), name)
    tied = {name: first[id(t)] for name, t in named.items() if first[id(t)] != name}
    rest = {name: t.detach().cpu() for name, t in named.items() if name not in weights and name not in tied}
    left = sorted((name for name, t in rest.items() if t.ndim > 1), key=lambda name: -rest[name].numel())
    told |= {"left": left, "n_left": sum(t.numel() for name, t in rest.items() if name not in buffers)}
    return QuantizedWeights(told, origin, config, generation, matrices, rest, tied, activation_bits)


def _tie(model: Any, held: QuantizedWeights) -> None:
    for name, of in held.tied.items():
        (path, _, last), (owner, _, source) = name.rpartition("."), of.rpartition(".")
        model.get_submodule(path)._parameters[last] = model.get_submodule(owner)._parameters[source]


def _free() -> str:
    return " or ".join(repr(name) for name in METHODS if not recipe_of(name, text=False).needs_text)


def _lacking(where: str, expected: str, found: str, do: str) -> CalibrationError:
    return CalibrationError(where, expected=expected, found=found, do=do)


def _unsupported(model: Any, expected: str, found: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__}", expected=expected, found=found, do="load a model with plain weights"
    )
