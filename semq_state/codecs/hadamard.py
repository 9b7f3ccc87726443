"""A randomised orthogonal map that spreads each number of a vector over all of it, the same on every machine.

Signs from an integer hash, then a transform that is symmetric and its own inverse: Hadamard's where the length is
a power of two, Hadamard's of its power of two times Hartley's of its odd factor elsewhere (80 = 16 · 5). Nothing is
padded, so a vector of any length keeps its length and its norm.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

_FACTOR = 256  # the longest transform that is done as one matrix product


def rotate(vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """The rotated vectors.

    Args:
        vectors: float32 `(…, dim)`.
        seed: which of the 2**dim choices of signs, 0 to 2**64 - 1.
    """
    return _spread(vectors * signs(vectors.shape[-1], seed))


def rotate_back(vectors: torch.Tensor, seed: int) -> torch.Tensor:
    """The inverse of `rotate`, up to the rounding of float32."""
    return _spread(vectors) * signs(vectors.shape[-1], seed)


def signs(dim: int, seed: int) -> torch.Tensor:
    """`dim` times 1 or -1, float32: the top bit of the splitmix64 hash of `seed` and the position.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), figure 17 with the
    constants of mix13.
    """
    hashed = np.arange(1, dim + 1, dtype=np.uint64)
    hashed *= np.uint64(0x9E3779B97F4A7C15)
    hashed += np.uint64(seed)
    hashed = (hashed ^ (hashed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hashed = (hashed ^ (hashed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    negative = (hashed ^ (hashed >> np.uint64(31))) >> np.uint64(63)
    return torch.from_numpy(1 - 2 * negative.astype(np.float32))


def _spread(vectors: torch.Tensor) -> torch.Tensor:
    """The transform itself: symmetric, orthogonal, its own inverse."""
    dim = vectors.shape[-1]
    if dim < 2 or not vectors.numel():
        return vectors
    turned = vectors.reshape(-1, dim)
    for size in _factors(dim):
        # The last axis is transformed and becomes the first; after all factors the axes stand as they stood.
        turned = _short(turned.reshape(-1, size)).reshape(-1, dim // size, size).transpose(1, 2)
    return turned.reshape(vectors.shape)


def _factors(dim: int) -> list[int]:
    """`dim` as powers of two up to `_FACTOR` and one odd number, the last axis first."""
    odd = dim // (dim & -dim)
    factors, left = [odd] if odd > 1 else [], dim // odd
    while left > 1:
        factors.append(min(left, _FACTOR))
        left //= factors[-1]
    return factors


def _short(vectors: torch.Tensor) -> torch.Tensor:
    """The transform of one factor, over vectors `(n, size)`."""
    size = vectors.shape[-1]
    if size <= _FACTOR:
        return vectors @ _matrix(size)
    # No matrix is made for a long odd factor; the Hartley transform is the Fourier transform's re - im.
    spectrum = torch.fft.fft(vectors)
    transformed: torch.Tensor = (spectrum.real - spectrum.imag) / math.sqrt(size)
    return transformed


@functools.lru_cache(maxsize=64)
def _matrix(size: int) -> torch.Tensor:
    """Hadamard's matrix for a power of two, Hartley's for an odd size; orthonormal, float32 `(size, size)`."""
    index = np.arange(size)
    if size % 2:
        angle = 2 * np.pi * (np.outer(index, index) % size) / size
        matrix = np.cos(angle) + np.sin(angle)
    else:
        matrix = np.ones((1, 1))
        while len(matrix) < size:
            matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return torch.from_numpy((matrix / math.sqrt(size)).astype(np.float32))
