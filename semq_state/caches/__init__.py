"""Cache families and kinds: the only room that knows the inside of transformers' caches. One family a file."""

from __future__ import annotations

from semq_state.caches.base import AbstractFamily as AbstractFamily
from semq_state.caches.base import Mark as Mark
from semq_state.caches.cache import NO_CACHE as NO_CACHE
from semq_state.caches.cache import CacheMark as CacheMark
from semq_state.caches.cache import can_step_back as can_step_back
from semq_state.caches.cache import check_cache as check_cache
from semq_state.caches.cache import dump_cache as dump_cache
from semq_state.caches.cache import is_cache as is_cache
from semq_state.caches.cache import mark_cache as mark_cache
from semq_state.caches.cache import n_cached as n_cached
from semq_state.caches.cache import rebuild_cache as rebuild_cache
from semq_state.caches.expected import expected_layers as expected_layers
from semq_state.caches.kinds import KINDS as KINDS
from semq_state.caches.kinds import AbstractKind as AbstractKind
from semq_state.caches.kinds import register_kind as register_kind
from semq_state.caches.registry import FAMILIES as FAMILIES
from semq_state.caches.registry import register as register
