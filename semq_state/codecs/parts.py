"""The parts of an untrusted `Symbolic`, each taken only if it is what its codec makes."""

from __future__ import annotations

from collections.abc import Collection

import torch

from semq_state.codecs.symbolic import Symbolic, Symbols, damaged


def check_names(
    codec: str, symbolic: Symbolic, *, symbols: Collection[str], exact: Collection[str], params: Collection[str]
) -> None:
    """Refuses parts that are missing or that nobody asked for.

    Raises:
        IntegrityError: the names of the symbols, of the exact tensors or of the parameters are others.
    """
    for what, found, expected in (
        ("symbols", symbolic.symbols, symbols),
        ("exact tensors", symbolic.exact, exact),
        ("parameters", symbolic.params, params),
    ):
        if found.keys() != set(expected):
            raise damaged(codec, f"the {what} {sorted(expected)}", list(found))


def symbols_of(
    codec: str, symbolic: Symbolic, name: str, shape: tuple[int, ...], dtypes: Collection[torch.dtype]
) -> Symbols:
    """The symbols called `name`.

    Raises:
        IntegrityError: their shape is another or their dtype is none of `dtypes`.
    """
    symbols = symbolic.symbols[name]
    _check(codec, name, symbols.values, shape, dtypes)
    return symbols


def exact_of(
    codec: str, symbolic: Symbolic, name: str, shape: tuple[int, ...], dtypes: Collection[torch.dtype]
) -> torch.Tensor:
    """The exact tensor called `name`.

    Raises:
        IntegrityError: its shape is another, its dtype is none of `dtypes`, or it holds NaN or infinity.
    """
    tensor = symbolic.exact[name]
    _check(codec, name, tensor, shape, dtypes)
    if not bool(torch.isfinite(tensor).all()):
        raise damaged(codec, f"finite numbers in `{name}`", "NaN or infinity")
    return tensor


def check_vectors(codec: str, shape: tuple[int, ...]) -> None:
    """Refuses a shape that is not `(…, seq, dim)`.

    Raises:
        IntegrityError: it has fewer than two axes.
    """
    if len(shape) < 2:
        raise damaged(codec, "vectors, (…, seq, dim)", f"shape {shape}")


def _check(
    codec: str, name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtypes: Collection[torch.dtype]
) -> None:
    if tensor.dtype not in dtypes or tuple(tensor.shape) != tuple(shape):
        wanted = " or ".join(str(dtype)[6:] for dtype in dtypes)
        raise damaged(
            codec, f"{wanted} {tuple(shape)} in `{name}`", f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)}"
        )
