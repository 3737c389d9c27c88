"""The memory of a step: what it is estimated at, how it is kept below a budget, and what is said when it runs out."""

import gc
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor

from dd_lightning.execution.memory import (
    GIB,
    LiveBytes,
    MemoryEstimate,
    MemoryPart,
    explain_oom,
    is_out_of_memory,
    memory_model,
)
from dd_lightning.execution.options import Execution
from dd_lightning.functional.errors import InputError, OutOfMemoryError
from dd_lightning.functional.random import StepContext
from dd_lightning.networks import FunctionalNetwork
from dd_lightning.objectives import (
    BidirectionalMatching,
    DistributionMatching,
    GradientMatching,
    MatchingObjective,
    Problem,
    TrajectoryMatching,
    Workload,
    student,
)
from dd_lightning.objectives.classwise import ClasswiseMatching
from dd_lightning.pools import Candidate, NetworkPool, TrajectorySegment
from dd_lightning.sets.initial import class_labels
from dd_lightning.sets.real import RealSet
from dd_lightning.sets.synthetic import SyntheticSet
from dd_lightning.training.evaluation import Evaluation
from tests import small
from tests.small import Cli

CLASSES, SHAPE = 3, (3, 16, 16)
OUT_OF_MEMORY = {
    "device": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.\nGPU 0 has a total ..."),
    "host": RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory: you tried"),
    "windows": RuntimeError("[enforce fail at alloc_cpu.cpp:80] data. DefaultCPUAllocator: not enough memory: you ..."),
    "library": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "numpy": MemoryError("Unable to allocate 9.00 GiB"),
}


class Step:
    """One whole step of an objective, from its draws to the gradient by the images."""

    def __init__(self, objective: MatchingObjective, name: str = "ConvNet-2-W8", ipc: int = 8) -> None:
        self.objective, self.network = objective, FunctionalNetwork(name, SHAPE, CLASSES)
        generator = torch.Generator().manual_seed(0)
        self.real = RealSet(torch.randn(90, *SHAPE, generator=generator), torch.arange(90) % CLASSES, CLASSES)
        images = torch.randn(CLASSES * ipc, *SHAPE, generator=generator)
        self.synthetic = SyntheticSet(images, class_labels(CLASSES, ipc), 0.01)
        start, target = self.network.initial(0), self.network.initial(1)
        self.candidate: Candidate = Candidate((0,), start)
        if isinstance(objective, TrajectoryMatching):
            self.candidate = TrajectorySegment((0, 0), start, target)

    @property
    def problem(self) -> Problem:
        return Problem(self.synthetic, self.real, self.network)

    def plan(self, candidates: int = 1, device: str = "cpu") -> MemoryEstimate:
        # what a step itself makes of it: the gradient, and the sum that it is collected in
        resident = MemoryPart("gradients", 2 * self.synthetic.images.nbytes)
        workload = Workload(self.network, len(self.synthetic), False, candidates, device, (resident,))
        return self.objective.plan_memory(workload, Execution())

    def __call__(self, step: int = 0) -> Tensor:
        draw = self.objective.draw(self.problem, lambda: self.candidate, StepContext(0, step))
        (scored,) = self.objective.score(self.problem, [self.candidate], draw, with_gradient=True)
        return torch.autograd.grad(self.objective.loss(self.problem, scored), self.synthetic.images)[0]

    def live(self, step: int = 0) -> int:
        """Return the peak of what the tensors of one step hold."""
        live = LiveBytes()
        with live:
            self(step)
        return max(live.trace)

    def saved(self) -> int:
        """Return the bytes that autograd saves for the backward passes of one step: torch's own hooks count them."""
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage()._cdata] = tensor  # held, so that no address is used twice
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            self()
        return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


# The estimate


