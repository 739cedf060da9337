"""Selects hyper-parameters and backbones before training, from the training images of the first tasks only."""
