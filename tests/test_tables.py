"""The tables that scripts/tables.py makes, from runs made by hand."""

from __future__ import annotations

import runpy
from pathlib import Path

from comparisons import falling, write

TABLES = runpy.run_path(str(Path(__file__).parent.parent / "scripts" / "tables.py"))


def test_a_matrix_has_classifiers_side_by_side_and_the_best_rows_first(tmp_path):
    """A_last of counts (n, n, 90) of 300: twice n, and 90."""
    for order, last in ((1, 30), (2, 60)):  # 50 % and 70 %
        write(tmp_path, "lora_opcm_lda", falling(last), order)
    write(tmp_path, "vpt_deep_ema_lda", falling(75))  # 80 %; the tuner's name has two words
    write(tmp_path, "vpt_deep_ema_ncm", falling(15))  # 40 %
    write(tmp_path, "none_frozen_ncm", falling(45)[:2])  # one stage short
    assert TABLES["matrix"](tmp_path) == (
        "| tuner | consolidation | lda | ncm |\n"
        "|---|---|---|---|\n"
        "| vpt_deep | ema | 80.0 | 40.0 |\n"
        "| lora | opcm | 60.0 ± 14.1 |  |\n"
        "| none | frozen |  |  |\n"
    )


def test_a_page_names_the_matrix_it_shows(tmp_path):
    write(tmp_path, "adapter_first_ridge", falling(60))
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- matrix: {tmp_path} -->\nold\n<!-- /table -->\nafter\n", encoding="utf-8")
    assert TABLES["render"](page).splitlines()[1:-1] == [
        f"<!-- matrix: {tmp_path} -->",
        "| tuner | consolidation | ridge |",
        "|---|---|---|",
        "| adapter | first | 70.0 |",
        "<!-- /table -->",
    ]
