"""The watch over processes that do not come: heartbeats, and a watchdog on one's own waiting."""
