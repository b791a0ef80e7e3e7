"""X-LoRA: a scaling head gates the experts of a mixture, token by token and layer by layer."""
