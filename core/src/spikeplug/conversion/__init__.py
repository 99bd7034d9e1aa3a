"""Conversion: planned, checked, applied, calibrated and verified. Imports nothing by itself."""
