"""The bytes of a shard folder: index, records, tables."""