def test_live_bytes_are_counted_by_storage_and_until_they_are_freed() -> None:
    outside = torch.ones(1000)
    with LiveBytes() as live:
        a = torch.ones(10)  # 40 bytes
        b = a.view(5, 2).t()  # no memory of its own
        c = outside + 1  # 4,000
        del a, b
        c += 1  # in place
        d = torch.ones(25)  # 100
        del c, d
        torch.ones(1)
    assert live.trace == [40, 4040, 4100, 4]
    assert max(live.trace) == 4100


def test_backward_passes_are_counted_too() -> None:
    x = torch.ones(100, requires_grad=True)
    with LiveBytes() as live:
        (gradient,) = torch.autograd.grad((x.sin() * 2).sum(), x, create_graph=True)
        del gradient
        gc.collect()
    assert max(live.trace) >= 3 * 400  # sin(x), its double, cos(x)
    with LiveBytes() as live:
        y = x.exp()
        y.sum().backward()
    assert x.grad is not None
    assert max(live.trace) >= 2 * 400


@pytest.mark.parametrize("size", [2, 3, 17, 400])
def test_a_model_is_exact_at_any_size(size: int) -> None:
    def run(first: int, second: int) -> None:
        # the peak is at other moments for few and for many images
        weights = torch.ones(500, 500)
        del weights
        a = torch.ones(first, 100)
        b = torch.ones(second, 300)
        c = a * 2
        del a, b
        torch.cat([c, c])

    with LiveBytes() as live:
        run(size, 5)
    assert memory_model(run, kinds=2).peak(size, 5) == max(live.trace)


def test_a_computation_that_branches_on_its_size_is_taken_to_grow_altogether() -> None:
    def run(count: int) -> None:
        torch.ones(100 * count)
        if count > 2:
            torch.ones(10)

    assert memory_model(run).peak(30) == 400 * 3 // 2 * 30


def test_an_estimate_is_one_line_that_adds_up() -> None:
    parts = (MemoryPart("real data", 600 * 2**20), MemoryPart("one step", 2 * GIB, "batch 9"))
    estimate = MemoryEstimate(parts)
    assert estimate.total == 600 * 2**20 + 2 * GIB
    assert str(estimate) == "about 2.6 GiB: real data 600 MiB, one step 2.0 GiB (batch 9)"


@pytest.mark.parametrize("name", ["ConvNet-2-W8", "ConvNet-2-W8-NN-MP", "ConvNet-2-W8-BN", "ResNet-10-W4-IN"])
def test_a_trajectory_step_needs_what_is_estimated(name: str) -> None:
    # batches of one operation: the estimate cannot know that steps which are augmented together draw different ones
    for steps, augmentation in ((1, "color_crop_cutout_flip_scale_rotate"), (6, "scale"), (6, "crop"), (6, "none")):
        step = Step(TrajectoryMatching(syn_steps=steps, augmentation=augmentation), name)
        needed = max(step.live(number) for number in range(1 if steps > 1 else 12))
        assert 0.95 * needed < step.plan().total < 1.3 * needed


@pytest.mark.parametrize("batch", [6, 24])
def test_the_estimate_is_a_little_above_what_autograd_saves(batch: int) -> None:
    step = Step(TrajectoryMatching(syn_steps=1, batch_syn=batch, augmentation="none"))
    assert 1 < step.plan().total / step.saved() < 1.5


def test_soft_labels_and_candidates_are_in_the_estimate() -> None:
    step = Step(TrajectoryMatching(syn_steps=6, augmentation="none"))
    one, three = step.plan(1), step.plan(3)
    assert three.total - one.total == 2 * 4 * step.network.num_parameters * (7 + 2)
    assert [part.name for part in three.parts] == ["gradients", "student paths", "one student step"]
    assert [part.note for part in three.parts] == ["", "3 candidates", "batch 24 in one piece"]
    soft = step.objective.plan_memory(Workload(step.network, 24, True, resident=one.parts[:1]), Execution())
    assert one.total < soft.total < 1.1 * one.total


