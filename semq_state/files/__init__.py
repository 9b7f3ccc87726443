"""Save, load and inspect: codecs, container and store, composed. Data flows section by section."""

from __future__ import annotations

from semq_state.files.info import SnapshotInfo as SnapshotInfo
from semq_state.files.pipeline import Progress as Progress
from semq_state.files.reading import check_sections as check_sections
from semq_state.files.reading import inspect as inspect
from semq_state.files.reading import load as load
from semq_state.files.writing import save as save
