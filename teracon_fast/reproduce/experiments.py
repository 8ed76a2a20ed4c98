"""The paper's tables and figures, each as what is trained for it: methods, and variants of the sequence or of a setting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Quantity = Literal["metric", "bwt", "fwt", "change", "seconds"]
Watch = Literal["none", "last", "all"]
CONTINUAL = ("hat", "conure", "teracon")  # the methods of Tables 3 and 4


@dataclass(frozen=True)
class Variant:
    """One way in which the methods of an experiment learn the tasks.

    Attributes:
        key: as in paper.toml; "" for the only one.
        label: name of the row; "": the method's.
        options: of the method, by name.
        reverse: the tasks are in the paper's reversed order, or in the order that was asked for.
        noise: with the noisy task.
    """

    key: str = ""
    label: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    reverse: bool = False
    noise: bool = False


@dataclass(frozen=True)
class Experiment:
    """A table or figure of the paper.

    Attributes:
        name: as on the command line.
        title: what it shows.
        methods: of the paper, by their names in `methods.METHODS`.
        variants: each is trained for each method.
        quantities: printed for each task; the second in brackets after the first.
        columns: whether each quantity has a column of its own instead.
        single: SinMo is trained too, in the original order, as the baseline of FWT.
        plain: methods are trained without the noisy task too, as the baseline of changes.
        watch: tasks whose test metric is measured after every epoch.
        held_back: the sequence ends with the held-back task.
    """

    name: str
    title: str
    methods: tuple[str, ...]
    variants: tuple[Variant, ...] = (Variant(),)
    quantities: tuple[Quantity, ...] = ("metric",)
    columns: bool = False
    single: bool = False
    plain: bool = False
    watch: Watch = "none"
    held_back: bool = False

    @property
    def is_figure(self) -> bool:
        return self.watch != "none"


_ALL = (
    Experiment(
        "table2", "Table 2: performance over all tasks, after the last",
        ("sinmo", "fine_all", "peterrec", "mtl", "piggyback", *CONTINUAL),
    ),
    Experiment(
        "table3", "Table 3: original and reversed order of tasks", CONTINUAL,
        (Variant("original", "original"), Variant("reversed", "reversed", reverse=True)),
        ("metric", "bwt", "fwt"), columns=True, single=True,
    ),
    Experiment(
        "table4", "Table 4: a noisy task in the sequence (in brackets the change against the sequence without it)", CONTINUAL,
        (Variant(noise=True),), ("metric", "change"), plain=True,
    ),
    Experiment(
        "table5", "Table 5: masking strategies (BWT in brackets)", ("teracon",),
        (
            Variant("none", "w/o relation", {"mask": "none"}),
            Variant("positive_only", "only positive", {"mask": "positive_only"}),
            Variant("relation", "relation-aware", {"mask": "relation"}),
        ),
        ("metric", "bwt"),
    ),
    Experiment(
        "table6", "Table 6: sampling strategies (seconds per epoch in brackets)", ("teracon",),
        (
            Variant("minimum", "rho = rho_min", {"sampling": "minimum"}),
            Variant("adaptive", "rho = Eq. 15", {"sampling": "adaptive"}),
            Variant("all", "rho = 1.0", {"sampling": "all"}),
        ),
        ("metric", "seconds"),
    ),
    Experiment(
        "figure2", "Figure 2: adaptation to a held-back task, test metric after each epoch",
        ("sinmo", *CONTINUAL), watch="last", held_back=True,
    ),
    Experiment(
        "figure3", "Figure 3: masks on parameters and on outputs, test metric after each epoch",
        ("parameter_masks", "teracon"), watch="all",
    ),
)  # fmt: skip

EXPERIMENTS: dict[str, Experiment] = {experiment.name: experiment for experiment in _ALL}

# How the paper writes the methods.
TITLES = {
    "sinmo": "SinMo",
    "fine_all": "FineAll",
    "peterrec": "PeterRec",
    "mtl": "MTL",
    "piggyback": "Piggyback",
    "hat": "HAT",
    "conure": "CONURE",
    "teracon": "TERACON",
    "parameter_masks": "Parameter",
}
