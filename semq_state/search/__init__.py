"""Search: an exact scan over packed symbols, beside whatever holds the vectors themselves."""

from __future__ import annotations

from semq_state.search.exchange import read_semq_index as read_semq_index
from semq_state.search.exchange import write_semq_index as write_semq_index
from semq_state.search.index import SearchResult as SearchResult
from semq_state.search.index import SymbolIndex as SymbolIndex
