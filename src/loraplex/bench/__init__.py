"""Benchmarks that users can run: workloads, measures, and what is told about them."""
