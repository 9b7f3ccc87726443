"""A low-frequency branch: the few lowest frequencies of each row, kept apart from what is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class Branch:
    """The lowest frequencies of rows.

    Args:
        counts: `(rows,)` int16, how many each row keeps, the constant one included.
        coefficients: `(sum of 2 * count - 1,)` float16 or float32: of each row the constant, then real and
            imaginary part of each frequency, of the orthonormal transform.
    """

    counts: torch.Tensor
    coefficients: torch.Tensor

    def values(self, cols: int) -> torch.Tensor:
        """The rows that they make, float32 `(rows, cols)`."""
        counts = self.counts.long()
        most = max(1, int(counts.max())) if len(counts) else 1
        packed = torch.zeros(len(counts), 2 * most - 1, device=self.coefficients.device)
        packed[_filled(counts, most)] = self.coefficients.float()
        return _rows(packed, cols)


def energy(rows: torch.Tensor) -> torch.Tensor:
    """Energy of each frequency of rows `(rows, cols)`, `(rows, cols // 2 + 1)` float32; it sums to the squares'.

    Parseval: a frequency of a real row stands twice among all `cols`, save the first and, of an even number, the
    last.
    """
    found: torch.Tensor = torch.fft.rfft(rows.float(), norm="ortho").abs().square()
    doubled = found * 2
    doubled[:, 0] = found[:, 0]
    if rows.shape[1] % 2 == 0:
        doubled[:, -1] = found[:, -1]
    return doubled


def budget(scores: torch.Tensor, mean: int, cols: int, sharpness: float = 1.0) -> torch.Tensor:
    """How many frequencies each row keeps (SpecQuant, arXiv 2511.11663): `softmax(sharpness * score)`'s share.

    As printed the shares are of the row's length, which leaves each row one frequency; they are taken of
    `mean * rows` instead, the size that the published overheads belong to.

    Args:
        scores: `(rows,)`, in standard deviations.
        mean: frequencies of a row on average.
        cols: length of a row.
        sharpness: of the softmax.
    """
    shares = (sharpness * scores.double()).softmax(0)
    counts = (shares * mean * len(scores)).round().clamp(1, cols // 2 + 1)
    return counts.to(torch.int16)


def branch(rows: torch.Tensor, counts: torch.Tensor) -> Branch:
    """The `counts` lowest frequencies of each of `(rows, cols)`, as they are kept."""
    wide = counts.long()
    most = max(1, int(wide.max())) if len(wide) else 1
    spectrum = torch.fft.rfft(rows.float(), norm="ortho")[:, :most]
    most = min(most, spectrum.shape[1])
    parts = torch.view_as_real(spectrum).flatten(1)
    packed = torch.cat([parts[:, :1], parts[:, 2:]], 1)  # the constant one is real
    found = packed[_filled(wide, most)]
    narrow = found.half()
    return Branch(counts.to(torch.int16), narrow if bool(torch.isfinite(narrow).all()) else found)


def _filled(counts: torch.Tensor, most: int) -> torch.Tensor:
    """Which of `2 * most - 1` numbers each row has."""
    places = torch.arange(2 * most - 1, device=counts.device)
    return places < (2 * counts - 1)[:, None]


def _rows(packed: torch.Tensor, cols: int) -> torch.Tensor:
    most = (packed.shape[1] + 1) // 2
    spectrum = torch.zeros(len(packed), cols // 2 + 1, dtype=torch.complex64, device=packed.device)
    pairs = torch.cat([packed[:, :1], packed.new_zeros(len(packed), 1), packed[:, 1:]], 1).view(
        len(packed), most, 2
    )
    spectrum[:, :most] = torch.view_as_complex(pairs.contiguous())
    rows: torch.Tensor = torch.fft.irfft(spectrum, n=cols, norm="ortho")
    return rows
