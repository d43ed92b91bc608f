"""Training: state, objective, optimizer, engine, step, loop, checkpoints, metrics."""
