"""What input files may look like: a format is a file here and a row of known.py."""
