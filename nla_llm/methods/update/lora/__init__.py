"""Low-rank adaptation: a product of two thin factors, its starts, optimisers, costs and budgets."""
