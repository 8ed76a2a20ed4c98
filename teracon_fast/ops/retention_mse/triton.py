"""`retention_mse` by Triton kernels. The `triton` backend."""

from __future__ import annotations

from torch import Tensor

from teracon_fast.ops.retention_mse.torch import Needs, Result


def distance(
    student_hidden: Tensor, weight: Tensor, bias: Tensor, teacher_hidden: Tensor, teacher_weight: Tensor, teacher_bias: Tensor,
    coefficient: Tensor, valid: Tensor | None, form: str, needs: Needs, factored: bool,
) -> Result:  # fmt: skip
    """As `_torch_retention_mse.distance`."""
    assert not factored
    from teracon_fast.kernels import retention_mse as kernels
    from teracon_fast.kernels.tiles import dot_precision

    loss, *gradients = kernels.forward_backward(
        student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, coefficient, any(needs), valid,
        dot_precision(student_hidden.device),
    )
    d_hidden, d_weight, d_bias = (g if need else g.new_empty(0) for g, need in zip(gradients, needs, strict=True))
    return loss, d_hidden, d_weight, d_bias
