"""Restore: a `Snapshot` to a live model that goes on where it left off."""

from __future__ import annotations

from semq_state.restore.checks import check_model as check_model
from semq_state.restore.resumed import Resumed as Resumed
from semq_state.restore.resumed import restore as restore
