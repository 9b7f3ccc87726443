"""Groups of values that share a scale: neighbouring channels of a token, or successive tokens of a channel."""

from __future__ import annotations

from collections.abc import Iterator

import torch

ALONG = ("token", "channel")
"""What a group runs along."""


def wrong(bits: object, along: object, group: object) -> str:
    """What is wrong with parameters that are not trusted; empty if nothing is."""
    if type(bits) is not int or not 2 <= bits <= 8:
        return "`bits` must be 2 to 8"
    if type(along) is not str or along not in ALONG:
        return f"`along` must be one of {ALONG}"
    if type(group) is not int or not 1 <= group < 1 << 31:
        return "`group` must be at least 1"
    return ""


def axis_of(along: str) -> int:
    """The axis of `(…, seq, dim)` along which groups run."""
    return -1 if along == "token" else -2


def per_group(shape: tuple[int, ...], axis: int, group: int) -> tuple[int, ...]:
    """The shape of one number per group."""
    counted = list(shape)
    counted[axis] = -(-shape[axis] // group)
    return tuple(counted)


def pieces(length: int, group: int) -> Iterator[tuple[slice, slice]]:
    """The values of all full groups and which groups these are; then the same for the shorter one at the end."""
    full = length // group
    if full:
        yield slice(0, full * group), slice(0, full)
    if length % group:
        yield slice(full * group, length), slice(full, full + 1)


def part(tensor: torch.Tensor, axis: int, of: slice) -> torch.Tensor:
    """A view of some groups, or of some values, along `axis`."""
    return tensor.narrow(axis, of.start, of.stop - of.start)


def split(tensor: torch.Tensor, axis: int, piece: slice, groups: slice) -> torch.Tensor:
    """A view in which the values of a group are `axis`, and the groups the axis before it."""
    values, n_groups = part(tensor, axis, piece), groups.stop - groups.start
    found: torch.Tensor = values.unflatten(axis, (n_groups, values.shape[axis] // n_groups))  # type: ignore[no-untyped-call]
    return found


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """float32, or float64 where sums with 255 steps could overflow."""
    large = bool(tensor.numel()) and float(tensor.abs().amax()) > 2.0**112
    return tensor.double() if large else tensor.float()
