"""Ways to start a run."""
