"""Experiments that one configuration cannot describe."""
