"""Randomised attention: importance-sampled estimators and control variates."""
