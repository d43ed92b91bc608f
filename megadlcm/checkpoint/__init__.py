"""Checkpoints: what a run saves, and how it goes on from there."""
