"""Hard concrete gates on the features of a TorchRec model."""
