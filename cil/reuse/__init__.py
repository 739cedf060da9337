"""Stored runs as parts of new models: joined into one, and found by the images that they fit."""
