"""DM: the synthetic images of a class should have the mean feature of its real images."""

from collections.abc import Mapping

import torch
from torch import Tensor

from dd_lightning.execution.compile import Compile
from dd_lightning.execution.precision import Precision, in_precision
from dd_lightning.functional.distances import Metric, tensor_distance
from dd_lightning.functional.policies import PolicyName
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives.class_statistics import Statistics
from dd_lightning.objectives.classwise import ClasswiseMatching, Sampling
from dd_lightning.pools import NetworkPool
from dd_lightning.sets.real import RealSet


class DistributionMatching(ClasswiseMatching):
    """Distribution matching: the sum over classes of the distance between mean features of S and of T.

    Defaults are those of the public code. Its networks are never trained: each one in the pool lives for one step.

    Args:
        metric: ``mse``, the sum of squares; ``l1``; ``l1_mean``; or ``cos``. The images' learning rate goes with it.
        batch_real: Real images of a class per step; 256 in DM.
        batch_syn: The most decoded synthetic images of a class that are matched in a step, drawn anew each time.
        augmentation: Operations, joined by ``_``, or ``"none"``. The real and the synthetic images of a class share one
            draw (siamese).
        policy: How the operations are combined: IDC's or DSA's.
        sampling: Real images ``shuffled``, or ``representative``: those nearest to the centroids of k-means on the
            features of the network that the previous step used (DREAM).
        interval: Steps between two choices of representatives; 10 in DREAM.
        per_cluster: Representatives of each cluster; 1 in DREAM.
        compile: Compile the matching of a class: ``auto``, ``on`` or ``off``.
        precision: What the network's layers compute in: ``float32``, ``tf32`` (CUDA alone) or ``bfloat16``.

    Raises:
        InputError: If a number is out of range or the augmentation unknown.

    References:
        Zhao and Bilen, Dataset Condensation with Distribution Matching, https://arxiv.org/abs/2110.04181; code:
        https://github.com/VICO-UoE/DatasetCondensation/blob/53f63a6/main_DM.py.
    """

    def __init__(
        self,
        metric: Metric = "mse",
        batch_real: int = 256,
        batch_syn: int = 128,
        augmentation: str = "color_crop_cutout_flip_scale_rotate",
        policy: PolicyName = "dsa",
        sampling: Sampling = "shuffled",
        interval: int = 10,
        per_cluster: int = 1,
        compile: Compile | bool = "off",
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            batch_real, batch_syn, augmentation, policy, sampling, interval, per_cluster, compile, precision
        )
        self.metric: Metric = metric

    @staticmethod
    def default_pool() -> NetworkPool:
        """Return a pool with a fresh network for every step."""
        return NetworkPool(age_limit=1)

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that the network has features, too."""
        super().check(network, real)
        network.check_features()

    def statistics(
        self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor, graph: bool
    ) -> Statistics:
        """Return the mean feature, [F]."""
        del targets
        features = in_precision(network.features, self.precision)
        with torch.set_grad_enabled(graph):
            return (features(theta, images).mean(0),)

    def terms(self, synthetic: Statistics, real: Statistics) -> Mapping[str, Tensor]:
        """Return the distance of the mean features."""
        return {"feature_distance": tensor_distance(synthetic[0], real[0], self.metric)}
