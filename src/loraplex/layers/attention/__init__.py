"""Attention functions in front of transformers' own."""
