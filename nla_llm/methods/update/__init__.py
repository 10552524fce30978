"""Methods for weight updates."""
