"""Symbols to bytes and back, near their entropy. One coder a file."""
