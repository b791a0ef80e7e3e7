"""The gated multi-adapter kernels for a GPU, in Triton.

`available` and `work` import without triton; the other modules import it, so only what has asked `available` imports
them.
"""
