"""Models fine-tuned one after the other become one model, in constant memory. State dicts in, a state dict out.

::

    from cil.merging import OPCM

    rule = OPCM(alpha=0.5).start(pretrained)  # name → Tensor
    for finetuned in tasks:                    # each fine-tuned from the pre-trained weights
        rule.add(finetuned)
    model.load_state_dict(rule.merged())

=================== ============================================= ============ =============== ==================
rule                what                                          order-free   state           needs
=================== ============================================= ============ =============== ==================
average             running mean                                  yes          P
wise_ft             interpolation with each new model             no           P
ema                 the same, but the first model as it is        no           P
task_arithmetic     scaled sum of updates                         yes          P
ties                trim, elect a sign, merge                     yes          2 P (others 4)
continual_ties      TIES of merged and new, as published          no           P
magmax              largest change of every weight                yes, but ties P
dare, dare_ties     random drop, then a sum or TIES               no (masks)   P, 2 P
fisher              weighted by Fisher information                yes          2 P             Fisher
regmean             least squares on layer outputs                yes          P + Grams, f64  Gram matrices
gram_merge          RegMean, depth slope, capped norm             yes          P + Grams, f64  Gram matrices
iso_c               mean update, equal singular values            yes          P
nufilt              updates where old ones do not act             no           P
opcm                projected sum at the mean norm                no           P
=================== ============================================= ============ =============== ==================

P is the number of merged weights, in the computing dtype. All rules walk over tensors one by one, so ``cil merge``
holds one tensor of base, task and state at a time, and what the rule makes of it: O(largest tensor) of memory for every
rule, where "tensor" includes a layer's Gram matrix for the two that have one. Finalisers (:class:`NormMatching`,
:class:`LiNeS`) act on the merged update at read-out and are never part of the state.
"""

from cil.merging.base import Rule
from cil.merging.dare import DARE, DareTIES
from cil.merging.finalisers import Finaliser, LiNeS, NormMatching
from cil.merging.fisher import Fisher
from cil.merging.layout import HEADS, Entry, Layout, layout
from cil.merging.linear import EMA, Average, TaskArithmetic, WiseFT
from cil.merging.magmax import MagMax
from cil.merging.nufilt import NUFILT
from cil.merging.opcm import OPCM
from cil.merging.regmean import GramMerge, RegMean
from cil.merging.spectral import IsoC
from cil.merging.store import Store
from cil.merging.table import RuleConfig, build_rule
from cil.merging.ties import TIES, ContinualTIES

__all__ = [
    "DARE",
    "EMA",
    "HEADS",
    "NUFILT",
    "OPCM",
    "TIES",
    "Average",
    "ContinualTIES",
    "DareTIES",
    "Entry",
    "Finaliser",
    "Fisher",
    "GramMerge",
    "IsoC",
    "Layout",
    "LiNeS",
    "MagMax",
    "NormMatching",
    "RegMean",
    "Rule",
    "RuleConfig",
    "Store",
    "TaskArithmetic",
    "WiseFT",
    "build_rule",
    "layout",
]
