"""Supervised pre-training of a small, plain timm ``VisionTransformer`` on a few CPU cores."""
