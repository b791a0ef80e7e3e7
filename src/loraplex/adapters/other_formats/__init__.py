"""LoRA adapters in formats other than PEFT's safetensors folder, read to be converted."""
