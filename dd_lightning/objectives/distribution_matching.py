"""DM: the synthetic images of a class should have the mean feature of its real images."""

from dataclasses import dataclass

from torch import Tensor

from dd_lightning.functional.distances import Metric, tensor_distance
from dd_lightning.functional.policies import PolicyName
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives.class_statistics import Statistics, Terms
from dd_lightning.objectives.classwise import ClasswiseMatching
from dd_lightning.pools import NetworkPool
from dd_lightning.sets.real import RealSet


@dataclass(kw_only=True, eq=False)
class DistributionMatching(ClasswiseMatching):
    """Distribution matching: the sum over classes of the distance between mean features of S and of T.

    Defaults are those of the public code. Its networks are never trained: each one in the pool lives for one step.

    Args:
        metric: ``mse``, the sum of squares; ``l1``; ``l1_mean``; or ``cos``. The images' learning rate goes with it.

    References:
        Zhao and Bilen, Dataset Condensation with Distribution Matching, https://arxiv.org/abs/2110.04181; code:
        https://github.com/VICO-UoE/DatasetCondensation/blob/53f63a6/main_DM.py.
    """

    metric: Metric = "mse"
    batch_real: int = 256
    augmentation: str = "color_crop_cutout_flip_scale_rotate"
    policy: PolicyName = "dsa"

    @staticmethod
    def default_pool() -> NetworkPool:
        """Return a pool with a fresh network for every step."""
        return NetworkPool(age_limit=1)

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that the network has features, too."""
        super().check(network, real)
        network.check_features()

    def statistics(self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        """Return the mean feature, [F]."""
        del targets
        return (network.features(theta, images).mean(0),)

    def terms(self, synthetic: Statistics, real: Statistics) -> Terms:
        """Return the distance of the mean features."""
        return {"feature_distance": tensor_distance(synthetic[0], real[0], self.metric)}
