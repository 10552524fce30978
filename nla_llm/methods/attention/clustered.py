"""Clustered attention: queries share the attention of the centre of their cluster."""
