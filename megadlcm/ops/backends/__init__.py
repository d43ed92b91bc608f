"""Attention back-ends, one file for each row of `config.kernels.ATTENTION_BACKENDS`."""
