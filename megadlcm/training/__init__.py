"""A training run: the story, the loop, and what one run needs of its own."""
