"""`python -m semq_state` is the command line."""

from __future__ import annotations

from semq_state.cli import main

if __name__ == "__main__":
    main()
