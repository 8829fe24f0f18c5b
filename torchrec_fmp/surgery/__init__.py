"""From a model and a selection to the smaller model and the `CutMap`."""
