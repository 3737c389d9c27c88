"""Damaged and hostile files for everything that reads one: the part `fuzz` of `reliability.py`.

A file is damaged in its bytes, or stays well formed and says something else: other values in its metadata or its
header, other numbers in its tensors under fresh checksums, another pickle in a checkpoint's archive.
"""

import copy
import hashlib
import io
import json
import math
import random
import resource
import socket
import struct
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import Namespace
from torch import Tensor

from dd_lightning.cli.configs import PACKAGED, resolve_args
from dd_lightning.cli.evaluate import _recipe
from dd_lightning.datamodules.whitening_cache import cached_zca
from dd_lightning.functional.errors import DistillationError
from dd_lightning.functional.formation import Formation
from dd_lightning.functional.whitening import fit_zca
from dd_lightning.module import DistillationModule
from dd_lightning.sets.color_spaces import NormalizedSpace, ZCASpace
from dd_lightning.sets.synthetic_file import (
    METADATA_KEY,
    SyntheticFile,
    _checksum_of_text,
    load_synthetic,
    save_synthetic,
)
from dd_lightning.trainer.checkpoints import check_format, read_checkpoint
from dd_lightning.training.claims import Claims
from dd_lightning.training.expert_store import ExpertIdentity, ExpertState, ExpertStore

Values = dict[str, Any]
Damage = Callable[[bytes, random.Random], bytes]

FIXTURES = Path(__file__).parents[1] / "tests" / "fixtures"
LONGEST = 2000  # letters of a message
HOSTILE: list[Any] = [
    -1, 0, 1, 2, 7, 10**9, 2**31, 2**63, 10**30, 0.5, -0.5, 1e-300, 1e308, math.inf, math.nan, True, False, None,
    "", "x", "soft", "hard", "zca", "single", "multi", "pixels", "9", "os:system", "os.system", "../../x", "\0", "é\n",
    "x" * 5000, [], {}, [[]], [None], [0] * 1000, {"a": 1}, {"class": "os.system"}, {"class": "TrajectoryPool"},
]  # fmt: skip
SHAPES: tuple[Any, ...] = (
    [],
    [0],
    [1],
    [2**62],
    [2**31, 2**31],
    [-1],
    [4, 1, 4, 4],
    [16],
    [4],
    [64],
    [1, 64],
    [8, 8],
    "x",
    None,
)
KINDS = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "x", 3, None)


@dataclass(frozen=True)
class Reader:
    """A file, the ways to damage it, and what reads it.

    Attributes:
        path: The whole file.
        read: Returns the tensors that it finds.
        damages: By kind.
        share: Its part of all inputs.
        keeps: Kinds of damage after which it must be refused, or give the tensors of the whole file.
    """

    path: Path
    read: Callable[[Path], list[Tensor]]
    damages: dict[str, Damage]
    share: float
    keeps: tuple[str, ...] = ()


def in_bytes(data: bytes, draw: random.Random) -> bytes:
    """Flip bits, cut, or put other bytes in the place of some."""
    raw, kind = bytearray(data), draw.randrange(4)
    if kind <= 1:
        for _ in range(1 if kind == 0 else draw.randint(2, 12)):
            raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del raw[draw.randrange(len(raw)) :]
    else:
        place = draw.randrange(len(raw))
        other = draw.choice([draw.randbytes(draw.randint(1, 64)), bytes(draw.randint(1, 64)), b"[" * 3000])
        raw[place : place + draw.choice([0, 1, 64])] = other
    return bytes(raw)


