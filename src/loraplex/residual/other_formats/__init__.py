"""Residuals in the formats of other projects: control vectors in GGUF, pyreft's interventions, PEFT's IA3."""
