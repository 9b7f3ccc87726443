"""States to symbols and back: the policy by kind of state, groups of tensors, presets."""

from __future__ import annotations

from semq_state.symbolic.groups import Group as Group
from semq_state.symbolic.groups import prefix_of as prefix_of
from semq_state.symbolic.policy import Policy as Policy
from semq_state.symbolic.policy import everywhere as everywhere
from semq_state.symbolic.presets import NotCalibratedWarning as NotCalibratedWarning
from semq_state.symbolic.presets import is_lossy as is_lossy
from semq_state.symbolic.presets import policy_for as policy_for
from semq_state.symbolic.presets import words as words
from semq_state.symbolic.states import restored as restored
from semq_state.symbolic.states import symbolise as symbolise
from semq_state.symbolic.targets import kinds_of as kinds_of
from semq_state.symbolic.targets import targets as targets
