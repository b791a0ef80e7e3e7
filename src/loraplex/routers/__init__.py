"""Mixtures whose gates each LoRA layer reads from its own input, in the one pass that there is."""
