"""Merging rules: models that were fine-tuned one after the other become one model.

State dicts go in, a state dict comes out::

    from cil.merging import OPCM

    rule = OPCM(alpha=0.5).start(pretrained)  # name → Tensor
    for finetuned in tasks:                    # each fine-tuned from the pre-trained weights
        rule.add(finetuned)
    model.load_state_dict(rule.merged())

``cil list rules`` lists the rules. What a rule needs and keeps, and whether the order of the tasks matters, are
attributes of its class: ``needs``, ``state_size``, ``order_free``. Memory is constant except for rules that need all
updates at once (``grows``): these are read from a bank of low-rank factors (:class:`ExpertBank`), as are models for
single tasks (:class:`ExpertRule`).

All rules process tensors one by one, so ``cil merge`` holds one tensor of base, task and state at a time, plus
intermediate results. Memory is therefore O(largest tensor) for every rule, where "tensor" includes a layer's Gram
matrix for the two rules that need one. Finalisers (:class:`NormMatching`, :class:`LiNeS`) act on the merged update
whenever it is read, and are never part of the state.
"""

from cil.merging.bank import ExpertBank
from cil.merging.base import Rule
from cil.merging.configs import RuleConfig, build_rule
from cil.merging.consensus import Consensus
from cil.merging.dare import DARE, DareTIES
from cil.merging.experts import EMR, TALL, TSVC, ExpertRule, Own, Twin
from cil.merging.finalisers import Finaliser, LiNeS, NormMatching
from cil.merging.fisher import Fisher
from cil.merging.iso_c import IsoC
from cil.merging.iso_cts import IsoCTS
from cil.merging.layout import HEADS, Entry, Layout, layout
from cil.merging.linear import EMA, Average, TaskArithmetic, WiseFT
from cil.merging.magmax import MagMax
from cil.merging.nufilt import NUFILT
from cil.merging.opcm import OPCM
from cil.merging.regmean import GramMerge, RegMean
from cil.merging.store import Store
from cil.merging.ties import TIES, ContinualTIES
from cil.merging.tsv_m import TSVM
from cil.merging.wudi import WUDI

__all__ = [
    "DARE",
    "EMA",
    "EMR",
    "HEADS",
    "NUFILT",
    "OPCM",
    "TALL",
    "TIES",
    "TSVC",
    "TSVM",
    "WUDI",
    "Average",
    "Consensus",
    "ContinualTIES",
    "DareTIES",
    "Entry",
    "ExpertBank",
    "ExpertRule",
    "Finaliser",
    "Fisher",
    "GramMerge",
    "IsoC",
    "IsoCTS",
    "Layout",
    "LiNeS",
    "MagMax",
    "NormMatching",
    "Own",
    "RegMean",
    "Rule",
    "RuleConfig",
    "Store",
    "TaskArithmetic",
    "Twin",
    "WiseFT",
    "build_rule",
    "layout",
]
