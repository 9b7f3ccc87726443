"""What a capsule says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semq_state.capsules.manifest import CapsuleManifest
from semq_state.files import SnapshotInfo
from semq_state.weights.info import WeightsInfo


@dataclass(frozen=True)
class CapsuleInfo:
    """What a capsule says about itself, its tensors unread and so unproved.

    Args:
        path: the file.
        n_bytes: its size.
        manifest: its parts.
        stored: of each part the bytes that it takes in the file.
        weights: what its weights say.
        snapshot: what its state says.
    """

    path: str
    n_bytes: int
    manifest: CapsuleManifest
    stored: Mapping[str, int]
    weights: WeightsInfo
    snapshot: SnapshotInfo

    @property
    def capsule_id(self) -> str:
        return self.manifest.capsule_id

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "path": self.path,
            "n_bytes": self.n_bytes,
            "capsule_id": self.capsule_id,
            "writer": self.manifest.writer,
            "parts": {
                name: {
                    "n_bytes": entry.n_bytes,
                    "stored": self.stored[name],
                    "coding": entry.coding,
                    "digest": entry.digest,
                    "id": entry.identity,
                }
                for name, entry in self.manifest.parts.items()
            },
            "weights": self.weights.as_dict(),
            "snapshot": self.snapshot.as_dict(),
        }
