"""Methods for attention: the yardsticks, and one package for each family."""
