"""Modules and layers of the base model that compiled calls run: found by what they compute, checked, and given back."""
