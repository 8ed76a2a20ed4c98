"""The methods that TERACON is compared with, on one backbone: all run on packed rows."""

from __future__ import annotations

from teracon_fast.methods.base import Group, Method, Place, Sizes, group
from teracon_fast.methods.parameter_masks import ParameterMasks
from teracon_fast.methods.peterrec import PeterRec
from teracon_fast.methods.single import SinMo
from teracon_fast.methods.teracon import Teracon

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        SinMo,
        PeterRec,
        Teracon,
        ParameterMasks,
    )
}  # fmt: skip

__all__ = [
    "METHODS",
    "Group",
    "Method",
    "ParameterMasks",
    "PeterRec",
    "Place",
    "SinMo",
    "Sizes",
    "Teracon",
    "group",
]
