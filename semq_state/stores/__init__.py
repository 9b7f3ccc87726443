"""Stores: names to byte ranges. They know no format."""

from __future__ import annotations

from semq_state.stores.local import LocalFile as LocalFile
from semq_state.stores.local import ReadableFile as ReadableFile
from semq_state.stores.local import Source as Source
from semq_state.stores.local import atomic_write as atomic_write
from semq_state.stores.local import check_writable as check_writable
from semq_state.stores.local import create_new as create_new
from semq_state.stores.local import opened as opened
from semq_state.stores.local import size_of as size_of
