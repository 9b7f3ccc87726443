"""What a file says about itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from semq_state.container import Manifest
from semq_state.snapshot import Coding


@dataclass(frozen=True)
class SnapshotInfo:
    """What a snapshot file says about itself, its tensors unread and so unproved.

    Args:
        path: the file.
        n_bytes: its size.
        raw_bytes: size of all its tensors before coding.
        cache_bytes: size of its cache tensors before coding.
        codec: the preset or codec that it was saved with.
        manifest: everything else.
        sealed: whether the file is encrypted.
    """

    path: str
    n_bytes: int
    raw_bytes: int
    cache_bytes: int
    codec: str
    manifest: Manifest
    sealed: bool = False

    @property
    def state_id(self) -> str:
        return self.manifest.state_id

    @property
    def coding(self) -> Coding | None:
        """What coding did to the state; None where nothing was lost."""
        return Coding.from_dict(self.manifest.report) if self.manifest.report else None

    @property
    def n_predicted(self) -> int:
        """How many tensors are coded together, each against a guess from others; the rest stand alone."""
        return sum(len(entry.names) for entry in self.manifest.joint)

    @property
    def n_tokens(self) -> int:
        return self.manifest.tensors["generation.input_ids"].spec.shape[-1]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        structure, tensors = self.manifest.structure, self.manifest.tensors
        layers = list(_layers(structure["cache"]))
        return {
            "path": self.path,
            "format_version": self.manifest.format_version,
            "writer": self.manifest.writer,
            "codec": self.codec,
            "sealed": self.sealed,
            "state_id": self.state_id,
            "content_digest": self.manifest.content_digest,
            "batch_size": tensors["generation.input_ids"].spec.shape[0],
            "n_tokens": self.n_tokens,
            "prompt_length": structure["generation"]["prompt_length"],
            "n_cached": structure["generation"]["n_cached"],
            "n_layers": len(layers),
            "cache_kind": structure["cache"]["kind"],
            "families": sorted({layer["family"] for layer in layers}),
            "checkpoints": [checkpoint["n_tokens"] for checkpoint in structure.get("checkpoints", [])],
            "hidden": {
                stream: {**said, "n_rows": tensors[f"hidden.{stream}.rows"].spec.shape[0]}
                for stream, said in structure.get("hidden", {}).items()
            },
            "n_bytes": self.n_bytes,
            "raw_bytes": self.raw_bytes,
            "cache_bytes": self.cache_bytes,
            "ratio": round(self.raw_bytes / self.n_bytes, 4),
            "n_predicted": self.n_predicted,
            "coding": self.coding.as_dict() if self.coding else None,
            "provenance": dict(self.manifest.provenance),
            "tensors": {name: {"dtype": t.spec.dtype, "shape": list(t.spec.shape)} for name, t in tensors.items()},
        }


def _layers(cache: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from cache["layers"]
    for part in cache.get("parts", {}).values():
        yield from _layers(part)
