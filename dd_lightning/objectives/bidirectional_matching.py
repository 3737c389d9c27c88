"""DREAM+: gradients and mean features of the synthetic images of a class should both be those of real ones."""

from dataclasses import dataclass

from torch import Tensor

from dd_lightning.functional.distances import tensor_distance
from dd_lightning.functional.errors import check_range
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.products import partial_gradients_and_other
from dd_lightning.networks import FunctionalNetwork, Parameters
from dd_lightning.objectives.class_statistics import Statistics, Terms
from dd_lightning.objectives.classwise import Sampling
from dd_lightning.objectives.gradient_matching import GradientMatching
from dd_lightning.pools import NetworkPool
from dd_lightning.sets.real import RealSet


@dataclass(kw_only=True, eq=False)
class BidirectionalMatching(GradientMatching):
    """Bidirectional matching: D(gradients) + alpha D(mean features), summed over classes (equation 3 of the paper).

    Both distances use one metric, and both are computed in one pass on the same augmented images. Defaults are those of
    DREAM+'s public code. Both terms are logged, ``alpha`` included.

    Args:
        alpha: Weight of the features' distance; the public code has none, that is 1.

    References:
        Liu et al., DREAM+, https://arxiv.org/abs/2310.15052.
    """

    alpha: float = 1.0
    batch_real: int = 128
    sampling: Sampling = "representative"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("alpha", self.alpha, low=0, hint="1 in DREAM+")

    @staticmethod
    def default_pool() -> NetworkPool:
        """Return a pool with one live network that has seen the real data once, DREAM+'s own rule."""
        return NetworkPool(pretrain_epochs=1)

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that the network has features, too."""
        super().check(network, real)
        network.check_features()

    def statistics(self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        """Return the gradients, and the mean feature [F] last, from one pass through the network."""

        def loss_and_mean(parts: Parameters) -> tuple[Tensor, Tensor]:
            features = network.features(parts, images)
            return classification_loss(network.classify(parts, features), targets), features.mean(0)

        gradients, mean = partial_gradients_and_other(loss_and_mean, network.split(theta), self._layers(network))
        return (*gradients, mean)

    def terms(self, synthetic: Statistics, real: Statistics) -> Terms:
        """Return both distances."""
        return {
            **super().terms(synthetic[:-1], real[:-1]),
            "feature_distance": self.alpha * tensor_distance(synthetic[-1], real[-1], self.metric),
        }
