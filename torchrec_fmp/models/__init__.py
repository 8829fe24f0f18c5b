"""The backbones that the command line trains, on TorchRec's own modules."""
