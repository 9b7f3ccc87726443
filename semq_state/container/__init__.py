"""Container: named sections and a manifest as one safetensors file; it knows no model."""

from __future__ import annotations

from semq_state.container.header import MANIFEST as MANIFEST
from semq_state.container.header import MAX_SIGNATURE_BYTES as MAX_SIGNATURE_BYTES
from semq_state.container.header import SIGNATURE as SIGNATURE
from semq_state.container.header import SIGNED_SINCE as SIGNED_SINCE
from semq_state.container.header import Header as Header
from semq_state.container.header import Section as Section
from semq_state.container.header import read_header as read_header
from semq_state.container.header import shown as shown
from semq_state.container.joint import JointEntry as JointEntry
from semq_state.container.joint import JointSection as JointSection
from semq_state.container.joint import all_sections as all_sections
from semq_state.container.joint import n_bytes_of as n_bytes_of
from semq_state.container.manifest import EMBEDDED as EMBEDDED
from semq_state.container.manifest import FORMAT_VERSION as FORMAT_VERSION
from semq_state.container.manifest import Manifest as Manifest
from semq_state.container.manifest import SectionEntry as SectionEntry
from semq_state.container.manifest import TensorEntry as TensorEntry
from semq_state.container.manifest import read_manifest as read_manifest
from semq_state.container.manifest import unpacked as unpacked
from semq_state.container.writer import PlainSink as PlainSink
from semq_state.container.writer import SectionWriter as SectionWriter
from semq_state.container.writer import Sink as Sink
