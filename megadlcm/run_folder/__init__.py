"""What a run leaves behind, for the run itself and for those who look at it; imports no torch."""
