"""`sq.verify`: are these bytes whole? Every digest is computed again from the content."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from semq_state import files
from semq_state.errors import FormatError, IncompleteStateError


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Args:
        path: the file.
        state_id: the identity that it claims, empty where it has none.
        n_sections: tensor sections in it.
        failures: section name, or `file`, to what is wrong with it.
    """

    path: str
    state_id: str
    n_sections: int
    failures: Mapping[str, str]

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "passed": self.passed,
            "state_id": self.state_id,
            "n_sections": self.n_sections,
            "failures": dict(self.failures),
        }


def verify(path: str | os.PathLike[str], *, progress: files.Progress | None = None) -> Verification:
    """Reads each byte of a snapshot file once, and says which section does not hold.

    Args:
        path: the file.
        progress: called with the bytes done and the bytes in all.

    Returns:
        The verdict; a damaged file is one, not an exception.

    Raises:
        StoreError: there is no such file.

    Example:
        >>> sq.verify("chat.safetensors").passed  # doctest: +SKIP
    """
    try:
        manifest, failures = files.check_sections(path, progress=progress)
    except (FormatError, IncompleteStateError) as error:
        return Verification(str(path), "", 0, {"file": str(error)})
    n_sections = sum(len(t.sections) for t in manifest.tensors.values())
    n_sections += sum(len(entry.sections) for entry in manifest.joint)
    return Verification(
        str(path),
        manifest.state_id,
        n_sections,
        {name: str(error) for name, error in failures.items()},
    )
