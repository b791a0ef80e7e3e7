"""X-LoRA inside transformers' forward and generate: two passes around every call of the base model."""
