"""Mixtures at rest: PEFT's layout and the original package's, in and out."""
