"""Modules whose weights another library quantized."""
