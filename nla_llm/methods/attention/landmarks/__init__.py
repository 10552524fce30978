"""A small core between two factors: landmarks, columns, clusters, projections along the sequence."""
