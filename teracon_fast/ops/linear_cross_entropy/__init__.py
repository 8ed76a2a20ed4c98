"""Cross-entropy of a linear head, where many targets may share one row of hidden states."""

from teracon_fast.ops.linear_cross_entropy.api import CrossEntropy, linear_cross_entropy

__all__ = ["CrossEntropy", "linear_cross_entropy"]
