"""From a choice of layers and modules to the places in a model where something is heard."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from semq_state.errors import UnsupportedModelError, UnsupportedOperationError
from semq_state.hidden.spec import HiddenStates
from semq_state.hidden.stacks import Stack, stacks_of
from semq_state.snapshot import ENCODER, SEQUENCE

_N_NEAREST = 5


@dataclass(frozen=True, eq=False)
class Site:
    """A place where hidden states are heard.

    Args:
        name: `hidden_states.12`, or the module's path.
        stream: the stream of tokens that it belongs to.
        module: the module.
        reads: whether its `input` or its `output` is meant.
    """

    name: str
    stream: str
    module: torch.nn.Module
    reads: str


@dataclass(frozen=True, eq=False)
class Streams:
    """The streams of a model and the modules whose calls are passes over them.

    Args:
        roots: stream to the modules through which tokens enter, outermost first.
        paths: stream to the path of its blocks; only of streams whose blocks are known.
    """

    roots: dict[str, tuple[torch.nn.Module, ...]]
    paths: dict[str, str]


def sites_of(model: Any, spec: HiddenStates) -> list[Site]:
    """The places that a choice means in a model; none twice.

    Raises:
        UnsupportedOperationError: a layer or module is not there; the message has the nearest names.
        UnsupportedModelError: the model's layers cannot be found.
    """
    found: dict[str, Site] = {}
    encoder = _encoder(model)
    if spec.layers is not None:
        for stack in stacks_of(model):
            for site in _of_stack(stack, spec.layers):
                found[f"{site.stream}.{site.name}"] = site
    modules = dict(model.named_modules())
    inside = {id(module) for module in encoder.modules()} if encoder is not None else set()
    for pattern in spec.modules or ():
        paths = [path for path in modules if path and _matches(path, pattern)]
        if not paths:
            raise UnsupportedOperationError(
                f"HiddenStates, modules={pattern!r:.120}",
                expected=f"the path of a module of {type(model).__name__}",
                found="none that matches",
                do=f"the nearest are {', '.join(_nearest(pattern, list(modules)))}",
            )
        for path in paths:
            stream = ENCODER if id(modules[path]) in inside else SEQUENCE
            found[f"{stream}.{path}"] = Site(path, stream, modules[path], "output")
    return list(found.values())


def streams_of(model: Any, generators: Sequence[torch.nn.Module] = ()) -> Streams:
    """The streams of a model.

    Args:
        model: the whole model.
        generators: those of its modules that run a generation loop.
    """
    encoder = _encoder(model)
    owners: dict[str, list[torch.nn.Module]] = {SEQUENCE: [], ENCODER: []}
    paths: dict[str, str] = {}
    try:
        stacks = stacks_of(model)
    except UnsupportedModelError:
        stacks = ()
    for stack in stacks:
        name = ENCODER if stack.name == "encoder" else SEQUENCE
        paths[name] = stack.path
        owners[name] += [stack.root, _parent(model, stack.path)]
    if encoder is None:
        owners[SEQUENCE] = [model, *generators, *owners[SEQUENCE]]
    else:
        owners[ENCODER].append(encoder)
        owners[SEQUENCE] = [m for m in owners[SEQUENCE] if m is not model] or [model.get_decoder()]
    roots = {name: tuple({id(m): m for m in found}.values()) for name, found in owners.items() if found}
    return Streams(roots, paths)


def _of_stack(stack: Stack, layers: int | Sequence[int] | str) -> Iterator[Site]:
    n = len(stack.blocks)
    stream = ENCODER if stack.name == "encoder" else SEQUENCE
    wanted: Sequence[int] = range(n + 1)
    if not isinstance(layers, str):
        wanted = (layers,) if isinstance(layers, int) else layers
    for number in wanted:
        if not -(n + 1) <= number <= n:
            raise UnsupportedOperationError(
                f"HiddenStates, layers={number}",
                expected=f"a number of 0 to {n}, or of -1 to {-n - 1} from the end",
                found=str(number),
                do=f"this model has {n} blocks, and so {n + 1} hidden states",
            )
        i = number % (n + 1)
        module, reads = (stack.blocks[i], "input") if i < n else (stack.last, "output")
        yield Site(f"hidden_states.{i}", stream, module, reads)


def _encoder(model: Any) -> Any:
    """The encoder beside a decoder; None where there is no such pair."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return None
    return model.get_encoder()


def _parent(model: torch.nn.Module, path: str) -> torch.nn.Module:
    return model.get_submodule(path.rpartition(".")[0])


def _matches(path: str, pattern: str) -> bool:
    return _parts_match(path.split("."), pattern.split("."))


def _parts_match(path: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not path
    if pattern[0] == "**":
        return any(_parts_match(path[i:], pattern[1:]) for i in range(len(path) + 1))
    return bool(path) and fnmatch.fnmatchcase(path[0], pattern[0]) and _parts_match(path[1:], pattern[1:])


def _nearest(pattern: str, paths: list[str]) -> list[str]:
    """The paths most like a pattern, numbers of layers aside."""
    general: dict[str, str] = {}
    for path in paths:
        general.setdefault(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", path), path)
    general.pop("", None)
    asked = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", pattern)
    found = difflib.get_close_matches(asked, list(general), n=_N_NEAREST, cutoff=0.0)
    return found or list(general)[:_N_NEAREST]
