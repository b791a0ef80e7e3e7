"""Training of mixtures: a scaling head on frozen experts, or with them."""
