"""A parser that answers a bad option with one line: its whole key, its value, and the nearest option."""

import difflib
import inspect
import re
import textwrap
from argparse import SUPPRESS
from collections.abc import Iterable
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

import dd_lightning
from dd_lightning.cli.configs import RENAMED, resolve_args
from dd_lightning.cli.errors import stop
from dd_lightning.cli.help import HelpFormatter
from dd_lightning.objectives import MatchingObjective
from dd_lightning.pools import CandidatePool

_BASES = {
    "model.objective": MatchingObjective,
    "model.pool": CandidatePool,
    "data": dd_lightning.DistillationDataModule,
    "selection": dd_lightning.TrajectorySelectionCallback,
    "evaluation": dd_lightning.EvalCallback,
}
CLASSES = {
    key: {
        name: member
        for name, member in vars(dd_lightning).items()
        if isinstance(member, type) and issubclass(member, base) and not inspect.isabstract(member)
    }
    for key, base in _BASES.items()
}
"""Options that name a class, and the package's classes that each may name; a class has options below its key."""

_UNKNOWN = re.compile(
    r"(?:Group '(?P<group>[^']+)' does not accept option|Option) '(?P<key>[^']+)'|nrecognized arguments: (?P<flag>\S+)"
)
_EXPECTED = re.compile(r"Expected an? (?:typing\.Literal\[(?P<literals>[^\]]*)\]|<class '(?:\w+\.)*(?P<type>\w+)'>)")
_TYPE_NAMES = {
    "NoneType": "null",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "list": "a list",
    "Sequence": "a list",
    "str": "a string",
}


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean ...?" with the nearest of the known names, or nothing.

    An option of the same name in another place comes before one that is merely spelled alike.
    """
    leaf = name.rpartition(".")[2]
    alike = {each: difflib.SequenceMatcher(None, leaf, each.rpartition(".")[2]).ratio() for each in known}
    best = max(alike.values(), default=0)
    names = [each for each in alike if alike[each] == best or (best < 1 and alike[each] > 0.5)]
    near = difflib.get_close_matches(name, names, 1, 0.6 if best < 1 else 0)
    return f"; did you mean {near[0]}?" if near else ""


class OneLineParser(ArgumentParser):
    """A parser that exits with one line; ``--config`` takes packaged names too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401  (jsonargparse's own)
        kwargs.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def format_help(self, *args: Any) -> str:  # noqa: ANN401
        """Return all options, and how the options of classes are listed."""
        index = ["A class has options below its key; these list them:"]
        for option in (option for action in self._actions for option in action.option_strings):
            if option.endswith(".help") and option != "--model.network.help":
                names = ", ".join(CLASSES.get(option[2:].removesuffix(".help"), ()))
                index += [f"  {option} CLASS", *textwrap.wrap(names, initial_indent=" " * 6, subsequent_indent=" " * 6)]
        self.epilog = "\n".join(index) if len(index) > 1 else None
        return super().format_help(*args)

    def parse_args(self, args: Any = None, *rest: Any, **options: Any) -> Any:  # noqa: ANN401  (jsonargparse's own)
        """Parse options."""
        if not self.exit_on_error:  # jsonargparse writes a class's options as text, where null has become None
            args = [re.sub("=None$", "=null", each) for each in args]
        return super().parse_args(resolve_args(args), *rest, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2."""
        if not self.exit_on_error:  # the options of one class: the parser around it knows the whole key
            super().error(message, ex)
        line = _describe(message, self)
        stop(f"{line}{' See' if line.endswith('?') else '; see'} {self.prog} --help", status=2)


def _describe(message: str, parser: ArgumentParser) -> str:
    """Return jsonargparse's message, which has several lines, nested in unions and classes, as a short sentence."""
    key = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)":', message)))
    if unknown := _UNKNOWN.search(message):
        name = unknown["key"] or unknown["flag"].partition("=")[0].removeprefix("--")
        whole = ".".join(part for part in (key, unknown["group"], name) if part).replace(".init_args", "")
        class_path = re.findall(r"Problem with given class_path '([\w.]+)'", message)
        return _describe_unknown(whole, key, class_path[0].rpartition(".")[2] if class_path else "", parser)
    innermost = message[message.rfind('Parser key "') :] if key else message
    if failed := re.search(r"Problem with given class_path '(.*)':\s+(.*)", innermost):
        return f"{key} is {failed[1]!r}, but {failed[2]}"
    if no_mapping := re.search(r"Unable to load config [\"'](.*)[\"']", innermost):
        return f"{key} is {no_mapping[1]!r}; it must be a mapping, or a YAML file with one"
    simple = re.search(r"(Expected an? .*)\. Got value: (.*)", innermost)
    union = re.search(r"Errors:(.*?)Given value: (.*?)$", innermost, re.DOTALL | re.MULTILINE)
    if (found := simple or union) is None:
        return message.rstrip(" .\n")
    value = "null" if found[2] == "None" else repr(found[2].strip("'")[:60])
    names = CLASSES.get(key, {})
    if nested := re.match(r"NestedArg\(key='([\w.]+)'", found[2]):
        return f"{key}.{nested[1]} is an option of a class; give {key} one of {', '.join(names)} before it"
    if names or "Expected a dot import path string" in innermost:
        known = f"one of {', '.join(names)} or " * bool(names)
        return f"{key} is {value}, which is no such class; give {known}an import path"
    expected = {
        each["literals"] or _TYPE_NAMES.get(each["type"], each["type"]): None for each in _EXPECTED.finditer(found[1])
    }
    return f"{key} is {value}; it must be {' or '.join(expected)}"


def _describe_unknown(whole: str, key: str, class_name: str, parser: ArgumentParser) -> str:
    """Describe an unknown option, which was given to a class if ``key`` is that class's own option."""
    if whole in RENAMED:
        return f"{whole} is now {RENAMED[whole]}"
    options = {
        (place, name): [f"{place}.{option}" for option in _keys(member)]
        for place, members in CLASSES.items()
        for name, member in members.items()
    }
    owners = [name for (place, name), own in options.items() if place == key and whole in own]
    if owners:
        return f"{whole} is no option of {class_name}, but of {' and '.join(owners)}"
    present = _keys(parser)
    nested = [
        option
        for (place, name), own in options.items()
        if place in present and (place != key or name == class_name)
        for option in own
    ]
    return f"{whole} is no option{f' of {class_name}' * bool(class_name)}{suggestion(whole, [*present, *nested])}"


def _keys(options: ArgumentParser | type) -> list[str]:
    """Return the keys of a parser or of the options of a class."""
    if isinstance(options, type):
        parser = ArgumentParser()
        parser.add_class_arguments(options)
        options = parser
    return [action.dest for action in options._actions if action.default is not SUPPRESS and action.dest != "config"]
