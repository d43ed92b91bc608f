"""The commands of `megadlcm data`."""
