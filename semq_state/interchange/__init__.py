"""Interchange: files of other systems, read and written. One format a file."""

from __future__ import annotations

from semq_state.interchange.semq_file import SemqFile as SemqFile
from semq_state.interchange.semq_file import read_semq as read_semq
from semq_state.interchange.semq_file import write_semq as write_semq
