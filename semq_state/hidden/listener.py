"""Hears a model's hidden states while it runs: references only, nothing is copied in a hook."""

from __future__ import annotations

import contextlib
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from semq_state.errors import IncompleteStateError, SemqStateError
from semq_state.hidden.sites import Site, Streams
from semq_state.hidden.stacks import input_of, output_of


class HeardAllError(Exception):
    """Ends a forward pass of which nothing more is wanted. Never seen by callers."""


@dataclass(eq=False)
class Pass:
    """One forward pass over one stream of tokens.

    Args:
        stream: which.
        input_ids: its tokens, `(batch, seq)`, where it was given ids.
        mask: 0 at padding, `(batch, seq or more)`; None where it was given none.
        shape: `(batch, seq)`, where its inputs tell.
        hides_padding: whether it was given a mask from which padding cannot be told.
        states: by the name of the site, as they came.
    """

    stream: str
    input_ids: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    shape: tuple[int, int] | None = None
    hides_padding: bool = False
    states: dict[str, torch.Tensor] = field(default_factory=dict)
    versions: dict[str, int] = field(default_factory=dict)

    def settled(self) -> dict[str, torch.Tensor]:
        """The states as `(batch, seq, dim)`.

        Raises:
            IncompleteStateError: they are not of one shape, or were written to since they were heard.
        """
        found: dict[str, torch.Tensor] = {}
        for name, tensor in self.states.items():
            if _version(tensor) != self.versions[name]:
                raise IncompleteStateError(
                    name,
                    expected="states that the model leaves as they are",
                    found="ones that it wrote over later in the same step",
                    do="name another module",
                )
            found[name] = self._aligned(name, tensor)
            self.shape = self.shape or (found[name].shape[0], found[name].shape[1])
        return found

    def _aligned(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        shape = self.shape or tuple(tensor.shape[:2])
        if tensor.ndim > 2 and tuple(tensor.shape[:2]) == shape:
            return tensor.flatten(2) if tensor.ndim > 3 else tensor
        if tensor.ndim == 2 and tensor.shape[0] == shape[0] * shape[1]:  # experts take tokens without rows
            return tensor.reshape(*shape, -1)
        raise IncompleteStateError(
            name,
            expected=f"states of the tokens that were read, {(*shape, 'dim')}".replace("'", ""),
            found=str(tuple(tensor.shape)),
            do="name a module that gives one vector for each token of the sequence",
        )


class Listener:
    """Hears chosen sites of a model.

    Args:
        sites: where.
        streams: the streams of tokens and the modules whose calls are passes over them.
        whole: the whole model, whose call may hold several passes.
        on_call: called when an outermost call begins (True) and when it has ended well (False).

    Attributes:
        stops: whether a pass is ended by `HeardAllError` once every site of its stream was heard.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        streams: Streams,
        whole: torch.nn.Module,
        on_call: Callable[[bool], None] = lambda begins: None,
    ) -> None:
        self.passes: list[Pass] = []
        self.failure: SemqStateError | None = None
        self.stops = False
        self._sites = sites
        self._n_sites = Counter(site.stream for site in sites)
        self._streams = streams
        self._whole = whole
        self._on_call = on_call
        self._calls: list[tuple[torch.nn.Module, str]] = []

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hears each pass in the `with`; nothing of it stays on the model."""
        with contextlib.ExitStack() as hooks:

            def hook(handle: Any) -> None:
                hooks.callback(handle.remove)

            roots = [(root, stream) for stream, found in self._streams.roots.items() for root in found]
            for module, stream in [(self._whole, ""), *roots]:
                hook(module.register_forward_pre_hook(self._begins(stream), with_kwargs=True))
            for site in self._sites:
                if site.reads == "input":
                    hook(site.module.register_forward_pre_hook(self._reads(site), with_kwargs=True))
                else:
                    hook(site.module.register_forward_hook(self._gives(site)))
            for module, stream in [*reversed(roots), (self._whole, "")]:
                hook(module.register_forward_hook(self._ends(stream), always_call=True))
            yield

    def forget(self) -> None:
        """Drops what was heard."""
        self.passes, self.failure = [], None

    def give_up(self, error: SemqStateError) -> None:
        """Drops what was heard, and hears nothing more until `forget`."""
        self.passes, self.failure = [], error

    def take(self) -> list[Pass]:
        """What was heard since the last time, in order.

        Raises:
            SemqStateError: something that was heard cannot be kept.
        """
        if self.failure:
            raise self.failure
        passes, self.passes = self.passes, []
        return passes

    def _begins(self, stream: str) -> Callable[..., None]:
        def begins(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self._close((module, stream)):
                self._calls.clear()
            if not self._calls:
                self._on_call(True)
            is_outermost = all(name != stream for _, name in self._calls)
            self._calls.append((module, stream))
            if not stream or self.failure:
                return
            if is_outermost or not any(p.stream == stream for p in self.passes):
                self.passes.append(Pass(stream))
            current = next(p for p in reversed(self.passes) if p.stream == stream)
            _take_notes(current, _named(module, args, kwargs), is_outermost=is_outermost)

        return begins

    def _ends(self, stream: str) -> Callable[..., None]:
        def ends(module: Any, args: Any, output: Any) -> None:
            was_open = self._close((module, stream))
            if was_open and not self._calls and output is not None:
                self._on_call(False)

        return ends

    def _close(self, call: tuple[torch.nn.Module, str]) -> bool:
        """Whether this call was open. An interrupt leaves calls open, until one of their modules is called anew."""
        was_open = call in self._calls
        if was_open:
            del self._calls[self._calls.index(call) :]
        return was_open

    def _reads(self, site: Site) -> Callable[..., None]:
        def reads(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            self._hear(site, input_of(args, kwargs))

        return reads

    def _gives(self, site: Site) -> Callable[..., None]:
        def gives(module: Any, args: Any, output: Any) -> None:
            self._hear(site, output_of(output))

        return gives

    def _hear(self, site: Site, tensor: torch.Tensor | None) -> None:
        if self.failure:
            return
        current = next((p for p in reversed(self.passes) if p.stream == site.stream), None)
        if current is None:
            return  # a part that is called by itself, outside of any step
        if tensor is None or not tensor.is_floating_point() or tensor.ndim < 2:
            self.give_up(
                IncompleteStateError(
                    site.name,
                    expected="a module that gives a tensor of floats, (batch, seq, dim)",
                    found="none" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}",
                    do="name another module",
                )
            )
        elif site.name in current.states:
            self.give_up(
                IncompleteStateError(
                    site.name,
                    expected="a module that is called once a step",
                    found="one that is called more than once",
                    do="name a module around it, or one within that is not shared",
                )
            )
        else:
            current.states[site.name] = tensor.detach()
            current.versions[site.name] = _version(tensor)
            if self.stops and len(current.states) == self._n_sites[site.stream]:
                raise HeardAllError


def _take_notes(current: Pass, call: Mapping[str, Any], *, is_outermost: bool) -> None:
    ids, mask = call.get("input_ids"), call.get("attention_mask")
    embeds = call.get("inputs_embeds", call.get("hidden_states"))
    if current.input_ids is None and isinstance(ids, torch.Tensor) and ids.ndim == 2:
        current.input_ids = ids
        current.shape = current.shape or (ids.shape[0], ids.shape[1])
    if isinstance(embeds, torch.Tensor) and embeds.ndim == 3:
        # Where images are put among the tokens, the inner call knows the sequence.
        current.shape = (embeds.shape[0], embeds.shape[1])
    if is_outermost and mask is not None:
        current.mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        current.hides_padding = current.mask is None


def _named(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by name."""
    if not args:
        return kwargs
    try:
        return inspect.signature(module.forward).bind_partial(*args, **kwargs).arguments
    except TypeError:  # the call itself will say what is wrong
        return kwargs


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
