"""IDC: the synthetic images of a class should move a network as its real images do."""

from dataclasses import dataclass

from torch import Tensor

from dd_lightning.functional.distances import Metric, compared_layers, gradient_distance
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.products import partial_gradients
from dd_lightning.networks import FunctionalNetwork, Parameters
from dd_lightning.objectives.class_statistics import Statistics, Terms
from dd_lightning.objectives.classwise import ClasswiseMatching
from dd_lightning.sets.real import RealSet


@dataclass(kw_only=True, eq=False)
class GradientMatching(ClasswiseMatching):
    """Gradient matching: the sum over classes and layers of D(gradient on S, gradient on T), both on live networks.

    Defaults are IDC's for CIFAR. DC is ``metric: cos, include_classifier: true, batch_real: 256, augmentation: none``;
    DSA is that with ``policy: dsa, augmentation: color_crop_cutout_flip_scale_rotate``. (Their networks are trained on
    the synthetic set; a :class:`~dd_lightning.pools.NetworkPool` trains them on the real one, as IDC does.)

    Args:
        metric: ``mse``, the sum of squares; ``l1``; ``l1_mean``; or ``cos``. The images' learning rate goes with it.
        include_classifier: Compare the gradients of linear layers too.
        include_bias: Compare those of biases and norms too.

    References:
        Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, https://arxiv.org/abs/2205.14959.
        Liu et al., DREAM, https://arxiv.org/abs/2302.14416. Zhao et al., DC, https://arxiv.org/abs/2006.05929; DSA,
        https://arxiv.org/abs/2102.08259.
    """

    metric: Metric = "mse"
    include_classifier: bool = False
    include_bias: bool = False

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that there are layers to compare, and a batch of every class."""
        super().check(network, real)
        self._layers(network)

    def statistics(self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor) -> Statistics:
        """Return the gradient of the cross-entropy by each layer that is compared."""

        def loss(parts: Parameters) -> Tensor:
            return classification_loss(network(parts, images), targets)

        return partial_gradients(loss, network.split(theta), self._layers(network))

    def terms(self, synthetic: Statistics, real: Statistics) -> Terms:
        """Return the distance of the gradients."""
        return {"gradient_distance": gradient_distance(synthetic, real, self.metric)}

    def _layers(self, network: FunctionalNetwork) -> tuple[int, ...]:
        return compared_layers(network.parameter_shapes, self.include_classifier, self.include_bias)
