"""What a checkout has beside the package, run from its top folder: ``python -m scripts.publish.tables``.

``publish`` makes runs, tables and figures below results/; ``bench`` measures speed and memory; ``studies`` compares
settings; ``pretraining`` made the shipped weights; ``ci`` tests the lowest versions of the dependencies.
"""

from pathlib import Path

ROOT = Path(__file__).parent.parent
"""The top folder of the checkout."""
