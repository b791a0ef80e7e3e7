"""PEFT's format: settings and tensors, read, checked and written."""
