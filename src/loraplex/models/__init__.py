"""The base model with its adapters: MultiLoraModel."""
