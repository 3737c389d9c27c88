"""IDC: the synthetic images of a class should move a network as its real images do."""

from collections.abc import Mapping

from torch import Tensor

from dd_lightning.execution.compile import Compile
from dd_lightning.execution.precision import Precision, in_precision
from dd_lightning.functional.distances import Metric, compared_layers, gradient_distance
from dd_lightning.functional.losses import classification_loss
from dd_lightning.functional.policies import PolicyName
from dd_lightning.functional.products import partial_gradients
from dd_lightning.networks import FunctionalNetwork, Parameters
from dd_lightning.objectives.class_statistics import Statistics
from dd_lightning.objectives.classwise import ClasswiseMatching, Sampling
from dd_lightning.sets.real import RealSet


class GradientMatching(ClasswiseMatching):
    """Gradient matching: the sum over classes and layers of D(gradient on S, gradient on T), both on live networks.

    Defaults are IDC's for CIFAR. DC is ``metric: cos, include_classifier: true, batch_real: 256, augmentation: none``;
    DSA is that with ``policy: dsa, augmentation: color_crop_cutout_flip_scale_rotate``. (Their networks are trained on
    the synthetic set; a :class:`~dd_lightning.pools.NetworkPool` trains them on the real one, as IDC does.)

    Args:
        metric: ``mse``, the sum of squares; ``l1``; ``l1_mean``; or ``cos``. The images' learning rate goes with it.
        include_classifier: Compare the gradients of linear layers too.
        include_bias: Compare those of biases and norms too.
        batch_real: Real images of a class per step; 64 in IDC, 128 in DREAM and DREAM+, 256 in DC and DSA.
        batch_syn: The most decoded synthetic images of a class that are matched in a step, drawn anew each time; 128 in
            IDC, which takes effect at ipc 50 and factor 2.
        augmentation: Operations, joined by ``_``, or ``"none"``. The real and the synthetic images of a class share one
            draw (siamese).
        policy: How the operations are combined: IDC's or DSA's.
        sampling: Real images ``shuffled``, as in IDC, or ``representative``: those nearest to the centroids of k-means
            on the features of the network that the previous step used (DREAM).
        interval: Steps between two choices of representatives; 10 in DREAM.
        per_cluster: Representatives of each cluster; 1 in DREAM.
        compile: Compile the matching of a class: ``auto``, ``on`` or ``off``.
        precision: What the network's layers compute in: ``float32``, ``tf32`` (CUDA alone) or ``bfloat16``.

    Raises:
        InputError: If a number is out of range or the augmentation unknown.

    References:
        Kim et al., Dataset Condensation via Efficient Synthetic-Data Parameterization, https://arxiv.org/abs/2205.14959.
        Liu et al., DREAM, https://arxiv.org/abs/2302.14416. Zhao et al., DC, https://arxiv.org/abs/2006.05929; DSA,
        https://arxiv.org/abs/2102.08259.
    """

    def __init__(
        self,
        metric: Metric = "mse",
        include_classifier: bool = False,
        include_bias: bool = False,
        batch_real: int = 64,
        batch_syn: int = 128,
        augmentation: str = "color_crop_cutout",
        policy: PolicyName = "idc",
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
        self.include_classifier = include_classifier
        self.include_bias = include_bias

    def check(self, network: FunctionalNetwork, real: RealSet) -> None:
        """Check that there are layers to compare, and a batch of every class."""
        super().check(network, real)
        self._layers(network)

    def statistics(
        self, network: FunctionalNetwork, theta: Tensor, images: Tensor, targets: Tensor, graph: bool
    ) -> Statistics:
        """Return the gradient of the cross-entropy by each layer that is compared."""
        logits = in_precision(network, self.precision)

        def loss(parts: Parameters) -> Tensor:
            return classification_loss(logits(parts, images), targets)

        return partial_gradients(loss, network.split(theta), self._layers(network), graph)

    def terms(self, synthetic: Statistics, real: Statistics) -> Mapping[str, Tensor]:
        """Return the distance of the gradients."""
        return {"gradient_distance": gradient_distance(synthetic, real, self.metric)}

    def _layers(self, network: FunctionalNetwork) -> tuple[int, ...]:
        return compared_layers(network.parameter_shapes, self.include_classifier, self.include_bias)
