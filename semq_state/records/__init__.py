"""Records: hidden states in volume, on disk, read without the model."""

from __future__ import annotations

from semq_state.records.column import Column as Column
from semq_state.records.gathering import Block as Block
from semq_state.records.plan import Plan as Plan
from semq_state.records.record import Record as Record
from semq_state.records.record import open_record as open_record
from semq_state.records.writer import RecordWriter as RecordWriter