@pytest.mark.parametrize(
    "objective",
    [
        GradientMatching(batch_real=12),
        GradientMatching(batch_real=4, batch_syn=5, policy="dsa", augmentation="color_rotate"),
        BidirectionalMatching(batch_real=12, sampling="shuffled", augmentation="none"),
        DistributionMatching(batch_real=20),
    ],
    ids=lambda objective: type(objective).__name__,
)
def test_a_classwise_step_needs_what_is_estimated(objective: ClasswiseMatching) -> None:
    step = Step(objective)
    estimated = step.plan()
    assert [part.name for part in estimated.parts] == ["gradients", "augmented real images", "one class"]
    needed = max(step.live(number) for number in range(6))
    assert 0.95 * needed < estimated.total < 1.4 * needed
    # of several candidates, the derivatives by the statistics of all classes wait for the choice
    several = step.plan(3)
    statistics = objective.statistics(step.network, step.candidate.theta, step.real.images[:2], step.real.labels[:2])
    assert several.total - estimated.total == 3 * CLASSES * sum(s.nbytes for s in statistics)


@pytest.mark.parametrize("micro_batch", [3, 5])
def test_a_class_in_pieces_needs_what_is_estimated(micro_batch: int) -> None:
    options: dict[str, Any] = {"batch_real": 24, "batch_syn": 8, "augmentation": "none"}
    whole = Step(BidirectionalMatching(sampling="shuffled", **options))
    pieces = Step(BidirectionalMatching(sampling="shuffled", execution=Execution(micro_batch=micro_batch), **options))
    estimated, needed = pieces.plan(), max(pieces.live(number) for number in range(2))
    assert estimated.parts[-1].note == f"24 real and 8 synthetic images, at most {micro_batch} at once"
    assert 0.95 * needed < estimated.total < 1.4 * needed
    assert needed < 0.7 * whole.live()


def test_the_runs_execution_is_used_where_an_objective_has_none_of_its_own() -> None:
    run, own = Execution(micro_batch=None), Execution(micro_batch=7)
    for execution, note in ((None, "24 in one piece"), (own, "24 in 4 pieces of 7")):
        step = Step(TrajectoryMatching(syn_steps=2, execution=execution))
        assert note in step.objective.plan_memory(Workload(step.network, 24), run).parts[-1].note
    step = Step(GradientMatching(batch_real=8))
    step.objective.plan_memory(Workload(step.network, 24), run)
    exact = step()
    step.objective.plan_memory(Workload(step.network, 24), Execution(precision="bfloat16"))
    assert 1e-3 < float((step() - exact).norm() / exact.norm()) < 0.3


def test_candidates_are_scored_together_where_that_pays_and_fits() -> None:
    def scored_live(step: Step) -> int:
        draw = step.objective.draw(step.problem, lambda: step.candidate, StepContext(0, 0))
        live = LiveBytes()
        with live:
            step.objective.score(step.problem, [step.candidate] * 5, draw)
        return max(live.trace)

    step = Step(TrajectoryMatching(syn_steps=2, augmentation="none"))
    apart = step.plan(5, "cpu")  # 24 images of 16 x 16 are too many for a host
    assert apart.parts[-1] == step.plan(1).parts[-1]
    one_by_one = scored_live(step)
    together = step.plan(5, "cuda")
    vectorized = scored_live(step)
    assert vectorized > 3 * one_by_one
    assert 0.95 * vectorized < together.parts[-2].size + together.parts[-1].size < 1.3 * vectorized
    execution = Execution(memory_gb=(together.total - 1) / GIB)
    short = Step(TrajectoryMatching(syn_steps=2, augmentation="none", execution=execution))
    assert short.plan(5, "cuda") == apart
    assert scored_live(short) == one_by_one


# Pieces


