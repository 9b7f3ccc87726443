"""Restore: a `Snapshot` to a live model that goes on where it left off.

As in `capture`, whatever needs transformers is imported when it is first called.
"""

from __future__ import annotations

from semq_state.restore.resumed import Resumed as Resumed
from semq_state.restore.resumed import restore as restore
