"""A model and a dataset to a record of hidden states on disk."""

from __future__ import annotations

from semq_state.recording.progress import RecordProgress as RecordProgress
from semq_state.recording.record import record as record
