"""Sampling parameters, and the sampler that chooses tokens from logits."""
