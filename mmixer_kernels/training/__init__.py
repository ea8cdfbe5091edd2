"""Training: options, loop, checkpoints, metrics, plots."""
