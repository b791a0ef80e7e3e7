"""TGI's and LoRAX's API: its bodies, and an answer in its shapes."""
