"""A Transformer's state between two tokens, as frozen values that know neither models nor files."""

from __future__ import annotations

from semq_state.snapshot.assembly import assemble as assemble
from semq_state.snapshot.cache import ABSENT as ABSENT
from semq_state.snapshot.cache import CacheState as CacheState
from semq_state.snapshot.cache import LayerState as LayerState
from semq_state.snapshot.cache import Tensors as Tensors
from semq_state.snapshot.coding import Coding as Coding
from semq_state.snapshot.coding import SectionError as SectionError
from semq_state.snapshot.generation import GenerationState as GenerationState
from semq_state.snapshot.generation import ProcessorState as ProcessorState
from semq_state.snapshot.hidden import ENCODER as ENCODER
from semq_state.snapshot.hidden import SEQUENCE as SEQUENCE
from semq_state.snapshot.hidden import HiddenRows as HiddenRows
from semq_state.snapshot.trace import Trace as Trace
from semq_state.snapshot.whole import Checkpoint as Checkpoint
from semq_state.snapshot.whole import Snapshot as Snapshot
