"""What knows of ranks: the processes of a run and how a model is spread over them."""
