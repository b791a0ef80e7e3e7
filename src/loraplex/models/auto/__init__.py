"""The adapter that a prompt is for."""
