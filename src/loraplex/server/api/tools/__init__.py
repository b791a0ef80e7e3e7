"""Tools: what a client offers, how a model's chat template writes calls of them, and calls read from an answer."""
