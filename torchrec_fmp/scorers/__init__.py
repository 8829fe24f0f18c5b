"""Scorers: feature -> importance. Every scorer gives the same `FeatureScores`."""
