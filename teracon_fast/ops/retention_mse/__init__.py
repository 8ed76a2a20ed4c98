"""Knowledge retention: squared distance between the student"s and the teacher"s logits of every past task."""

from teracon_fast.ops.retention_mse.api import retention_mse

__all__ = ["retention_mse"]
