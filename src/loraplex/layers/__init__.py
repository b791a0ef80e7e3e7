"""The gated LoRA layer and its attachment to a transformers model."""
