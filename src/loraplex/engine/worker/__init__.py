"""The model runner: input batches, attention, routing and captures of one forward pass."""
