"""Tencent TL (TTL), the published files: one task per file, in the paper's order."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

from teracon_fast.data.prepare.assemble import summarize
from teracon_fast.data.prepare.preparer import Summary, WriterOptions
from teracon_fast.data.published_csv import read_sequences_csv
from teracon_fast.data.store import DatasetWriter
from teracon_fast.data.task_files import Unseen
from teracon_fast.errors import DataError

TASK_FILES = {
    "watching": "original_desen_pretrain.csv",
    "clicking": "original_desen_finetune_click_nouserID.csv",
    "thumb-up": "original_desen_finetune_like_nouserID.csv",
    "age": "original_desen_age.csv",
    "gender": "original_desen_gender.csv",
    "life_status": "original_desen_lifestatus.csv",
}
"""Task name -> published file name, in the order of the paper's Table 1."""


def prepare_ttl(
    source: Path,
    output: Path,
    writer: WriterOptions,
    *,
    length: int | None = None,
    unseen: Unseen = "error",
) -> Summary:
    """Tencent TL, published files: watching, clicking, thumb-up, age, gender, life status; tasks without a file are skipped.

    T1 is `original_desen_pretrain.csv`, one sequence per line; later files have `sequence,,label[,label...]` lines, and each
    label is a sample. The files do not name users, so each line is its own user: a split by user keeps the labels of a line
    together, but cannot join lines of different files.

    Args:
        source: folder with the files.
        output: prepared folder to create.
        writer: passed to the `DatasetWriter`.
        length: items per row; shorter lines are padded on the left, longer ones truncated to their newest items. None: all lines
            must be as long as the first, as in the published files.
        unseen: an item of a later file that T1 does not have is refused ("error"), replaced by the pad ("pad") or removed
            ("drop").

    Raises:
        DataError: the first file is missing, or a line is malformed; names file and line.
    """
    folder = Path(source)
    present = {name: folder / file for name, file in TASK_FILES.items() if (folder / file).is_file()}
    if "watching" not in present:
        raise DataError(folder / TASK_FILES["watching"], "no such file; expected the first task, whose items the others need")
    notes = [f"task {name} skipped: no {file}" for name, file in TASK_FILES.items() if name not in present]
    about = {"preparer": "ttl", "files": {name: path.name for name, path in present.items()}, "notes": notes}
    with DatasetWriter(output, "ttl", length, about, **asdict(writer)) as data:
        for name, path in present.items():
            first = name == "watching"
            pad: Literal["none", "left"] = "none" if length is None else "left"
            blocks = read_sequences_csv(path, labels=not first, length=data.length, pad=pad)
            data.add_task(name, "next_item" if first else "label", blocks, unseen=unseen)
    return summarize(output, notes)
