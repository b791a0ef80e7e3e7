"""Training of one-pass mixtures: linear routers, alone, with their experts, or taught by an X-LoRA."""