def test_memory_of_a_step_falls_with_the_piece() -> None:
    needed, estimated = {}, {}
    for micro_batch in (None, 12, 6, 3):
        step = Step(
            TrajectoryMatching(syn_steps=2, augmentation="rotate", execution=Execution(micro_batch=micro_batch))
        )
        estimated[micro_batch] = step.plan().total
        needed[micro_batch] = max(step.live(number) for number in range(3))
    assert needed[12] < 0.6 * needed[None]
    assert needed[6] < 0.6 * needed[12]
    assert needed[3] < 0.7 * needed[6]
    for micro_batch, bytes_needed in needed.items():
        assert 0.95 * bytes_needed < estimated[micro_batch] < 1.3 * bytes_needed


def trajectories(**execution: Any) -> TrajectoryMatching:  # noqa: ANN401
    return TrajectoryMatching(syn_steps=2, execution=Execution(**execution))


def notes(step: Step) -> str:
    return step.plan().parts[-1].note


def test_auto_cuts_exactly_when_the_budget_is_exceeded() -> None:
    whole = Step(trajectories(micro_batch=None), ipc=32)
    needed, gradient = whole.plan().total, whole()
    enough = Step(trajectories(memory_gb=needed / GIB), ipc=32)
    assert notes(enough) == "batch 96 in one piece"
    assert torch.equal(enough(), gradient)
    short = Step(trajectories(memory_gb=(needed - 1) / GIB), ipc=32)
    assert notes(short) == "batch 96 in 2 pieces of 48"
    assert not torch.equal(short(), gradient)
    torch.testing.assert_close(short(), gradient, rtol=1e-3, atol=1e-6 * float(gradient.abs().max()))
    by_hand = Step(trajectories(micro_batch=48), ipc=32)
    assert notes(by_hand) == "batch 96 in 2 pieces of 48"
    assert torch.equal(short(), by_hand())


