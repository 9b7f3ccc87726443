"""Kinds of caches: the objects that models are handed. One idea a file."""

from __future__ import annotations

from semq_state.caches.kinds.base import AbstractKind as AbstractKind
from semq_state.caches.kinds.encoder_decoder import EncoderDecoder
from semq_state.caches.kinds.layered import DFlash, Dynamic, Mtp, Quantized, Static
from semq_state.caches.kinds.minimax import MiniMax
from semq_state.caches.kinds.recurrent import Reformer, Rwkv, VoxtralPadding, XlNet, XLstm
from semq_state.caches.kinds.registry import KINDS as KINDS
from semq_state.caches.kinds.registry import kind as kind
from semq_state.caches.kinds.registry import kind_of as kind_of
from semq_state.caches.kinds.registry import register_kind as register_kind

for _kind in (
    Dynamic(),
    Static(),
    Quantized(),
    EncoderDecoder(),
    Mtp(),
    DFlash(),
    MiniMax(),
    Rwkv(),
    XlNet(),
    XLstm(),
    Reformer(),
    VoxtralPadding(),
):
    register_kind(_kind)
