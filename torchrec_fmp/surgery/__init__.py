"""Makes the smaller model and its `CutMap` from a model and a selection."""
