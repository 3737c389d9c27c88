"""``dd-lightning export`` and ``dd-lightning import``: distilled sets in the formats of other projects."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dd_lightning.cli.errors import blame_paths
from dd_lightning.cli.parser import OneLineParser
from dd_lightning.cli.runs import synthetic_file
from dd_lightning.datamodules import DistillationDataModule, datamodule_by_name, evaluation_data, import_set
from dd_lightning.functional.errors import InputError
from dd_lightning.sets.color_spaces import ZCARecipe
from dd_lightning.sets.foreign import READERS, WRITERS, export_set
from dd_lightning.sets.synthetic_file import load_synthetic, save_synthetic
from dd_lightning.training.evaluation import RECIPES, get_recipe


def export_command(args: Sequence[str]) -> None:
    """Write a distilled set in another format."""
    parser = _parser("export FILE --format FORMAT --out PATH", "Write a distilled set in another project's format.")
    parser.add_argument("file", type=str, help="A synthetic.safetensors, or the folder of a run.")
    parser.add_argument("--format", type=str, required=True, help=f"One of {', '.join(WRITERS)}.")
    parser.add_argument("--out", type=str, required=True, help="A new file for pt, grid and idc, else a new folder.")
    parser.add_argument("--root", type=str, default="data", help="Folder of the real data, if it is needed.")
    parser.add_subclass_arguments(
        DistillationDataModule, "data", required=False, help="Real data, if not the file's dataset in --root."
    )
    config = parser.parse_args(args)
    objects = parser.instantiate_classes(config)
    with blame_paths(config, output="out"):
        synthetic = load_synthetic(synthetic_file(Path(config.file)))
        if isinstance(synthetic.space, ZCARecipe) and synthetic.stored_as == "pixels" and config.format != "idc":
            data = objects.data or datamodule_by_name(synthetic.dataset, root=config.root)
            synthetic, _ = evaluation_data(synthetic, data)
        files = export_set(synthetic, config.format, config.out)
    size = sum(file.stat().st_size for file in files)
    decoding = f", factor {synthetic.formation.factor}, which the format does not store" * (
        config.format == "idc" and synthetic.formation.factor > 1
    )
    sys.stdout.write(f"{len(files)} files, {size / 1000:.0f} kB, in {Path(config.out).resolve()}{decoding}\n")


def import_command(args: Sequence[str]) -> None:
    """Read a distilled set of another project."""
    parser = _parser(
        "import PATH... --format FORMAT --data DATA --out FILE",
        "Turn a distilled set of another project into a file that `evaluate` reads. What the format does not store is "
        "asked for.",
    )
    parser.add_argument("paths", type=str, nargs="+", help="Files or folders; several are parts of one set.")
    parser.add_argument("--format", type=str, required=True, help=f"One of {', '.join(READERS)}.")
    parser.add_argument("--out", type=str, required=True, help="File to write, *.safetensors.")
    parser.add_subclass_arguments(DistillationDataModule, "data", required=True, help="The real data.")
    parser.add_argument("--space", type=str | None, default=None, help="pixels, normalized or zca: how it is stored.")
    parser.add_argument("--lr", type=float | None, default=None, help="Its learned learning rate.")
    parser.add_argument("--factor", type=int | None, default=None, help="Tiles along each axis of an image (IDC).")
    parser.add_argument("--network", type=str, default="ConvNet-3", help="The network it was distilled with.")
    parser.add_argument(
        "--recipe", type=str | None, default=None, help=f"Protocol to evaluate it by: {', '.join(sorted(RECIPES))}."
    )
    parser.add_argument("--nrow", type=int, default=8, help="Images in a row of a grid.")
    parser.add_argument("--padding", type=int, default=2, help="Pixels between the images of a grid.")
    parser.add_argument("--ipc", type=int | None, default=None, help="Images per class of a grid with empty tiles.")
    config = parser.parse_args(args)
    options = {name: config[name] for name in ("space", "lr", "factor", "network", "nrow", "padding", "ipc")}
    options["recipe"] = asdict(get_recipe(config.recipe)) if config.recipe else None
    if Path(config.out).exists():
        raise InputError(f"--out is {config.out!r}, which exists; give a new file")
    objects = parser.instantiate_classes(config)
    with blame_paths(config, output="out"):
        synthetic = import_set(config.paths, config.format, objects.data, **options)
        save_synthetic(config.out, synthetic)
    sys.stdout.write(
        f"{len(synthetic.images)} images, {synthetic.label_kind} labels, in {Path(config.out).resolve()}\n"
    )


def _parser(usage: str, description: str) -> OneLineParser:
    prog = f"dd-lightning {usage.split()[0]}"
    parser = OneLineParser(prog=prog, usage=f"dd-lightning {usage} [options]", description=description)
    parser.add_argument("-c", "--config", action="config", help="YAML file or packaged name.")
    return parser