def _edit(value: Any, draw: random.Random) -> None:  # noqa: ANN401  (any nested values)
    """Change, remove or add something within nested dictionaries and lists."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        inner = [key for key in keys if isinstance(value[key], dict | list) and value[key]]
        if not inner or draw.random() < 0.5:
            break
        value = value[draw.choice(inner)]
    other = copy.deepcopy(draw.choice(HOSTILE))
    if not keys:
        return
    key, kind = draw.choice(keys), draw.random()
    if kind < 0.7:
        old = value[key]
        number = isinstance(old, int | float) and not isinstance(old, bool) and draw.random() < 0.5
        value[key] = old + draw.choice([-1, 1, 0.5, -1e3, 1e9]) if number else other
    elif kind < 0.85:
        del value[key]
    elif isinstance(value, dict):
        value[f"{key}x"] = value.pop(key) if draw.random() < 0.5 else other
    else:
        value.append(other)


def _unpacked(data: bytes) -> tuple[Values, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def _packed(header: Values, payload: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def in_metadata(data: bytes, draw: random.Random) -> bytes:
    """Change what a safetensors file says about itself, as valid JSON or nearly so."""
    header, payload = _unpacked(data)
    key = METADATA_KEY if METADATA_KEY in header["__metadata__"] else "checksums"
    values = json.loads(header["__metadata__"][key])
    for _ in range(draw.choice([1, 1, 2, 5])):
        _edit(values, draw)
    if key == METADATA_KEY and isinstance(values.get("checksums"), dict) and "metadata" in values["checksums"]:
        values["checksums"] |= _checksum_of_text(values)
    text = json.dumps(values)
    if draw.random() < 0.1:
        place = draw.randrange(len(text))
        text = text[:place] + draw.choice(["[" * 100_000, "9" * 6000, "1e999", "NaN", "\\u0000", "}"]) + text[place:]
    header["__metadata__"][key] = text
    return _packed(header, payload)


def in_header(data: bytes, draw: random.Random) -> bytes:
    """Change types, shapes, places and names of a safetensors file's tensors."""
    header, payload = _unpacked(data)
    name = draw.choice(list(header))
    kind, entry = draw.randrange(6), header[name]
    if kind == 0:
        del header[name]
    elif kind == 1:
        header[f"{name}x"] = header.pop(name)
    elif name == "__metadata__":
        _edit(header, draw)
    elif kind == 2:
        entry["dtype"] = draw.choice(KINDS)
    elif kind == 3:
        entry["shape"] = draw.choice(SHAPES)
    elif kind == 4:
        entry["data_offsets"] = [draw.choice([0, 4, 64, 2**62, -1]), draw.choice([0, 64, len(payload), 2**63])]
    else:  # other shape of the same size, or other type of the same width
        entry["shape"] = draw.choice([entry["shape"][::-1], [math.prod(entry["shape"])], [1, *entry["shape"]]])
        entry["dtype"] = {"F32": "I32", "I64": "F64"}.get(entry["dtype"], entry["dtype"])
    return _packed(header, payload)


