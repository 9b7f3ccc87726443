"""Encryption at rest: a snapshot file in segments under AES-256-GCM, its key wrapped for those who may read it."""

from __future__ import annotations

from semq_state.sealing.keys import PAIRS as PAIRS
from semq_state.sealing.keys import KeyFile as KeyFile
from semq_state.sealing.keys import OpeningKey as OpeningKey
from semq_state.sealing.keys import Passphrase as Passphrase
from semq_state.sealing.keys import PrivateKey as PrivateKey
from semq_state.sealing.keys import Recipient as Recipient
from semq_state.sealing.keys import SealingKey as SealingKey
from semq_state.sealing.keys import SealTo as SealTo
from semq_state.sealing.keys import create_key_file as create_key_file
from semq_state.sealing.keys import create_key_pair as create_key_pair
from semq_state.sealing.layout import is_sealed as is_sealed
from semq_state.sealing.reading import SealedFile as SealedFile
from semq_state.sealing.table import Seal as Seal
from semq_state.sealing.table import Unlock as Unlock
from semq_state.sealing.table import check_keys as check_keys
from semq_state.sealing.table import new_seal as new_seal
from semq_state.sealing.whole import seal as seal
from semq_state.sealing.whole import unseal as unseal
from semq_state.sealing.writing import SealedSink as SealedSink
