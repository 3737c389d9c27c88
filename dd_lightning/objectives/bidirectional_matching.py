"""DREAM+: gradients and mean features of the synthetic images of a class should both be those of real ones."""

from collections.abc import Mapping

from torch import Tensor

from dd_lightning.execution.compile import Compile
from dd_lightning.execution.precision import Precision, in_precision
from dd_lightning.functional.distances import Metric, tensor_distance
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.policies import PolicyName
from dd_lightning.functional.products import partial_gradients_and_other
from dd_lightning.networks import FunctionalNetwork, Parameters
from dd_lightning.objectives.class_statistics import Statistics
from dd_lightning.objectives.classwise import Sampling
from dd_lightning.objectives.gradient_matching import GradientMatching
from dd_lightning.pools import NetworkPool
from dd_lightning.sets.real import RealSet


class BidirectionalMatching(GradientMatching):
    """Bidirectional matching: D(gradients) + alpha D(mean features), summed over classes (equation 3 of the paper).

    Both distances are of one metric, and both are computed in one pass on the same augmented images. Defaults are those
    of DREAM+'s public code. Both terms are logged, ``alpha`` included.

    Args:
        alpha: Weight of the features' distance; the public code has none, that is 1.
        metric: ``mse``, the sum of squares; ``l1``; ``l1_mean``; or ``cos``. The images' learning rate goes with it.
        include_classifier: Compare the gradients of linear layers too.
        include_bias: Compare those of biases and norms too.
        batch_real: Real images of a class per step.
        batch_syn: The most decoded synthetic images of a class that are matched in a step, drawn anew each time.
        augmentation: Operations, joined by ``_``, or ``"none"``. The real and the synthetic images of a class share one
            draw (siamese).
        policy: How the operations are combined: IDC's or DSA's.
        sampling: Real images ``shuffled``, or ``representative``: those nearest to the centroids of k-means on the
            features of the network that the previous step used.
        interval: Steps between two choices of representatives.
        per_cluster: Representatives of each cluster.
        compile: Compile the matching of a class: ``auto``, ``on`` or ``off``.
        precision: What the network's layers compute in: ``float32``, ``tf32`` (CUDA alone) or ``bfloat16``.

    Raises:
        InputError: If ``alpha`` is negative, a number is out of range or the augmentation unknown.

    References:
        Liu et al., DREAM+, https://arxiv.org/abs/2310.15052.
    """

    def __init__(
        self,
        alpha: float = 1.0,
        metric: Metric = "mse",
        include_classifier: bool = False,
        include_bias: bool = False,
        batch_real: int = 128,
        batch_syn: int = 128,
        augmentation: str = "color_crop_cutout",
        policy: PolicyName = "idc",
        sampling: Sampling = "representative",
        interval: int = 10,
        per_cluster: int = 1,
        compile: Compile | bool = "off",
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            metric,
            include_classifier,
            include_bias,
            batch_real,
            batch_syn,
            augmentation,
            policy,
            sampling,
            interval,
            per_cluster,
            compile,
            precision,
        )
        if not 0 <= alpha < float("inf"):
            raise InputError(f"alpha is {alpha}; the weight of the feature distance must be at least 0 (1 in DREAM+)")
        self.alpha = alpha

    @staticmethod
    def default_pool() -> NetworkPool:
        """Return a pool with one live network that has seen the real data once, DREAM+'s own rule."""
        return NetworkPool(pretrain_epochs=1)

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that the network has features, too."""
        super().check(network, real)
        network.check_features()

    def statistics(
        self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor, graph: bool
    ) -> Statistics:
        """Return the gradients, and the mean feature [F] last, from one pass through the network."""
        embed, classify = (in_precision(part, self.precision) for part in (network.features, network.classify))

        def loss_and_mean(parts: Parameters) -> tuple[Tensor, Tensor]:
            features = embed(parts, images)
            return classification_loss(classify(parts, features), targets), features.mean(0)

        gradients, mean = partial_gradients_and_other(loss_and_mean, network.split(theta), self._layers(network), graph)
        return (*gradients, mean if graph else mean.detach())

    def terms(self, synthetic: Statistics, real: Statistics) -> Mapping[str, Tensor]:
        """Return both distances."""
        return {
            **super().terms(synthetic[:-1], real[:-1]),
            "feature_distance": self.alpha * tensor_distance(synthetic[-1], real[-1], self.metric),
        }
