"""Classification losses shared by students, experts and evaluation networks."""

from torch import Tensor
from torch.nn import functional as F  # noqa: N812  (the ecosystem's name for it)


def classification_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits [B, C], a scalar.

    Targets are class indices, [B], or label logits, [B, C], whose softmax is the target distribution (DATM).
    """
    if targets.is_floating_point():
        targets = targets.softmax(dim=1)
    return F.cross_entropy(logits, targets)
