"""Options are stated once, in the base class, and reach every data module."""

import pytest
from jsonargparse import ArgumentParser

import dd_lightning.datamodules as package
from dd_lightning.datamodules import DistillationDataModule

SHARED = {"root": "data", "color_space": "normalized", "val_fraction": 0.0, "split_seed": 0, "cache_dir": None}
PUBLISHED = SHARED | {"download": True}
OPTIONS: dict[str, dict[str, object]] = {
    "CIFAR10DataModule": PUBLISHED | {"verify": True},
    "CIFAR100DataModule": PUBLISHED | {"verify": True},
    "MNISTDataModule": PUBLISHED,
    "FashionMNISTDataModule": PUBLISHED,
    "SVHNDataModule": PUBLISHED,
    "DigitsDataModule": SHARED,
    "ImageFolderDataModule": SHARED | {"image_size": 8, "grayscale": False, "background": "white"},
}


def parser() -> ArgumentParser:
    made = ArgumentParser()
    made.add_subclass_arguments(DistillationDataModule, "data")
    return made


@pytest.mark.parametrize("name", OPTIONS)
def test_options_and_defaults(name: str) -> None:
    required = ["--data.root", "data", "--data.image_size", "8"] if name == "ImageFolderDataModule" else []
    found = parser().parse_args(["--data", name, *required, "--data.val_fraction", "0.25"])
    assert found.data.init_args.as_dict() == OPTIONS[name] | {"val_fraction": 0.25}


def test_every_data_module_is_listed() -> None:
    named = {name for name in package.__all__ if name.endswith("DataModule")}
    # datasets of your own and training on a distilled set come from Python
    assert named == {*OPTIONS, "DistillationDataModule", "DatasetDataModule", "SyntheticDataModule"}


def test_help_explains_inherited_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parser().parse_args(["--data.help=CIFAR10DataModule"])
    help_text = capsys.readouterr().out.partition("10 classes:")[2]
    for option, words in {"verify": "Compare checksums", "val_fraction": "Share of every class"}.items():
        assert words in " ".join(help_text.partition(f"--data.{option} ")[2][:400].split())
