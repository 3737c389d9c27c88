"""``--help`` that fits on a few screens: our options in full, Lightning's in a sentence each."""

import re
from argparse import Action
from collections.abc import Iterable
from typing import Any

from jsonargparse import DefaultHelpFormatter

_LIGHTNING = ("trainer.", "checkpoint.")


class HelpFormatter(DefaultHelpFormatter):
    """Leaves out the usage's list of all options, the classes of torch and Lightning, and ``--*.help`` options."""

    def add_usage(self, usage: str | None, actions: Iterable[Action], *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Add what the parser has as its usage, or nothing."""
        if usage is not None:
            super().add_usage(usage, actions, *args, **kwargs)

    def add_argument(self, action: Action) -> None:
        """Add an option; those that show the help of a class are in the index at the end."""
        if not any(option.endswith(".help") for option in action.option_strings):
            super().add_argument(action)

    def start_section(self, heading: str | None) -> None:
        """Begin a group with one sentence."""
        super().start_section(_sentence(heading or ""))

    def _get_help_string(self, action: Action) -> str:
        text = re.sub(r", known subclasses: [^)]*", "", super()._get_help_string(action))
        if action.dest.startswith(_LIGHTNING):
            return f"{_sentence(action.help or '')} (default: %(default)s)"
        return text

    def _get_type_str(self, action: Action) -> str | None:
        written = super()._get_type_str(action)
        return None if written is None else written.partition(" | Callable")[0]

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return text if "\n" in text else super()._fill_text(text, width, indent)


def _sentence(text: str) -> str:
    return re.split(r"\.\s|\s+(?:Default|Example):", text, maxsplit=1)[0].rstrip(".")
