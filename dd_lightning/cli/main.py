"""The command line: ``dd-lightning COMMAND``."""

import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from dd_lightning.cli.commands import experts
from dd_lightning.cli.convert import export_command, import_command
from dd_lightning.cli.errors import one_line_errors, stop
from dd_lightning.cli.evaluate import evaluate
from dd_lightning.cli.fit import fit
from dd_lightning.cli.parser import suggestion
from dd_lightning.cli.report.build import report_command
from dd_lightning.version import __version__

COMMANDS = {
    "fit": fit,
    "experts": experts,
    "evaluate": evaluate,
    "report": report_command,
    "export": export_command,
    "import": import_command,
}

USAGE = """\
usage: dd-lightning COMMAND [options]

Dataset distillation for PyTorch Lightning.

commands:
  fit        distill a dataset: train missing experts, distill, evaluate, write the run's folder
  experts    train and store expert trajectories
  evaluate   train fresh networks on a distilled set and test them on real data
  report     compare finished runs: accuracy against what it cost, and the paper's tables
  export     write a distilled set in the format of another project
  import     read a distilled set of another project

  dd-lightning fit --config quickstart                              bundled digits, on a CPU, no download
  dd-lightning fit --config A.yaml --config dynadistill             any run with DynaDistill on top
  dd-lightning fit --config A.yaml --ckpt_path last                 resume the newest run
  dd-lightning COMMAND --help                                       every option

dd-lightning --version prints the version.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run a command. Exit status 1 is bad input, 2 an unknown command or option; both print one line on stderr.

    Args:
        args: Command and options; the process's own by default.
    """
    argv = list(sys.argv[1:] if args is None else args)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in COMMANDS:
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.append(here)  # a network or an objective of your own, by its import path, as with `python -m`
        # what torch says of itself when it compiles
        warnings.filterwarnings("ignore", r"`torch\.jit\.script` is deprecated", FutureWarning)
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        with one_line_errors():
            COMMANDS[command](rest)
    elif command in ("-h", "--help"):
        sys.stdout.write(USAGE)
    elif command == "--version":
        sys.stdout.write(f"dd-lightning {__version__}\n")
    else:
        stop(f"unknown command {command!r}{suggestion(command, COMMANDS)}; use {', '.join(COMMANDS)}", status=2)
