"""From shard folders to packed batches in an exact order."""
