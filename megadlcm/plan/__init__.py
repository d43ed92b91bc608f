"""What a run costs and how it is spread, before ranks exist; imports no torch."""