def test_auto_takes_the_fewest_pieces_that_fit_and_none_below_the_smallest() -> None:
    totals = {
        count: Step(trajectories(micro_batch=-(-96 // count)), ipc=32).plan().total for count in (1, 2, 3, 4, 5, 6)
    }
    assert sorted(totals.values(), reverse=True) == list(totals.values())
    for count, total in totals.items():
        step = Step(trajectories(memory_gb=total / GIB), ipc=32)
        assert step.plan().total == total
        assert notes(step).startswith("batch 96 in one piece" if count == 1 else f"batch 96 in {count} pieces of ")
    nothing = Step(trajectories(memory_gb=1e-6), ipc=32)
    assert notes(nothing) == "batch 96 in 6 pieces of 16, above memory_gb 1e-06"
    # data and paths count as well
    held = (MemoryPart("real data", GIB), *nothing.plan().parts[:1])
    objective = trajectories(memory_gb=1 + totals[3] / GIB)
    assert (
        "3 pieces of 32"
        in objective.plan_memory(Workload(nothing.network, 96, resident=held), Execution()).parts[-1].note
    )


def test_batch_norm_is_never_cut() -> None:
    name = "ConvNet-2-W8-BN"
    message = r"micro_batch is 7, but network 'ConvNet-2-W8-BN' has batch norm, which needs all 24 images of a batch"
    explicit = Step(trajectories(micro_batch=7), name)
    with pytest.raises(InputError, match=message):
        explicit.plan()
    with pytest.raises(InputError, match=message):
        explicit()
    auto = Step(trajectories(memory_gb=1e-6), name)
    assert notes(auto) == "batch 24 in one piece, above memory_gb 1e-06"
    whole = Step(trajectories(micro_batch=24), name)
    assert notes(whole) == "batch 24 in one piece"
    assert torch.equal(auto(), whole())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "execution.micro_batch is 0; it must be at least 1"),
        ({"memory_gb": 0.0}, "execution.memory_gb is 0; it must be above 0"),
        ({"compile": "fast"}, "compile is 'fast'; use one of auto, on, off"),
        ({"precision": "half"}, "precision is 'half'; use one of float32, tf32, bfloat16"),
    ],
)
def test_values(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Execution(**options)
    assert [Execution(compile=value).compile for value in (True, False)] == ["on", "off"]


# Runs


def run(
    store: Path,
    folder: Path,
    *callbacks: Callback,
    ckpt_path: Path | None = None,
    **execution: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor]:
    distilled = small.module(store, objective=trajectories(**execution))
    small.fit(folder, distilled, small.selection(temperature=0.1), *callbacks, ckpt_path=ckpt_path)
    return small.learned(distilled)


def test_a_run_in_pieces_learns_the_same_and_resumes_bit_for_bit(store: Path, tmp_path: Path) -> None:
    whole = run(store, tmp_path, micro_batch=None)
    assert small.same(run(store, tmp_path), whole)  # auto
    pieces = run(store, tmp_path, micro_batch=4)  # of 6: one of 4, one of 2
    assert not small.same(pieces, whole)
    assert (pieces[0] - whole[0]).norm() < 1e-4 * whole[0].norm()
    with pytest.raises(small.KilledError):
        run(store, tmp_path, small.checkpoints(tmp_path), small.Kill(4), micro_batch=4)
    last = tmp_path / "step=3.ckpt"
    assert small.same(run(store, tmp_path, small.checkpoints(tmp_path), ckpt_path=last, micro_batch=4), pieces)


def test_the_estimate_is_told_once_before_the_run(
    store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def told(distilled: Any, *callbacks: Any) -> str:  # noqa: ANN401
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
            small.fit(tmp_path, distilled, *callbacks, steps=1)
        (line,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("memory of a step")]
        assert str(distilled.distillation.memory) in line
        return line

    size = r"[\d.]+ MiB"
    distilled = small.module(store)
    assert re.fullmatch(
        rf"memory of a step on cpu: about {size}: real data {size}, held-out data {size}, synthetic set {size}, "
        rf"student paths {size} \(3 candidates\), one student step {size} \(batch 6 in one piece\)",
        told(distilled, small.selection()),
    )
    assert "(1 candidate)" in told(distilled)  # the same module, without the selection
    assert distilled.distillation.memory is not None
    sizes = {part.name: part.size for part in distilled.distillation.memory.parts}
    image = 4 * 8 * 8
    assert sizes["real data"] == 90 * (image + 8)
    assert sizes["synthetic set"] == 5 * 6 * image
    assert sizes["student paths"] == 4 * distilled.problem.network.num_parameters * 5
    assert re.search(
        rf"augmented real images {size} \(of all classes\), one class {size} \(8 real and 2 synthetic images\)",
        told(small.network_module()),
    )


# Not enough


@pytest.mark.parametrize("error", OUT_OF_MEMORY.values(), ids=list(OUT_OF_MEMORY))
def test_what_out_of_memory_is(error: Exception) -> None:
    assert is_out_of_memory(error)
    message = r"^memory ran out while working; buy more$"
    with pytest.raises(OutOfMemoryError, match=message) as told, explain_oom("working", None, "buy more"):
        raise error
    assert told.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("not enough memory"), OSError(28, "full")])
def test_what_is_not(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error), match=r"shapes|memory|full") as told, explain_oom("x", None, "y"):
        raise error
    assert told.value is error


