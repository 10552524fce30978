"""Feature maps fitted on calibration tokens to the exact attention."""
