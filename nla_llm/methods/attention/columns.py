"""Column methods: Cholesky with random pivots and column-row decompositions of the kernel."""
