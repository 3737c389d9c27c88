"""A commit of this repository, installed as a wheel in an environment of its own."""

import io
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
from pathlib import Path
from typing import Any

PROBE = """
import json, lightning, torch, dd_lightning
print(json.dumps({
    "file": dd_lightning.__file__,
    "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
    "instructions": torch.backends.cpu.get_cpu_capability(),
    "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
}))
"""


def resolve(repository: Path, commit: str) -> str:
    """Return the whole name of a commit."""
    return _git(repository, "rev-parse", "--verify", f"{commit}^{{commit}}").decode().strip()


def installed(folder: Path, repository: Path, commit: str) -> dict[str, Any]:
    """Install a commit into `folder/env`, unless it is there, and its configurations into `folder/configs`.

    All other packages are those of the running interpreter.

    Returns:
        The package's file, the versions it runs with and the hardware it finds.
    """
    environment = folder / "env"
    found = _probe(environment)
    if found is not None:
        return found
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as temporary:
        source, wheels = Path(temporary) / "source", Path(temporary) / "wheels"
        with tarfile.open(fileobj=io.BytesIO(_git(repository, "archive", commit))) as archive:
            archive.extractall(source, filter="data")
        shutil.copytree(source / "configs", folder / "configs", dirs_exist_ok=True)
        wheel = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
        subprocess.run([*pip, *wheel], check=True)
        venv.create(environment, clear=True, symlinks=True)
        install = ["install", "--no-deps", "--no-index", *(str(path) for path in wheels.iterdir())]
        subprocess.run([*pip, "--python", str(environment / "bin" / "python"), *install], check=True)
    own = sysconfig.get_path("purelib", "venv", {"base": str(environment), "platbase": str(environment)})
    others = [sysconfig.get_path(name) for name in ("purelib", "platlib")]
    Path(own, "others.pth").write_text("\n".join(others) + "\n")  # after pip, which must not see what is there
    found = _probe(environment)
    if found is None:
        sys.exit(f"{environment} does not run dd_lightning from the wheel of {commit}")
    return found


def _probe(environment: Path) -> dict[str, Any] | None:
    """Return what the environment finds; None unless it has a dd_lightning of its own."""
    if not (environment / "bin" / "dd-lightning").exists():
        return None
    command = [str(environment / "bin" / "python"), "-I", "-c", PROBE]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else {"file": ""}
    return found if Path(found["file"]).is_relative_to(environment) else None


def hardware(found: dict[str, Any], threads: int) -> dict[str, Any]:
    """Name the hardware, by what :func:`installed` has found and by what the system says."""
    path = Path("/proc/cpuinfo")
    lines = [line.split(":", 1) for line in path.read_text().splitlines() if ":" in line] if path.exists() else []
    cpu = {name.strip(): value.strip() for name, value in lines}
    model = f"{cpu.get('model name', platform.machine())}, family {cpu.get('cpu family')}, model {cpu.get('model')}"
    kind = {"cpu": model, "instructions": found["instructions"], "cores": os.cpu_count(), "threads": threads}
    return kind | {"gpu": found["gpu"]}


def _git(repository: Path, *command: str) -> bytes:
    return subprocess.run(["git", "-C", str(repository), *command], check=True, stdout=subprocess.PIPE).stdout
