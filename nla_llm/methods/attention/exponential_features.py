"""Random features with parameters from the data: generalised exponential features and their relatives."""
