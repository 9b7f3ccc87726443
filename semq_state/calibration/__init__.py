"""Statistics of a model that calibrated codecs need: an artifact with its own identity."""

from __future__ import annotations

from semq_state.calibration.artifact import Calibration as Calibration
from semq_state.calibration.artifact import LayerSet as LayerSet
from semq_state.calibration.artifact import Measured as Measured
from semq_state.calibration.curve import bits_at as bits_at
from semq_state.calibration.curve import kl_at as kl_at
from semq_state.calibration.curve import step_for_bits as step_for_bits
from semq_state.calibration.curve import step_for_kl as step_for_kl
from semq_state.calibration.files import find as find
from semq_state.calibration.files import find_digest as find_digest
from semq_state.calibration.files import load_calibration as load_calibration
from semq_state.calibration.files import of_parts as of_parts
from semq_state.calibration.files import place_for as place_for
from semq_state.calibration.files import save_calibration as save_calibration
from semq_state.calibration.files import table_of as table_of
from semq_state.calibration.predictor import GuessSet as GuessSet
from semq_state.calibration.predictor import LayerGuess as LayerGuess
from semq_state.calibration.predictor import Predictor as Predictor
from semq_state.calibration.predictor_files import load_predictor as load_predictor
from semq_state.calibration.predictor_files import predictor_for as predictor_for
from semq_state.calibration.predictor_files import predictor_of_digest as predictor_of_digest
from semq_state.calibration.predictor_files import predictor_place_for as predictor_place_for
from semq_state.calibration.predictor_files import save_predictor as save_predictor
from semq_state.calibration.turn import Turn as Turn
