"""Base models from aliases, folders, the hub and GGUF files, quantized or not."""
