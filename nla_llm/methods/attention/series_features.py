"""Random features from the power series of the exponential: random Maclaurin and Poisson features."""
