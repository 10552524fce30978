"""Attention on a sample of the keys, with the weights that make it an estimate of the whole."""
