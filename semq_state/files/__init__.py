"""Save, load and inspect: codecs, container and store, composed. Data flows section by section."""

from __future__ import annotations

from semq_state.files.info import SnapshotInfo as SnapshotInfo
from semq_state.files.opening import open_snapshot as open_snapshot
from semq_state.files.pipeline import Progress as Progress
from semq_state.files.pipeline import counter as counter
from semq_state.files.reading import failures_of as failures_of
from semq_state.files.reading import inspect as inspect
from semq_state.files.reading import load as load
from semq_state.files.writing import save as save
