"""Training as a service: clients send batches and optimizer steps for their own adapters, and share forward passes."""
