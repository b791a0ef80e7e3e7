"""What every training run has: train state, checkpoint, random numbers, processes, logs."""
