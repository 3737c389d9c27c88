"""Take pictures of TensorBoard: start it on finished runs and open its tabs in headless Chromium, without a click.

    python benchmarks/tensorboard_pictures.py runs docs/tensorboard

writes docs/tensorboard_accuracy.png and one picture for each other tab. Chromium comes from the system's packages
(`apt-get install chromium`).
"""

import argparse
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.request import urlopen

TABS = {
    "time_series": ("", 1280, 720),
    "accuracy": ("#custom_scalars", 1280, 720),
    "hparams": ("#hparams", 1400, 520),
    "images": ("#images", 1280, 560),
    "text": ("#text", 1280, 720),
}
"""Fragment of the address, width and height of each picture."""

CHROMIUM = (
    "--headless",
    "--no-sandbox",  # refused to root otherwise, as in a container; the only page is our own
    "--disable-3d-apis",  # charts are drawn as SVG: WebGL misses the moment of the picture
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=30000",  # milliseconds that the page believes to have waited for data and animations
)


def take_pictures(runs: Path, out: Path, tabs: list[str], chromium: str) -> None:
    """Write a picture of each tab to ``<out>_<tab>.png``."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    address = f"http://localhost:{port}/"
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as board:
        try:
            wait_for_runs(address, {str(path.parent.relative_to(runs)) for path in runs.rglob("events.out.*")})
            for tab in tabs:
                fragment, width, height = TABS[tab]
                picture = out.with_name(f"{out.name}_{tab}.png")
                picture.unlink(missing_ok=True)
                with tempfile.TemporaryDirectory() as profile:
                    subprocess.run(
                        [
                            *(chromium, *CHROMIUM, f"--user-data-dir={profile}", f"--window-size={width},{height}"),
                            *(f"--screenshot={picture.absolute()}", f"{address}{fragment}"),
                        ],
                        check=True,
                        capture_output=True,
                        timeout=300,
                    )
                print(picture)
        finally:
            board.terminate()


def wait_for_runs(address: str, runs: set[str], seconds: float = 120) -> None:
    """Wait until TensorBoard has read all runs."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            with urlopen(f"{address}data/runs") as answer:
                if runs <= set(json.load(answer)):
                    return
        except OSError:  # it is not up yet
            pass
        time.sleep(0.5)
    raise TimeoutError(f"TensorBoard has not read {', '.join(sorted(runs))} within {seconds:.0f} seconds")


def main() -> None:
    """Parse the arguments and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="Folder of the runs.")
    parser.add_argument("out", type=Path, help="Path of the pictures, without _<tab>.png.")
    parser.add_argument("--tabs", nargs="+", choices=[*TABS], default=[*TABS])
    parser.add_argument("--chromium", default=next(filter(shutil.which, ("chromium", "google-chrome")), "chromium"))
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    take_pictures(args.runs, args.out, args.tabs, args.chromium)


if __name__ == "__main__":
    main()
