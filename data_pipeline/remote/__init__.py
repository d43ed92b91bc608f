"""Shard folders by URL: any file system of fsspec, through a bounded cache of whole shards."""
