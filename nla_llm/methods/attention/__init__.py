"""Methods for attention: yardsticks, kernel features, random features."""
