"""Rows to batches: data sets, readers, synthetic data, and the preparation of raw files."""
