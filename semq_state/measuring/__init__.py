"""Live model to calibration: what its states are like, measured on text."""

from __future__ import annotations

from semq_state.measuring.calibrate import calibrate as calibrate
