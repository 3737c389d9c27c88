"""How a run is computed: one switch, never part of a method."""

from dataclasses import dataclass
from typing import Literal, get_args

from dd_lightning.execution.compile import Compile, compile_choice
from dd_lightning.execution.precision import Precision
from dd_lightning.functional.errors import check_choice, check_range

MicroBatch = int | Literal["auto"] | None


@dataclass(frozen=True)
class Execution:
    """How networks are computed: always the same mathematics, up to rounding, which is coarse in bfloat16.

    It holds for a run (``model.execution``), but for an objective, pool or evaluation with an ``execution`` of its own.

    Args:
        compile: Compile the derivatives that a run repeats. Compiling takes up to minutes before the first step.
            ``auto`` compiles on CUDA only, for at least 50,000 calls, and not if the Trainer is ``deterministic`` (the
            compiler may choose other kernels in another process). If compilation fails, ``auto`` goes on without.
            Off by default: the gain has been measured on a CPU only.
        precision: What the networks' layers compute in: ``float32``; ``tf32``, on CUDA only; or ``bfloat16``.
            Parameters, their updates and losses stay in float32. In bfloat16 the image gradient was 5 to 8 % off on
            CIFAR-10 (``benchmarks/precision.py``). Experts have a precision of their own, in their recipe: it is part
            of what an expert is.
        micro_batch: The most images that pass through a network at once. A larger batch is computed in pieces: equal up
            to rounding, and impossible with batch norm. ``auto`` cuts a student's batch only where the memory estimate
            exceeds ``memory_gb``, an expert's batch on a CPU to what fits its cache, and the batches of class-wise
            objectives never; a number cuts all of them, and null none.
        memory_gb: What ``auto`` keeps a step below, in GiB. A fixed number, because what happens to be free on a device
            must not decide over bits of the images.

    Raises:
        InputError: If a value is out of range or unknown.
    """

    compile: Compile | bool = "off"
    precision: Precision = "float32"
    micro_batch: MicroBatch = "auto"
    memory_gb: float = 8.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "compile", compile_choice(self.compile))
        check_choice("precision", self.precision, get_args(Precision))
        if self.micro_batch != "auto":
            check_range("execution.micro_batch", self.micro_batch, low=1, hint="auto, or null for whole batches")
        check_range("execution.memory_gb", self.memory_gb, low=0, exclude_low=True, hint="GiB")
