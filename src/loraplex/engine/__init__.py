"""Continuous batching: requests that each have their own adapters share forward passes as they come and go."""
