"""Integrations with other systems, one module each, built on the public names of semq_state only."""
