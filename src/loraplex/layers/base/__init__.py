"""The base model's modules as adapters see them, and what runs beside them."""
