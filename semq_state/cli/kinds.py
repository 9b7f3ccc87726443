"""Which of our files is this?"""

from __future__ import annotations

from pathlib import Path

from semq_state import container
from semq_state.capsules.manifest import FORMAT as CAPSULE
from semq_state.errors import FormatError
from semq_state.stores import LocalFile
from semq_state.weights.table import FORMAT as WEIGHTS

_KINDS = {CAPSULE: "capsule", WEIGHTS: "weights"}


def kind_of(path: Path) -> str:
    """`capsule` or `weights` by what the header says; empty for snapshots and whatever else is not these.

    Raises:
        StoreError: there is no such file.
    """
    with LocalFile(path) as file:
        try:
            header = container.read_header(file.read, file.size, str(path))
        except FormatError:
            return ""
    return _KINDS.get(header.metadata.get("format", ""), "")
