"""Preparers: raw downloads -> a prepared task sequence. `PREPARERS` are those of `teracon prepare NAME`."""

from teracon_fast.data.prepare.preparer import Option, Preparer, Summary, TaskSummary

PREPARERS: dict[str, Preparer] = {name: Preparer(name) for name in ("movielens", "ttl", "completejourney", "events")}

__all__ = ["PREPARERS", "Option", "Preparer", "Summary", "TaskSummary"]
