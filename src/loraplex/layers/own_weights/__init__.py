"""Modules' own weights that adapters bring or change."""
