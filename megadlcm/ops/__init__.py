"""Formulas: pure functions of tensors, each with a reference that runs on any device."""
