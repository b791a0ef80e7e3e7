"""The forward and backward pass of a training batch: routing, shared prefixes, loss and gradients."""
