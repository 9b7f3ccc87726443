"""Tensors that a model's modules keep of a run as attributes, outside any cache: `rope_deltas` and its like."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from semq_state.errors import IncompleteStateError

_KEPT_ALWAYS = ("rope_deltas",)
"""Known to be read by every later step, whether or not this run has set them."""


class AttributeWatch:
    """Finds the attributes that a run sets, and tells their present values.

    Args:
        model: the model whose modules are watched, from now on.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._before = {(id(module), name): value for _, module, name, value in _tensors(model)}
        self._found: dict[str, tuple[Any, str]] = {}
        self._n_searches = 2

    def begin(self) -> None:
        """A new run begins."""
        self._n_searches = 2

    def values(self) -> dict[str, torch.Tensor]:
        """Path to present value. Modules replace these tensors, so holding them is remembering them."""
        # All modules are searched after the prefill and after the first step only: what a run sets, it sets there.
        if self._n_searches:
            self._n_searches -= 1
            for path, module, name, value in _tensors(self._model):
                if name in _KEPT_ALWAYS or self._before.get((id(module), name)) is not value:
                    self._found[path] = module, name
        values = {path: vars(module).get(name) for path, (module, name) in self._found.items()}
        return {path: value for path, value in values.items() if isinstance(value, torch.Tensor)}


@contextlib.contextmanager
def attributes_set(model: Any, attributes: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Gives modules these attributes for the length of the `with`.

    Raises:
        IncompleteStateError: a module has no such attribute, so this is not state that it knows.
    """
    before: list[tuple[Any, str, Any]] = []
    for path, tensor in attributes.items():
        where, _, name = path.rpartition(".")
        module = _module(model, where)
        # Only a plain attribute that is there: a file must not reach parameters, buffers or methods.
        if module is None or not isinstance(vars(module).get(name, _MISSING), (torch.Tensor, type(None))):
            raise IncompleteStateError(
                f"attribute {path!r}",
                expected="a module that keeps such a tensor",
                found="none",
                do="the file was put together wrongly; take the snapshot again",
            )
        before.append((module, name, tensor.to(model.device)))
    held = [(module, name, vars(module)[name]) for module, name, _ in before]
    try:
        for module, name, tensor in before:
            setattr(module, name, tensor)
        yield
    finally:
        for module, name, value in held:
            setattr(module, name, value)


@contextlib.contextmanager
def attributes_put_back(model: Any) -> Iterator[None]:
    """Gives every attribute that a run sets within the `with` its old value again."""
    held = {(path, name): (module, value) for path, module, name, value in _tensors(model)}
    try:
        yield
    finally:
        for path, module, name, _ in list(_tensors(model)):
            _, value = held.get((path, name), (module, None))
            setattr(module, name, value)


_MISSING = object()


def _tensors(model: Any) -> Iterator[tuple[str, Any, str, torch.Tensor]]:
    """Every tensor that is a plain attribute of a module; parameters and buffers are none."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}" if path else name, module, name, value


def _module(model: Any, path: str) -> Any:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None
