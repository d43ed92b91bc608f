"""What is in a shard folder, whether it is what was written, and what a run makes of it."""
