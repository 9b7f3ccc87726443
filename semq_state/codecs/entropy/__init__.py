"""Entropy coders: byte codecs for tensors of integer symbols."""

from __future__ import annotations

from semq_state.codecs.entropy.bits import Bits as Bits
from semq_state.codecs.entropy.pco import Pco as Pco
