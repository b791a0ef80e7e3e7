"""The calls of the Tinker API."""
