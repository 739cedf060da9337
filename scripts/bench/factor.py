"""RanPAC's factor of G + λI: seconds to factor the matrix again, and to update the factor by new rows; writes JSON.

The update is LAPACK's ``dtpqrt``, the blocked QR decomposition of [R; H] for an upper triangle R [M, M] and new rows
H [n, M]. It is possible only while λ stays the same. Seconds are processor time on one thread.

    python -m scripts.bench.factor
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.linalg.lapack import dtpqrt
from threadpoolctl import threadpool_limits

from cil.runner.checkpoint import to_json
from cil.runner.provenance import versions
from cil.utils import hardware
from cil.utils.linalg import shifted_cholesky
from scripts import ROOT
from scripts.bench.growth import timed

BLOCK = 64
"""Columns of a block of the update."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--projection", type=int, default=10_000, help="M")
    parser.add_argument("--rows", type=int, nargs="+", default=[500, 2000], help="new rows per stage")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "bench" / "factor.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    m, rng = given.projection, np.random.default_rng(0)
    # well conditioned, and cheap to make: what a factorisation costs does not depend on the numbers
    first = rng.standard_normal((min(m, 500), m), dtype=np.float32).astype(np.float64)
    gram = [torch.from_numpy(first.T @ first)]
    again, (factor, _) = timed(lambda: shifted_cholesky(gram.pop, 1.0))
    found: dict[str, Any] = {"projection": m, "block": BLOCK, "seconds_again": again, "updates": {}}
    for n in given.rows:
        rows = rng.standard_normal((n, m), dtype=np.float32).astype(np.float64)
        upper, new = factor.numpy().T.copy(order="F"), np.asfortranarray(rows)
        with threadpool_limits(1):  # scipy's own BLAS
            seconds, (upper, _, _, failed) = timed(partial(dtpqrt, 0, BLOCK, upper, new, overwrite_a=1, overwrite_b=1))
        # the first column of RᵀR, which tells whether this is the factor of the new matrix
        expected = first.T @ first[:, 0] + rows.T @ rows[:, 0]
        expected[0] += 1
        error = float(np.abs(upper.T[:, :1] @ upper[:1, 0] - expected).max() / np.abs(expected).max())
        found["updates"][str(n)] = {"seconds": seconds, "failed": int(failed), "error": error}
        print(n, found["updates"][str(n)], f"again {again:.1f} s", flush=True)
    facts = {"machine": hardware.facts(hardware.accelerator("cpu")), "versions": versions()}
    given.out.write_text(to_json({**facts, **found}), encoding="utf-8")


if __name__ == "__main__":
    main()
