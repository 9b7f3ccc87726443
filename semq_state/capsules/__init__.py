"""Capsules: a conversation, the weights that go on with it, and where both come from, in one file."""

from __future__ import annotations

from semq_state.capsules.info import CapsuleInfo as CapsuleInfo
from semq_state.capsules.opening import Capsule as Capsule
from semq_state.capsules.opening import QuantizedWeightsWarning as QuantizedWeightsWarning
from semq_state.capsules.opening import inspect_capsule as inspect_capsule
from semq_state.capsules.opening import open_capsule as open_capsule
from semq_state.capsules.opening import verify_capsule as verify_capsule
from semq_state.capsules.pack import pack as pack
