"""Training of adapters and linked residuals: many jobs at once on one frozen base model."""
