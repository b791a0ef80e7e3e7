"""Scheduling: requests and sequences, who runs next, and the adapters that they hold."""
