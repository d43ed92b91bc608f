"""From nothing to a trained, evaluated DLCM on a laptop."""
