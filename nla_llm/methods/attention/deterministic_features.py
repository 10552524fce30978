"""Deterministic feature maps: cosine reweighting, Taylor and polynomial features."""
