"""Sampled keys: softmax over a weighted or thinned sample of the keys."""
