"""What the suites feed to codecs: bytes of every kind, vectors, and a small state to save."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from semq_state import codecs, content
from semq_state.codecs import AbstractCodec, AbstractVectorCodec
from semq_state.content import DTYPES, Bytes, TensorSpec
from semq_state.provenance import Provenance
from semq_state.snapshot import CacheState, GenerationState, LayerState, Snapshot

SHAPES = ((), (1,), (7,), (0,), (2, 0, 3), (4, 0), (1, 1), (3, 2, 37, 5), (1, 2, 90, 16), (2, 130, 33))
"""No axes, no values, one value, odd sizes, and enough values to be worth coding."""


def contents(spec: TensorSpec) -> Iterator[tuple[str, Bytes]]:
    """Canonical bytes of `spec`, in words and as they are."""
    random, n = np.random.default_rng([spec.n_bytes, spec.itemsize]), spec.n_bytes
    most = 1 if spec.dtype == "BOOL" else 255
    # Any bits: NaNs with payloads, infinities, negative zeros and denormals are among them.
    yield "any bits", random.integers(0, most + 1, n, np.uint8)
    yield "zeros", np.zeros(n, np.uint8)
    yield "ones", np.full(n, most, np.uint8)
    yield "values", values_of(spec, random.normal(size=n // spec.itemsize) * 3)
    few = random.normal(size=n // spec.itemsize) * 40 * (random.random(n // spec.itemsize) < 1 / 32)
    yield "few values", values_of(spec, few)


def specials(dtype: str) -> Bytes:
    """Negative zeros, infinities, denormals, and NaNs of several signs and payloads."""
    numbers = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), float("nan"), 1e-45, 6e-8], dtype=torch.float64)
    known = content.raw_bytes(torch.cat([numbers, -numbers]).to(DTYPES[dtype]))
    itemsize = DTYPES[dtype].itemsize
    nans = np.full((4, itemsize), 0xFF, np.uint8)
    nans[1:, 0], nans[2:, -1] = (0xFF, 0xFD, 0xFE), (0x7F, 0x7F)
    return np.concatenate([known, nans.reshape(-1)])


def values_of(spec: TensorSpec, numbers: np.ndarray[tuple[int], np.dtype[np.float64]]) -> Bytes:
    """These numbers, rounded to the dtype of `spec`."""
    dtype = DTYPES[spec.dtype]
    tensor = torch.from_numpy(numbers)
    if not dtype.is_floating_point:
        tensor = (tensor if dtype.is_signed else tensor.abs()).round().to(torch.int64)
    return content.raw_bytes(tensor.to(dtype)).copy()


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float32 vectors, whatever has happened to torch's own random state."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_state(dim: int = 64) -> Snapshot:
    """A state of 23 cached tokens in two layers, made without a model: float32 keys and values of `dim`."""
    shape = (1, 2, 23, dim)
    layers = tuple(
        LayerState("dynamic", {"keys": gaussian(*shape, seed=i) + 1, "values": gaussian(*shape, seed=i + 2)})
        for i in range(2)
    )
    generation = GenerationState(
        input_ids=torch.arange(24)[None], prompt_length=20, n_cached=23, finished=torch.tensor([False])
    )
    origin = Provenance(f"sha256:{'0' * 64}", {"model_type": "none"}, {}, None, {}, {}, "float32", "none")
    return Snapshot(CacheState("dynamic", layers), generation, origin)


@contextlib.contextmanager
def registered(codec: AbstractCodec | AbstractVectorCodec) -> Iterator[None]:
    """`codec` decodes its id for a while, if nobody else does."""
    table: dict[str, AbstractCodec] | dict[str, AbstractVectorCodec] = codecs.VECTOR_DECODERS
    if isinstance(codec, AbstractCodec):
        table = codecs.DECODERS
    if codec.id in table:
        yield
        return
    codecs.register(codec)
    try:
        yield
    finally:
        del table[codec.id]
