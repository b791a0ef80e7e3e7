"""Weights at rest: PEFT folders in and out, and the tiered store."""
