"""Capture: a live model's state to a `Snapshot`.

Whatever needs transformers is imported when it is first called: files can be read, checked and inspected
without it, and its import takes seconds.
"""

from __future__ import annotations

from semq_state.capture.loop import snapshot_of as snapshot_of
from semq_state.capture.session import Capture as Capture
from semq_state.capture.session import capture as capture
