"""What we know of transformers' `generate`: its seams, settings, random state and processors."""
