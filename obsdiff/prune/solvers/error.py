"""How much of a layer's output a pruned weight loses."""

import torch
from torch import Tensor


def relative_error(weight: Tensor, pruned: Tensor, hessian: Tensor) -> float:
    """sqrt(tr((W − Ŵ) H (W − Ŵ)ᵀ) / tr(W H Wᵀ)); 0 where the layer puts out nothing anyway."""
    weight, difference = weight.float(), (weight.float() - pruned.float())
    lost = ((difference @ hessian) * difference).sum(dtype=torch.float64)
    total = ((weight @ hessian) * weight).sum(dtype=torch.float64)
    return float((lost.clamp(min=0) / total).sqrt()) if total > 0 else 0.0
