"""The commands of calibration: calibrate, tune, sweep, report."""