def in_tensors(data: bytes, draw: random.Random) -> bytes:
    """Change numbers of a safetensors file, with checksums that fit."""
    header, payload = _unpacked(data)
    raw = bytearray(payload)
    name = draw.choice([each for each in header if each != "__metadata__"])
    begin, end = header[name]["data_offsets"]
    number = draw.choice([math.nan, math.inf, -1.0, 1e30, 0.0])
    width = 8 if header[name]["dtype"] in ("I64", "F64") else 4
    forms = {"I64": struct.pack("<q", draw.choice([-1, 4, 99, 2**62])), "F64": struct.pack("<d", number)}
    value = forms.get(header[name]["dtype"], struct.pack("<f", number))
    for _ in range(draw.choice([1, 3, 100])):
        place = begin + width * draw.randrange((end - begin) // width)
        raw[place : place + width] = value
    key = METADATA_KEY if METADATA_KEY in header["__metadata__"] else "checksums"
    values = json.loads(header["__metadata__"][key])
    sums = values if key == "checksums" else values.get("checksums", {})
    part = bytes(raw[begin:end])
    if isinstance(sums.get(name), list):
        rows = len(sums[name])
        size = len(part) // rows
        sums[name] = [zlib.crc32(part[row * size : (row + 1) * size]) for row in range(rows)]
    elif name in sums:
        sums[name] = zlib.crc32(part)
    header["__metadata__"][key] = json.dumps(values)
    return _packed(header, bytes(raw))


def in_archive(data: bytes, draw: random.Random) -> bytes:
    """Damage one record of a checkpoint's archive, whose checksums then fit."""
    target = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(target, "w") as archive:
        names = source.namelist()
        chosen = names[0] if draw.random() < 0.6 else draw.choice(names)  # the pickle is the first
        for name in names:
            content = source.read(name)
            if name == chosen and draw.random() < 0.1:
                continue
            archive.writestr(name, in_bytes(content, draw) if name == chosen and content else content)
    return target.getvalue()


def in_content(data: bytes, draw: random.Random) -> bytes:
    """Change values of a checkpoint."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    for _ in range(draw.choice([1, 1, 2, 5])):
        _edit(content if draw.random() < 0.3 else content["distillation"], draw)
        if not isinstance(content.get("distillation"), dict) or not content["distillation"]:
            break
    target = io.BytesIO()
    torch.save(content, target)
    return target.getvalue()


def in_yaml(data: bytes, draw: random.Random) -> bytes:
    """Put other values into lines of YAML, or what makes YAML slow."""
    lines = data.decode().splitlines()
    bomb = [f"b{i}: &b{i} [{', '.join([f'*b{i - 1}'] * 9) if i else 'x'}]" for i in range(draw.randint(2, 12))]
    texts = [
        *(json.dumps(each) for each in HOSTILE),
        "*a",
        "&a [*a]",
        "!!python/name:os.system",
        "!x y",
        "[" * 400,
        "- x",
    ]
    for _ in range(draw.choice([1, 1, 3])):
        place, kind = draw.randrange(len(lines)), draw.randrange(4)
        if kind == 0:
            lines[place] = f"{lines[place].partition(':')[0]}: {draw.choice(texts)}"
        elif kind == 1:
            lines.insert(place, draw.choice([" ", "\t", "  - ", "? ", "a: "]) + draw.choice(texts))
        elif kind == 2:
            lines[place] = " " * draw.randint(0, 5) + lines[place]
        elif draw.random() < 0.2:
            lines[place:place] = bomb
    return "\n".join(lines).encode()


def _sets(folder: Path) -> dict[str, Path]:
    """Write a set of each kind that there is."""
    draw = torch.Generator().manual_seed(0)
    real = torch.rand(40, 1, 4, 4, generator=draw)
    space = NormalizedSpace(torch.tensor([0.5]), torch.tensor([0.25]))
    recipe = {
        "epochs": 20, "lr": None, "momentum": 0.9, "weight_decay": 5e-4, "batch_size": 256, "milestones": [0.5],
        "gamma": 0.1, "augmentation": "none",
    }  # fmt: skip
    whole = SyntheticFile(
        images=real[:4],
        labels=torch.arange(4),
        num_classes=4,
        space=space,
        formation=Formation(2),
        lr=0.01,
        evaluation_lr=0.01,
        evaluation_recipe=recipe,
        dataset="digits",
        class_names=["a", "b", "c", "d"],
        objective="TrajectoryMatching",
        network="ConvNet-1-W4",
        step=1,
        config={"model": {"ipc": 1, "pool": {"class_path": "TrajectoryPool"}}},
    )
    soft = replace(whole, labels=torch.rand(4, 4), space=ZCASpace(fit_zca(real)), formation=Formation())
    save_synthetic(folder / "hard.safetensors", whole)
    save_synthetic(folder / "soft.safetensors", soft)
    save_synthetic(folder / "matrices.safetensors", soft, embed_matrices=True)
    names = {name: folder / f"{name}.safetensors" for name in ("hard", "soft", "matrices")}
    old = ("v1", "v2_zca", "v2_pixels")
    return names | {name: FIXTURES / f"synthetic_{name}.safetensors" for name in old}


def _read_set(path: Path) -> list[Tensor]:
    """Do what `evaluate` does with a set, short of training."""
    file = load_synthetic(path)
    _recipe(file, Namespace(recipe=None, epochs=None, augmentation=None))  # type: ignore[no-untyped-call]
    for use in (file.training_set, file.stored_pixels):
        with suppress(DistillationError):  # a set without its matrices
            use()
    return [file.images, file.labels]


def readers(folder: Path, checkpoint: bytes) -> dict[str, Reader]:
    """Write a file of each kind, and say how it is read.

    Args:
        folder: For the files.
        checkpoint: One that a run wrote.
    """
    safetensors: dict[str, Damage] = {
        "bytes": in_bytes, "metadata": in_metadata, "header": in_header, "tensors": in_tensors
    }  # fmt: skip
    found = {
        f"set, {name}": Reader(path, _read_set, safetensors, 0.08, ("bytes",) if path.parent == folder else ())
        for name, path in _sets(folder).items()
    }

    identity = ExpertIdentity("net", ["w"], [[16]], "0" * 16, "data", {"lr": 0.1})
    store = ExpertStore(folder / "store")
    store.write({0: ExpertState(torch.rand(3, 16), momentum=torch.rand(16))}, identity, 0)
    old = FIXTURES / "experts_format_1"

    def expert(path: Path) -> list[Tensor]:
        at = ExpertStore(path.parent)
        if at.metadata(0).identity.network == "net":
            at.check(identity)
        state = at.read(0)
        return [state.trajectory, at.rows(0, range(at.epochs(0) + 1))]

    found["expert"] = Reader(store.file(0), expert, safetensors, 0.2, ("bytes",))
    found["expert of before checksums"] = Reader(ExpertStore(old).file(0), expert, safetensors, 0.05)

    real = torch.rand(20, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    cache, fitted = folder / "zca.safetensors", fit_zca(real)
    cached_zca(cache, fitted.mean, lambda: fitted)

    def whitening(path: Path) -> list[Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # it is fitted anew, with a warning: refused
            try:
                return list(cached_zca(path, fitted.mean, lambda: fitted))
            except UserWarning as error:
                raise DistillationError(str(error)) from error

    found["whitening cache"] = Reader(cache, whitening, safetensors, 0.07, ("bytes",))

    saved = folder / "step=1.ckpt"
    saved.write_bytes(checkpoint)

    def resumed(path: Path) -> list[Tensor]:
        content = read_checkpoint(path)
        check_format(content["distillation"])
        return [value for value in content["state_dict"].values() if isinstance(value, Tensor)]

    def module(path: Path) -> list[Tensor]:
        loaded = DistillationModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        return [loaded.synthetic_set.images]

    damages: dict[str, Damage] = {"bytes": in_bytes, "archive": in_archive}
    found["checkpoint"] = Reader(saved, resumed, damages, 0.1, ("bytes",))
    found["load_from_checkpoint"] = Reader(saved, module, {"content": in_content}, 0.02)

    config = PACKAGED / "quickstart.yaml"
    found["configuration"] = Reader(
        config,
        lambda path: [torch.tensor(len(resolve_args(["--config", str(path)])))],
        {"bytes": in_bytes, "YAML": in_yaml},
        0.06,
    )

    claims = Claims(folder)
    claim = folder / "whole.claim"
    claim.write_text(f"{socket.gethostname()} 12345")

    def claimed(path: Path) -> list[Tensor]:
        return [torch.tensor(claims._is_stale(path))]

    def in_claim(data: bytes, draw: random.Random) -> bytes:
        host = data.partition(b" ")[0] if draw.random() < 0.8 else draw.randbytes(4)
        return host + b" " + str(draw.choice([*HOSTILE, "²", draw.randrange(10**9)])).encode("utf-8", "replace")

    found["claim"] = Reader(claim, claimed, {"bytes": in_bytes, "claim": in_claim}, 0.02)
    return found


def fuzz(count: int, seed: int, folder: Path, checkpoint: bytes, report: Callable[[Values], None]) -> Values:
    """Read damaged files; anything but a result or an error of our own is listed.

    Args:
        count: How many in all.
        seed: Of the damage.
        folder: For the files.
        checkpoint: One that a run wrote.
        report: Told the figures after each reader.
    """
    figures: Values = {
        "inputs": 0, "distinct": 0, "read": 0, "refused": 0, "slowest_seconds": 0.0, "more_memory_mib": 0.0,
        "faults": [], "parts": {},
    }  # fmt: skip
    draw, seen, found = random.Random(seed), set[bytes](), readers(folder, checkpoint)
    total = sum(reader.share for reader in found.values())
    for name, reader in found.items():
        place = folder / "damaged" / reader.path.name
        place.parent.mkdir(exist_ok=True)
        original = reader.path.read_bytes()
        place.write_bytes(original)
        whole = reader.read(place)  # also loads what is loaded once
        start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        own: Values = {"inputs": 0, "read": 0, "refused": 0, "slowest_seconds": 0.0, "faults": 0}
        figures["parts"][name] = own
        for _ in range(math.ceil(count * reader.share / total)):
            kind = draw.choice(list(reader.damages))
            data = reader.damages[kind](original, draw)
            place.write_bytes(data)
            seen.add(hashlib.blake2b(name.encode() + data, digest_size=12).digest())
            began, fault = time.process_time(), ""  # the processor's: others may be using it
            try:
                result = reader.read(place)
                own["read"] += 1
                same = len(result) == len(whole) and all(map(torch.equal, result, whole))
                if kind in reader.keeps and not same:
                    fault = "other tensors are read without a word"
            except DistillationError as error:
                own["refused"] += 1
                if "\n" in str(error) or len(str(error)) > LONGEST:
                    fault = f"a message of {len(str(error))} letters: {str(error)[:150]!r}"
            except Exception as error:
                fault = f"{type(error).__name__}: {error}"[:300]
            seconds = time.process_time() - began
            if seconds > 1:
                fault = fault or f"{seconds:.1f} s"
            own["slowest_seconds"] = max(own["slowest_seconds"], round(seconds, 4))
            own["inputs"] += 1
            if fault:
                own["faults"] += 1
                figures["faults"].append(f"{name}, {kind}: {fault}")
                (folder / f"fault-{len(figures['faults'])}").write_bytes(data)
                if own["faults"] >= 30:
                    break
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
        own["more_memory_mib"] = round(peak, 1)
        for key in ("inputs", "read", "refused"):
            figures[key] += own[key]
        for key in ("slowest_seconds", "more_memory_mib"):
            figures[key] = max(figures[key], own[key])
        figures["distinct"] = len(seen)
        print(f"{name}: {own}", flush=True)
        report(figures)
    return figures
