"""Measurements: speed as ratios within one run, quality over seeds."""
