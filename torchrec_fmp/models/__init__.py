"""The backbones that the command line trains, built on TorchRec's modules."""
