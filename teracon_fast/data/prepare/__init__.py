"""Preparers: raw downloads -> a prepared task sequence. `PREPARERS` is what `teracon prepare NAME SOURCE OUTPUT` chooses from."""

from teracon_fast.data.prepare.preparer import Option, Preparer, Summary, TaskSummary

PREPARERS: dict[str, Preparer] = {name: Preparer(name) for name in ("movielens", "ttl", "completejourney", "events")}

__all__ = ["PREPARERS", "Option", "Preparer", "Summary", "TaskSummary"]
