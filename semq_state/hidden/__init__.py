"""Hidden states of a live model: where they are, hearing them, and choosing rows."""

from __future__ import annotations

from semq_state.hidden.collector import Collector as Collector
from semq_state.hidden.listener import HeardAllError as HeardAllError
from semq_state.hidden.listener import Listener as Listener
from semq_state.hidden.listener import Pass as Pass
from semq_state.hidden.sites import Site as Site
from semq_state.hidden.sites import Streams as Streams
from semq_state.hidden.sites import sites_of as sites_of
from semq_state.hidden.sites import streams_of as streams_of
from semq_state.hidden.spec import HiddenStates as HiddenStates
