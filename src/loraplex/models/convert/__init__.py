"""Adapters and links in other formats, and merged into their base."""
