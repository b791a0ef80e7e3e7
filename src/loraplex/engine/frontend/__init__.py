"""From a caller's request to token ids, and from tokens to outputs."""
