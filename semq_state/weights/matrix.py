"""One weight matrix as symbols, with everything that turns them into weights again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from semq_state.content import DTYPES
from semq_state.errors import FormatError
from semq_state.quantizers.grid import Grid
from semq_state.quantizers.spectrum import Branch
from semq_state.weights.packing import packed, unpacked

_FLOATS = (torch.float16, torch.float32)
_MOST = 1 << 40


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """`W = (branch + scale * (symbols - zero)) / smoothing`, save the escaped values, which stand for themselves.

    Args:
        rows: out_features.
        cols: in_features.
        bits: of a symbol, 1 to 8.
        group: columns that share a scale and a zero point.
        dtype: of the weights, by its safetensors name.
        symbols: packed as `packing` does, uint8.
        scale: `(rows, n_groups)` float16 or float32.
        zero: the same shape and kinds.
        smoothing: `(cols,)` float16 or float32, by which columns were multiplied; None where none was.
        branch: low frequencies of each row, of the smoothed weights; None where none was kept.
        escaped_at: places in the flat matrix of values that are kept, `(n,)` int64, increasing.
        escaped: these values, `(n,)`, in the weights' dtype, as they stand in the restored matrix.
    """

    rows: int
    cols: int
    bits: int
    group: int
    dtype: str
    symbols: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    smoothing: torch.Tensor | None = None
    branch: Branch | None = None
    escaped_at: torch.Tensor | None = None
    escaped: torch.Tensor | None = None

    @classmethod
    def made(cls, symbols: torch.Tensor, grid: Grid, dtype: torch.dtype, **more: Any) -> QuantizedMatrix:
        """From symbols `(rows, cols)` and their grid."""
        name = next(known for known, each in DTYPES.items() if each == dtype)
        rows, cols = symbols.shape
        return cls(
            rows, cols, grid.bits, grid.group, name, packed(symbols, grid.bits), grid.scale, grid.zero, **more
        )

    @property
    def grid(self) -> Grid:
        return Grid(self.scale, self.zero, self.bits, self.group)

    def unpacked(self) -> torch.Tensor:
        """The symbols, `(rows, cols)` uint8."""
        return unpacked(self.symbols, self.bits, (self.rows, self.cols))

    def weight(self) -> torch.Tensor:
        """The matrix, `(rows, cols)`, in the weights' dtype; computed in float32."""
        rounded = self.residual()
        if self.branch is not None:
            rounded += self.branch.values(self.cols)
        if self.smoothing is not None:
            rounded /= self.smoothing.float()
        found = rounded.to(DTYPES[self.dtype])
        if self.escaped_at is not None and self.escaped is not None:
            found.view(-1)[self.escaped_at] = self.escaped
        return found

    def residual(self) -> torch.Tensor:
        """What the symbols alone stand for, float32."""
        return self.grid.values(self.unpacked())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that a file holds, by name: symbols one a byte, escapes as a mask, for the entropy coder."""
        named = {"symbols": self.unpacked(), "scale": self.scale, "zero": self.zero}
        if self.smoothing is not None:
            named["smoothing"] = self.smoothing
        if self.branch is not None:
            named |= {"counts": self.branch.counts, "coefficients": self.branch.coefficients}
        if self.escaped_at is not None and self.escaped is not None:
            mask = torch.zeros(self.rows * self.cols, dtype=torch.uint8)
            mask[self.escaped_at] = 1
            named |= {"escapes": mask.view(self.rows, self.cols), "escaped": self.escaped}
        return named

    def as_dict(self) -> dict[str, Any]:
        """Everything that is not a tensor."""
        return {name: getattr(self, name) for name in ("rows", "cols", "bits", "group", "dtype")}

    @classmethod
    def of(cls, told: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], where: str) -> QuantizedMatrix:
        """The inverse of `as_dict` and `tensors`, of which nothing is trusted.

        Raises:
            FormatError: they are no matrix.
        """

        def require(holds: bool, expected: str, found: object) -> None:
            if not holds:
                raise FormatError(
                    where, expected=expected, found=f"{found!r:.120}", do="the file is damaged; use another copy"
                )

        sizes = ("rows", "cols", "bits", "group")
        require(told.keys() == {*sizes, "dtype"}, "rows, cols, bits, group and dtype", dict(told))
        require(all(type(told[n]) is int and 0 < told[n] < 1 << 31 for n in sizes), "sizes", dict(told))
        rows, cols, bits, group = (told[name] for name in sizes)
        require(rows * cols < _MOST and bits <= 8 and group <= cols, "sizes of a matrix", dict(told))
        require(told["dtype"] in ("F32", "F16", "BF16"), "a dtype of weights", told["dtype"])
        optional = ({"smoothing"}, {"counts", "coefficients"}, {"escapes", "escaped"})
        names = set(tensors)
        wanted = {"symbols", "scale", "zero"}.union(*(each for each in optional if names & each))
        require(names == wanted, f"the tensors {sorted(wanted)}", sorted(names))

        def take(name: str, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> torch.Tensor:
            tensor = tensors[name]
            right = tensor.dtype in dtypes and (tensor.ndim == 1 if shape is None else tuple(tensor.shape) == shape)
            require(right, f"{shape or '(n,)'} of {dtypes} in {name}", f"{tensor.dtype} {tuple(tensor.shape)}")
            if tensor.is_floating_point():
                require(bool(torch.isfinite(tensor).all()), f"finite numbers in {name}", "NaN or infinity")
            return tensor

        groups = (rows, -(-cols // group))
        symbols = take("symbols", (rows, cols), torch.uint8)
        require(int(symbols.max()) < 2**bits, f"symbols below {2**bits}", int(symbols.max()))
        more: dict[str, Any] = {}
        if "smoothing" in names:
            more["smoothing"] = take("smoothing", (cols,), *_FLOATS)
            require(bool((more["smoothing"] > 0).all()), "smoothing above 0", "less")
        if "counts" in names:
            counts = take("counts", (rows,), torch.int16)
            require(bool(((counts >= 1) & (counts <= cols // 2 + 1)).all()), "frequencies of a row", "more or none")
            expected = int((2 * counts.long() - 1).sum())
            more["branch"] = Branch(counts, take("coefficients", (expected,), *_FLOATS))
        if "escapes" in names:
            mask = take("escapes", (rows, cols), torch.uint8)
            require(int(mask.max()) <= 1, "a mask of 0 and 1", int(mask.max()))
            at = mask.flatten().nonzero().flatten()
            more |= {"escaped_at": at, "escaped": take("escaped", (len(at),), DTYPES[told["dtype"]])}
        scale, zero = take("scale", groups, *_FLOATS), take("zero", groups, *_FLOATS)
        return cls(rows, cols, bits, group, told["dtype"], packed(symbols, bits), scale, zero, **more)

    def n_bytes(self) -> int:
        """What it takes in memory."""
        held = [self.symbols, self.scale, self.zero, self.smoothing, self.escaped_at, self.escaped]
        held += [] if self.branch is None else [self.branch.counts, self.branch.coefficients]
        return sum(t.numel() * t.element_size() for t in held if t is not None)
