"""A trained model at work: decoding, held-out evaluation, texts with their concepts marked."""
