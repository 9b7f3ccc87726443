"""What a tensor's content is: dtype names, canonical bytes, chunks and digests, the same on every machine."""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import msgpack
import numpy as np
import numpy.typing as npt
import torch

from semq_state.errors import UnsupportedModelError

Bytes = npt.NDArray[np.uint8]

DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' dtype names and torch's."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}

CHUNK_BYTES = 8 << 20
"""A tensor is hashed and coded in pieces of about this size along its token axis (format version 1)."""


@dataclass(frozen=True)
class TensorSpec:
    """A tensor's dtype, by its safetensors name, and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        return DTYPES[self.dtype].itemsize

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def n_tokens(self) -> int:
        """Length of axis -2, along which a tensor is cut; 0 where it has no such axis."""
        return self.shape[-2] if len(self.shape) > 1 else 0

    @property
    def chunk_tokens(self) -> int:
        """How many tokens a chunk holds; 0 where there is one chunk whatever the size."""
        if not self.n_tokens or not self.n_bytes:
            return 0
        return max(1, CHUNK_BYTES // (self.n_bytes // self.n_tokens))

    @property
    def n_chunks(self) -> int:
        return -(-self.n_tokens // self.chunk_tokens) if self.chunk_tokens else 1

    def chunks(self) -> list[tuple[int, int]]:
        """Bounds `(start, stop)` of the chunks along axis -2."""
        step = self.chunk_tokens or max(1, self.n_tokens)
        return [(i * step, min((i + 1) * step, self.n_tokens)) for i in range(self.n_chunks)]

    def chunk(self, start: int, stop: int) -> TensorSpec:
        """The spec of one chunk."""
        if len(self.shape) < 2:
            return self
        return TensorSpec(self.dtype, (*self.shape[:-2], stop - start, self.shape[-1]))


def spec_of(tensor: torch.Tensor, name: str = "tensor") -> TensorSpec:
    """The spec of a live tensor.

    Raises:
        UnsupportedModelError: its dtype has no place in a file.
    """
    if tensor.dtype not in _NAMES or tensor.layout != torch.strided:
        raise UnsupportedModelError(
            name,
            expected=f"a dense tensor of {', '.join(str(d)[6:] for d in _NAMES)}",
            found=f"{tensor.dtype}, {tensor.layout}",
            do="convert it before it enters the state",
        )
    return TensorSpec(_NAMES[tensor.dtype], tuple(tensor.shape))


def chunk_of(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A view of one chunk of `tensor`."""
    return tensor[..., start:stop, :] if tensor.ndim > 1 else tensor


def raw_bytes(tensor: torch.Tensor) -> Bytes:
    """The canonical content: C-ordered little-endian bytes; no copy for a contiguous CPU tensor."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    data: Bytes = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    return _in_our_order(data, tensor.element_size())


def tensor_of(data: Bytes, spec: TensorSpec) -> torch.Tensor:
    """The inverse of `raw_bytes`; no copy on a little-endian machine."""
    if not spec.n_bytes:
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
    return torch.from_numpy(_in_our_order(data, spec.itemsize)).view(DTYPES[spec.dtype]).reshape(spec.shape)


def _in_our_order(data: Bytes, itemsize: int) -> Bytes:
    """Canonical bytes to this machine's, or back."""
    if sys.byteorder == "little":
        return data
    return np.ascontiguousarray(data.reshape(-1, itemsize)[:, ::-1]).reshape(-1)


def digest(data: Bytes) -> str:
    """`sha256:…` of canonical bytes."""
    return f"sha256:{hashlib.sha256(data.data).hexdigest()}"


def tensor_digests(tensor: torch.Tensor, name: str = "tensor") -> tuple[str, ...]:
    """The digest of each chunk of `tensor`."""
    bounds = spec_of(tensor, name).chunks()
    return tuple(digest(raw_bytes(chunk_of(tensor, start, stop))) for start, stop in bounds)


def chunk_digests(data: Bytes, spec: TensorSpec) -> tuple[str, ...]:
    """The same from canonical bytes, which may hold several chunks."""
    return (digest(data),) if spec.n_chunks == 1 else tensor_digests(tensor_of(data, spec))


def pack(value: Any) -> bytes:
    """Canonical msgpack: sorted string keys, shortest forms, no extension types."""
    packed = msgpack.packb(_sorted(value), use_bin_type=True, strict_types=True)
    assert isinstance(packed, bytes)
    return packed


def content_digest(
    structure: Mapping[str, Any],
    specs: Mapping[str, TensorSpec],
    digests: Mapping[str, Sequence[str]],
) -> str:
    """The digest of a whole content; it depends on no codec, thread count or section order."""
    tensors = {name: [s.dtype, list(s.shape), list(digests[name])] for name, s in specs.items()}
    return f"sha256:{hashlib.sha256(pack({'structure': structure, 'tensors': tensors})).hexdigest()}"


def state_id(content: str, identity: Mapping[str, Any]) -> str:
    """The identity of a state: what it holds and which model it belongs to."""
    return f"sha256:{hashlib.sha256(pack({'content': content, 'identity': identity})).hexdigest()}"


def n_workers() -> int:
    """Threads to hash and code with: every core that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def all_digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[str, ...]]:
    """`tensor_digests` of every tensor, on all cores."""
    with ThreadPoolExecutor(n_workers()) as pool:
        return dict(zip(tensors, pool.map(tensor_digests, tensors.values(), tensors), strict=True))


def _sorted(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, (list, tuple)):
        return [_sorted(item) for item in value]
    return value


def specs_of(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, TensorSpec]]:
    """Name and spec of every tensor."""
    for name, tensor in tensors.items():
        yield name, spec_of(tensor, name)
