"""Measurements of speed and memory; each writes JSON and, most of them, a figure to results/bench."""
