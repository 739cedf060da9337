"""The tables that scripts.publish.tables makes, from runs made by hand."""

from __future__ import annotations

import json
from pathlib import Path

from comparisons import falling, write

from scripts.publish import reusing, tables


def test_a_matrix_has_classifiers_side_by_side_and_the_best_rows_first(tmp_path):
    """A_last of counts (n, n, 90) of 300: twice n, and 90."""
    for order, last in ((1, 30), (2, 60)):  # 50 % and 70 %
        write(tmp_path, "lora_opcm_lda", falling(last), order)
    write(tmp_path, "vpt_deep_ema_lda", falling(75))  # 80 %; the tuner's name has two words
    write(tmp_path, "vpt_deep_ema_ncm", falling(15))  # 40 %
    write(tmp_path, "none_frozen_ncm", falling(45)[:2])  # one stage short
    assert tables.matrix(tmp_path) == (
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
    assert tables.render(page).splitlines()[1:-1] == [
        f"<!-- matrix: {tmp_path} -->",
        "| tuner | consolidation | ridge |",
        "|---|---|---|",
        "| adapter | first | 70.0 |",
        "<!-- /table -->",
    ]


def test_settings_stand_side_by_side_and_are_paired_by_class_order(tmp_path):
    for order, last in ((1, 30), (2, 45)):  # 50 %, 60 %
        write(tmp_path, "ease", falling(last), order)
    for order, last in ((1, 60), (3, 90)):  # 70 %, 90 %; the second has no partner
        write(tmp_path, "ease_chosen", falling(last), order)
    write(tmp_path, "ncm", falling(75))  # 80 %, and nothing to choose
    write(tmp_path, "lwf_chosen", falling(30))
    write(tmp_path, "l2p", falling(45)[:2])  # one stage short: not here
    lines = tables.settings(tmp_path).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][:4] for line in lines]
    assert cells == [
        ["ease", "55.0 ± 7.1", "80.0 ± 14.1", "+20.0"],
        ["ncm", "80.0", "", ""],
        ["lwf", "", "50.0", ""],
    ]


def test_what_was_chosen_may_lie_in_folders_beside_the_defaults(tmp_path):
    """Of the chosen ones only the class order counts that the default was run on."""

    def run(place, label, last, order=1, chosen_by="first_task", **parameters):
        write(tmp_path / place, label, falling(last), order, chosen_by=chosen_by, parameters=parameters)

    for label, last in (("aper", 30), ("ease", 45), ("merge", 60), ("joint", 75), ("ncm", 15)):  # 50 % … 80 %, 40 %
        run("defaults", label, last, chosen_by="default", lr=1)
    run("a", "aper", 45, lr=2)
    run("b", "aper_adapter", 60, lr=2)  # 70 %: goes before
    for order, last in ((1, 30), (2, 90)):
        run("a", "ease", last, order, lr=2)
    run("b", "merge", 60, lr=1)  # what was chosen is the default
    run("b", "joint", 90, chosen_by="default", lr=2)  # nobody chose
    run("b", "ncm", 90, 2, lr=2)  # on another class order
    run("b", "lwf", 90)  # no default beside it
    lines = tables.settings(Path(f"{tmp_path / 'defaults'}:a,b")).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")][:4] for line in lines]
    assert cells == [
        ["joint", "80.0", "", ""],
        ["aper", "50.0", "70.0", "+20.0"],
        ["merge", "70.0", "", ""],
        ["ease", "60.0", "50.0", "-10.0"],
        ["ncm", "40.0", "", ""],
    ]


def test_differences_pair_class_orders(tmp_path):
    """Over orders 1 and 2: +10 and +30 points; the third order of one learner has no partner."""
    for order, last in ((1, 45), (2, 75)):  # 60 %, 80 %
        write(tmp_path, "bank", falling(last), order)
    for order, last in ((1, 30), (2, 30), (3, 90)):  # 50 %, 50 %, 90 %
        write(tmp_path, "ncm", falling(last), order)
    # COSTS: one pass a training image; 200 passes over the first stage's 100 test images; 1 MiB
    assert tables.differences(Path(f"{tmp_path}:ncm")) == (
        "| learner | A_last % | less ncm | passes per training image | per new image | MiB kept |\n"
        "|---|---|---|---|---|---|\n"
        "| bank | 70.0 ± 14.1 | +20.0 ± 14.1 | 1.0 | 2 | 1.0 |\n"
        "| ncm | 63.3 ± 23.1 |  | 1.0 | 2 | 1.0 |\n"
    )


def test_a_learner_beside_the_best_other_one_of_every_stream(tmp_path):
    """Who keeps images, or lacks a class order, is not the best other; runs of one stream may be in two folders."""
    for order, last in ((1, 45), (2, 75)):  # 60 %, 80 %
        write(tmp_path / "a", "ours", falling(last), order)
    for order, last in ((1, 30), (2, 30), (3, 90)):  # 50 %, 50 %, 90 %
        write(tmp_path / "b", "ncm", falling(last), order)
    for order in (1, 2):
        write(tmp_path / "a", "poor", falling(15), order)
        write(tmp_path / "a", "joint", falling(90), order, stores_images=True)
    write(tmp_path / "a", "once", falling(90), 1)
    lines = tables.leads.table(Path(f"{tmp_path}:ours:a,a+b")).splitlines()
    # 300 test images: √(0.7 · 0.3 / 300) = 2.6 %
    assert lines[2] == "| a | 70.0 ± 14.1 | poor | 40.0 ± 0.0 | +30.0 ± 14.1 | 2.6 | 1.0 | 1.0 | 2 | 2 | 180 | 180 |"
    assert lines[3] == "| a | 70.0 ± 14.1 | ncm | 63.3 ± 23.1 | +20.0 ± 14.1 | 2.6 | 1.0 | 1.0 | 2 | 2 | 180 | 180 |"
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")


def test_ways_are_paired_with_the_plain_learner_and_shown_if_all_orders_are_there(tmp_path):
    def of(*last):
        runs = zip((1, 2), last, strict=False)
        return {str(order): {"accuracy_last": value, "forgetting": 1 - 2 * value} for order, value in runs}

    runs = {"digits finetune plain": of(0.5, 0.6), "digits finetune bss": of(0.52, 0.66), "digits finetune l2": of(0.9)}
    choices = {f"digits finetune {way}": {"weight": 0.001} for way in ("bss", "l2", "plain")}
    found = {"orders": [1, 2], "learners": {"finetune": {}, "ssiat": {}}, "choices": choices, "runs": runs}
    (tmp_path / "r.json").write_text(json.dumps(found), encoding="utf-8")
    assert reusing.table(tmp_path / "r.json" / "digits").splitlines()[2:] == [
        "| plain | rate 0.001 | 55.0 ± 7.1 |  |  |",
        "| `bss` | 0.001 | 59.0 ± 9.9 | +4.0 ± 2.8 | -8.0 ± 5.7 |",
    ]
