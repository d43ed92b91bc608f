"""Where shards lie: local folders, remote ones and their cache, and locks on files."""
