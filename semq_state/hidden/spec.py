"""`sq.HiddenStates`: which hidden states to keep, of which tokens, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from semq_state.errors import UnsupportedOperationError

Rule = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
Tokens = str | slice | Rule
"""`all`, `last`, `generated`, positions, or a rule: (token ids `(n,)`, positions `(n,)`) to bool `(n,)`."""

_WORDS = ("all", "last", "generated")
_POOLS = (None, "mean", "last")


@dataclass(frozen=True)
class HiddenStates:
    """Which hidden states to keep. Padding never enters, in no row of a batch, before or after its end.

    A row is the hidden state *at* a token, from the forward pass that read it; the last token of a generation has
    not been read yet and has none.

    Args:
        layers: numbers as in transformers' `hidden_states`: 0 is what the first block reads, `i` what block `i`
            reads, and the number of blocks (or -1) the last hidden state, after the final norm. `"all"` for each.
            Of an encoder-decoder both stacks are meant. The last hidden state, where no modules are named either.
        modules: paths of modules whose output to keep, `model.layers.*.mlp` say; `*` stands for one part of a
            path, or for some letters of it, `**` for any number of parts.
        tokens: `all`, `generated` (those after the prompt), `last` (of each row), a slice of positions, or a rule
            that is called with token ids `(n,)` (-1 where there are none) and positions `(n,)` of one row and
            gives bool `(n,)`.
        pool: one row for each row of the batch or document instead: the `mean` of its chosen tokens, summed in
            float32, or the `last` of them.
        dtype: of the rows; the model's own by default, float32 for a mean.

    Raises:
        UnsupportedOperationError: an argument is none of these.

    Example:
        >>> HiddenStates(layers=(0, 12, -1)).layers
        (0, 12, -1)
    """

    layers: int | Sequence[int] | str | None = None
    modules: str | Sequence[str] | None = None
    tokens: Tokens = "all"
    pool: str | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        layers = (self.layers,) if isinstance(self.layers, int) else self.layers
        numbers = () if layers is None or layers == "all" else layers
        if isinstance(numbers, str) or not all(type(n) is int for n in numbers):
            raise _wrong("layers", "numbers of layers, or 'all'", self.layers)
        modules = (self.modules,) if isinstance(self.modules, str) else self.modules
        if not all(isinstance(pattern, str) and pattern for pattern in modules or ()):
            raise _wrong("modules", "paths of modules", self.modules)
        if not (isinstance(self.tokens, slice) or callable(self.tokens) or self.tokens in _WORDS):
            raise _wrong("tokens", f"one of {_WORDS}, a slice or a function", self.tokens)
        if isinstance(self.tokens, slice) and not _is_plain(self.tokens):
            raise _wrong("tokens", "a slice of whole numbers with a positive step", self.tokens)
        if self.pool not in _POOLS:
            raise _wrong("pool", f"one of {_POOLS}", self.pool)
        if self.pool is not None and self.needs_end:
            raise _wrong("pool", "None with tokens that are counted from the end", self.pool)
        if self.dtype is not None and not (isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point):
            raise _wrong("dtype", "a floating dtype", self.dtype)
        chosen = (-1,) if layers is None and not modules else layers
        object.__setattr__(self, "layers", chosen if chosen is None or chosen == "all" else tuple(chosen))
        object.__setattr__(self, "modules", tuple(modules or ()))

    @property
    def word(self) -> str:
        """What `HiddenRows.tokens` says of this choice."""
        if isinstance(self.tokens, slice):
            parts = (self.tokens.start, self.tokens.stop, self.tokens.step)
            return ":".join("" if n is None else str(n) for n in parts)
        return self.tokens if isinstance(self.tokens, str) else "chosen"

    @property
    def needs_end(self) -> bool:
        """Whether which tokens are kept depends on how many there are in all."""
        if isinstance(self.tokens, slice):
            return any(n is not None and n < 0 for n in (self.tokens.start, self.tokens.stop))
        return self.tokens == "last"


def _is_plain(tokens: slice) -> bool:
    values = (tokens.start, tokens.stop, tokens.step)
    return all(n is None or type(n) is int for n in values) and (tokens.step is None or tokens.step > 0)


def _wrong(name: str, expected: str, found: Any) -> UnsupportedOperationError:
    return UnsupportedOperationError(
        f"HiddenStates, {name}", expected=expected, found=f"{found!r:.120}", do="choose one of these"
    )
