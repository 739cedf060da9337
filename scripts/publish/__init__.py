"""Runs the published experiments and writes the tables, numbers and figures of README.md, docs/ and results/."""