def failing(working: Callable[..., Any], calls: int, error: Exception) -> Callable[..., Any]:
    """Return a function that works so many times and then fails."""
    done = 0

    def either(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        nonlocal done
        done += 1
        if done > calls:
            raise error
        return working(*args, **kwargs)

    return either


STEP = r"\(the estimate of a step is about [\d.]+ MiB: real data .* MiB \(batch 10 in one piece\)\)"
SMALLER = r"set a smaller execution\.micro_batch or objective\.batch_syn"


@pytest.mark.parametrize("kind", ["device", "host"])
@pytest.mark.parametrize(
    ("owner", "name", "calls", "candidates", "doing"),
    [
        (TrajectoryMatching, "score", 5, 3, "scoring"),
        (TrajectoryMatching, "score", 5, 1, "scoring"),
        (TrajectoryMatching, "draw", 5, 1, "drawing"),
        (student, "unroll_adjoint", 2 + 5, 1, "computing the gradient"),  # the probe takes two steps
    ],
)
def test_out_of_memory_in_a_step_loses_nothing(
    cli: Cli,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    owner: object,
    name: str,
    calls: int,
    candidates: int,
    doing: str,
) -> None:
    options = ("--selection.num_candidates", str(candidates))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name), calls, OUT_OF_MEMORY[kind]))
        line = cli.fit_refused(*options)
    remedy = SMALLER + ", or fewer selection.num_candidates" * (candidates > 1)
    assert re.search(rf"error: memory ran out while {doing} at step 5 {STEP}; {remedy}$", line)
    assert [path.name for path in (cli.version() / "checkpoints").iterdir()] == ["step=5.ckpt"]
    cli.fit("--ckpt_path", "last", *options)
    cli.fit("--name", "whole", *options)
    assert small.same(cli.learned(1), cli.learned(name="whole"))


def test_out_of_memory_in_a_classwise_step_and_in_its_pool(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = r"\(the estimate of a step is about .*one class .* MiB \(8 real and 4 synthetic images\)\)"
    for owner, name, doing, remedy in (
        (GradientMatching, "loss", "computing the gradient", "objective.batch_real or objective.batch_syn"),
        (NetworkPool, "update", "updating the pool", "pool.recipe.batch_size"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, failing(getattr(owner, name), 1, OUT_OF_MEMORY["host"]))
            line = cli.networks_refused()
        assert re.search(rf"memory ran out while {doing} at step [12] {estimate}; set a smaller {remedy}$", line)


def test_out_of_memory_in_an_evaluation_loses_nothing(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        error = OUT_OF_MEMORY["device"]
        patch.setattr(Evaluation, "__call__", failing(Evaluation.__call__, 1, error))
        line = cli.fit_refused()
    told = rf"memory ran out while training 2 x ConvNet-1-W4 \(evaluation\) at step 4 {STEP}; set smaller evaluation\."
    assert re.search(told, line)
    assert [path.name for path in (cli.version() / "checkpoints").iterdir()] == ["step=4.ckpt"]
    cli.fit("--ckpt_path", "last")
    with monkeypatch.context() as patch:
        patch.setattr(Evaluation, "__call__", failing(Evaluation.__call__, 0, OUT_OF_MEMORY["host"]))
        with pytest.raises(SystemExit, match="1"):
            cli("evaluate", str(cli.version(1) / "synthetic.safetensors"), "--num_networks", "2")
    remedy = "set smaller --num_networks, or smaller --networks"
    assert cli.err == f"dd-lightning: error: memory ran out while training 2 x ConvNet-1-W4; {remedy}\n"


def test_micro_batches_of_a_batch_norm_are_refused_in_one_line(cli: Cli) -> None:
    options = ("--model.network", "ConvNet-1-W4-BN", "--model.pool.path", "new")
    line = cli.fit_refused(*options, "--model.objective.execution.micro_batch", "4")
    assert re.search(
        r"micro_batch is 4, but .* all 10 images .*; set execution\.micro_batch: null, or use another", line
    )
    assert not (cli.folder / "new").exists()
    one_step = ("--trainer.max_steps", "1", "--evaluation", "null")
    cli.fit(*options, *one_step, "--name", "null", "--model.execution.micro_batch", "null")
    cli.fit(*options, *one_step, "--name", "auto", "--model.execution.memory_gb", "1e-6")
    assert small.same(cli.learned(name="null"), cli.learned(name="auto"))
