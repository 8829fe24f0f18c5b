"""Scorers: feature -> importance. Every scorer returns `FeatureScores`."""
