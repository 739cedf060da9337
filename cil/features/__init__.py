"""Features of images: each is computed once per image and view, and can be kept on disk."""

from cil.features.cache import FeatureCache, Queried, Track, View, Viewer

__all__ = [
    "FeatureCache",
    "Queried",
    "Track",
    "View",
    "Viewer",
]
