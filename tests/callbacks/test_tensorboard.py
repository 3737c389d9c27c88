"""What a person sees in TensorBoard, read from the event files."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2

from dd_lightning.callbacks import SyntheticSetWriter
from dd_lightning.sets.pictures import CAPTION_HEIGHT, SMALLEST_TILE, image_grid
from tests import small


def logged(store: Path, folder: Path, *callbacks: Callback, steps: int = 3, **options: Any) -> EventAccumulator:  # noqa: ANN401
    logger = TensorBoardLogger(str(folder), name="run", default_hp_metric=False)
    small.fit(folder, small.module(store, **options), *callbacks, steps=steps, logger=logger)
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()


def curve(events: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in events.Scalars(tag)]


def values(events: EventAccumulator, tag: str) -> list[float]:
    return [value for _, value in curve(events, tag)]


def layout(events: EventAccumulator) -> layout_pb2.Layout:
    (event,) = events.Tensors("custom_scalars__config__")
    return layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])


def settings(events: EventAccumulator) -> dict[str, str | float]:
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    parsed = plugin_data_pb2.HParamsPluginData.FromString(content)
    return {k: v.string_value or v.number_value for k, v in parsed.session_start_info.hparams.items()}


def test_groups_of_scalars(store: Path, tmp_path: Path) -> None:
    events = logged(store, tmp_path, small.selection(), small.evaluation())
    tags = events.Tags()["scalars"]
    groups = Counter(tag.partition("/")[0] for tag in tags)
    assert sorted(groups) == ["accuracy", "cost", "distill", "evaluation", "selection"]
    assert [tag for tag in tags if tag.startswith("accuracy")] == [f"accuracy/{small.NETWORK}"]
    evaluation = f"evaluation/{small.NETWORK}"
    assert {tag for tag in tags if tag.startswith("evaluation")} == {
        f"{evaluation}/{name}" for name in ("std", "low", "high", "best", "seconds")
    }
    assert {tag for tag in tags if tag.startswith(("distill", "cost"))} == {
        *(f"distill/{name}" for name in ("loss", "student_lr")),
        *(f"cost/{name}" for name in ("seconds", "candidate_evaluations", "peak_memory_mb")),
    }
    # no chart of a single point
    assert {tag: [step for step, _ in curve(events, tag)] for tag in tags} == {
        tag: [0, 2, 3] if tag.startswith(("accuracy", "evaluation")) else [0, 1, 2] for tag in tags
    }
    assert values(events, "cost/candidate_evaluations") == [3, 6, 9]


def test_losses_of_candidates_are_logged_by_rank(store: Path, tmp_path: Path) -> None:
    events = logged(store, tmp_path, small.selection())
    assert {tag for tag in events.Tags()["scalars"] if tag.startswith("selection/loss_rank")} == {
        f"selection/loss_rank_{rank}" for rank in (1, 2, 3)
    }
    ranked = torch.tensor([values(events, f"selection/loss_rank_{rank}") for rank in (1, 2, 3)])
    assert torch.equal(ranked.sort(0).values, ranked)
    assert (ranked[0] < ranked[2]).all()
    assert ranked.mean(0).tolist() == pytest.approx(values(events, "selection/loss_mean"))
    chosen = torch.tensor(values(events, "selection/rank_chosen")).long() - 1
    assert ranked.gather(0, chosen[None])[0].tolist() == values(events, "selection/loss_chosen")
    assert values(events, "selection/loss_chosen") == values(events, "distill/loss")


def test_runs_with_and_without_selection_share_a_chart_with_bands(store: Path, tmp_path: Path) -> None:
    networks = [small.NETWORK, "ConvNet-2-W4"]
    base = logged(store, tmp_path, small.evaluation(networks=networks))
    dynadistill = logged(store, tmp_path, small.selection(), small.evaluation(networks=networks))
    assert layout(base) == layout(dynadistill)  # TensorBoard shows equal charts once, with the curves of both
    (category,) = layout(base).category
    assert not category.closed
    for network, chart in zip(networks, category.chart, strict=True):
        assert network in chart.title
        (series,) = chart.margin.series
        low, mean, high = (values(base, tag) for tag in (series.lower, series.value, series.upper))
        assert series.value == f"accuracy/{network}"
        assert [a + b for a, b in zip(low, high, strict=True)] == pytest.approx([2 * each for each in mean])
        deviations = values(base, f"evaluation/{network}/std")
        assert [a - b for a, b in zip(high, mean, strict=True)] == pytest.approx(deviations, abs=1e-6)


def test_all_evaluations_have_a_chart(store: Path, tmp_path: Path) -> None:
    events = logged(store, tmp_path, small.evaluation(), small.evaluation(recipe="idc", epochs=4))
    (category,) = layout(events).category
    shown = [chart.margin.series[0].value for chart in category.chart]
    assert shown == [f"accuracy/{small.NETWORK}", f"accuracy/{small.NETWORK}_idc"]


def test_hparams_tell_methods_apart(store: Path, tmp_path: Path) -> None:
    base = logged(store, tmp_path, small.evaluation())
    dynadistill = logged(store, tmp_path, small.selection(temperature=0.25), small.evaluation())
    same: dict[str, str | float] = {
        "dataset": "patterns",
        "network": small.NETWORK,
        "ipc": 2,
        "steps": 3,
        "seed": 5,
    }
    assert settings(base) == same | {"method": "TrajectoryMatching", "selection.num_candidates": 1}
    assert settings(dynadistill) == same | {
        "method": "DynaDistill + TrajectoryMatching",
        "selection.num_candidates": 3,
        "selection.temperature": 0.25,
        "selection.favor": "high_loss",
        "selection.normalize": "none",
        "selection.every_n_steps": 1,
    }
    assert base.SummaryMetadata("_hparams_/session_end_info").plugin_data.plugin_name == "hparams"


def test_texts_say_how_the_run_was_started(store: Path, tmp_path: Path) -> None:
    writer = SyntheticSetWriter()
    writer.command, writer.config = "dd-lightning fit --name x", {"model": {"ipc": 2}}
    events = logged(store, tmp_path, writer)
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert texts == {
        "command/text_summary": "    dd-lightning fit --name x",
        "config/text_summary": "    model:\n      ipc: 2\n    ",
    }


def test_pictures_are_enlarged_and_named(store: Path, tmp_path: Path) -> None:
    events = logged(store, tmp_path, SyntheticSetWriter(every_n_steps=2))
    assert events.Tags()["images"] == ["synthetic"]
    assert [event.step for event in events.Images("synthetic")] == [0, 2, 3]
    first = events.Images("synthetic")[0]
    assert first.height == 3 * (SMALLEST_TILE + CAPTION_HEIGHT + 2) + 2  # three classes of two images
    assert first.width == 2 * (SMALLEST_TILE + 2) + 2


@pytest.mark.parametrize(("ipc", "rows", "columns"), [(1, 2, 5), (3, 7, 3)])
def test_a_name_stands_above_the_first_image_of_its_class(ipc: int, rows: int, columns: int) -> None:
    pixels = torch.rand(7 * ipc, 3, 8, 8)
    names = [f"class {i}" for i in range(7)]
    grid = image_grid(pixels, 7, names=names)
    height, width, step = SMALLEST_TILE + CAPTION_HEIGHT + 2, SMALLEST_TILE + 2, SMALLEST_TILE // 8
    assert grid.shape == (3, rows * height + 2, columns * width + 2)
    captions = set()
    for number in range(7 * ipc):
        top, left = number // columns * height + 2, number % columns * width + 2
        caption = grid[:, top : top + CAPTION_HEIGHT, left : left + SMALLEST_TILE]
        tile = grid[:, top + CAPTION_HEIGHT : top + height - 2, left : left + SMALLEST_TILE]
        assert torch.equal(tile[:, ::step, ::step], pixels[number])
        assert torch.equal(tile, pixels[number].repeat_interleave(step, 1).repeat_interleave(step, 2))
        assert bool((caption < 0.5).any()) == (number % ipc == 0)
        if number % ipc == 0:
            captions.add(caption.numpy().tobytes())
    assert len(captions) == 7
