"""The methods that TERACON is compared with, on one backbone: all run on packed rows."""

from __future__ import annotations

from teracon_fast.methods.base import Group, Method, Sizes, StepContext, StepResult, group
from teracon_fast.methods.conure import Conure
from teracon_fast.methods.fine_all import FineAll
from teracon_fast.methods.hat import HAT
from teracon_fast.methods.multi_task import MTL
from teracon_fast.methods.options import DeclaredOption, Option, options_of
from teracon_fast.methods.parameter_masks import ParameterMasks
from teracon_fast.methods.peterrec import PeterRec
from teracon_fast.methods.piggyback import Piggyback
from teracon_fast.methods.plugins import METHODS, load_plugin
from teracon_fast.methods.single import SinMo
from teracon_fast.methods.teracon import Teracon
from teracon_fast.model.backbone import EncodeUsers

# In the order of the paper's Table 2.
for _method in (SinMo, FineAll, PeterRec, MTL, Piggyback, HAT, Conure, Teracon, ParameterMasks):
    METHODS[_method.name] = _method

__all__ = [
    "HAT",
    "METHODS",
    "MTL",
    "Conure",
    "FineAll",
    "DeclaredOption",
    "EncodeUsers",
    "Group",
    "Method",
    "Option",
    "ParameterMasks",
    "PeterRec",
    "Piggyback",
    "SinMo",
    "Sizes",
    "StepContext",
    "StepResult",
    "Teracon",
    "group",
    "load_plugin",
    "options_of",
]
