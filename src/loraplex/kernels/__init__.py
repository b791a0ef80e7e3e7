"""Tensors in, tensors out: the gated multi-adapter kernels."""
