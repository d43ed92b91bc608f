"""All that knows DeepSpeed, and the optimizer step that runs on it."""
