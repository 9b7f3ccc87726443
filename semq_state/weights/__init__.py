"""Quantised weights: the model's own part of a state."""
