"""What a result is worth: metrics with intervals, sample quality, calibration, rivals."""
