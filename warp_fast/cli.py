"""The command line: warp-fast train | merge | eval | doctor | bench."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_COMMANDS = {
    "train": "run WARP on a policy, from prompts to a KL-reward front",
    "merge": "merge checkpoints by SLERP of their task vectors",
    "eval": "evaluate policies, and points between SFT and each of them",
    "doctor": "say which backends and attention kernels work here, and why others do not",
    "bench": "time the ops beside their peers, print the tables, draw the roofline",
}
_MERGE = ("jsonargparse", "rich", "matplotlib", "yaml")
_MODELS = ("transformers", "safetensors", *_MERGE)
# command -> the packages that it needs, and the extra that brings them
_NEEDED = {
    "train": (_MODELS, "rl"),
    "merge": (_MERGE, "rl"),
    "eval": (_MODELS, "rl"),
    "bench": (("pytest", "rich", "matplotlib"), "bench"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0 done, 1 failed, 2 wrong usage)."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help"):
        print(_usage())
        return 0 if given else 2
    command, rest = given[0], given[1:]
    if command == "--version":
        from warp_fast import __version__

        print(f"warp-fast {__version__}")
        return 0
    if command not in _COMMANDS:
        return _fail(f"unknown command {command!r}{_nearest(command, _COMMANDS)}\n{_usage()}", 2)
    if command == "doctor":
        from warp_fast import doctor

        return doctor.main(rest)
    needed, extra = _NEEDED[command]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        return _fail(f"{command} needs {', '.join(missing)}; pip install 'warp_fast[{extra}]'", 1)
    return _bench(rest) if command == "bench" else _run(command, rest)


def _usage() -> str:
    rows = [f"  {name:8} {what}" for name, what in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: warp-fast COMMAND [--config FILE.yaml] [--option VALUE ...]",
            "",
            *rows,
            "",
            "'warp-fast COMMAND --help' lists the options of a command.",
        ]
    )


def _bench(rest: list[str]) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "__main__.py").is_file():
        return _fail(
            "the benchmarks are in the repository; clone it and pip install -e .[bench]", 1
        )
    sys.path.insert(0, str(root))
    status: int = importlib.import_module("bench.__main__").main(rest)
    return status


def _run(command: str, rest: list[str]) -> int:
    from jsonargparse import ArgumentError, ArgumentParser, Namespace

    from warp_fast import commands

    # our progress shows what is going on; that of transformers would draw over it
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

    function: Callable[..., None] = getattr(commands, command)
    parser = ArgumentParser(
        prog=f"warp-fast {command}",
        description=_COMMANDS[command],
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="config", help="a YAML file of these options")
    commands.add_options(parser, command)
    _hide_appending(parser)
    words = _spread(parser, rest)
    try:
        options: Namespace = parser.parse_args(words)
    except ArgumentError as error:
        return _fail(_explained(str(error), parser), 2)
    del options["config"]
    try:
        if options.get("mergekit") is not None:
            commands.check_beside_mergekit(_chosen(parser, words, options))
        function(**parser.instantiate(options).as_dict())
    except KeyboardInterrupt:
        again = "to go on" if command == "train" else "to begin from zero"
        return _fail(f"interrupted; start the same command again {again}", 130)
    except (ValueError, TypeError, OSError) as error:
        return _fail(str(error), 1)
    return 0


def _chosen(parser: Any, words: list[str], options: Any) -> list[str]:
    """Options on the command line, and what a file of options has other than by default."""
    spelt = {word.partition("=")[0] for word in words}
    return [
        name
        for name, value in options.as_dict().items()
        if f"--{name}" in spelt or value != parser.get_default(name)
    ]


def _hide_appending(parser: Any) -> None:
    """Lists are repeated as they are; --eta+ of jsonargparse would add to the default."""
    for action in parser._actions:
        for option in [o for o in action.option_strings if o.endswith("+")]:
            action.option_strings = [o for o in action.option_strings if o != option]
            del parser._option_string_actions[option]


def _spread(parser: Any, arguments: list[str]) -> list[str]:
    """Bring options into the form that the parser knows.

    Lists take several values or are repeated: --eta 0.3 0.5 is --eta=[0.3, 0.5]. A flag alone is
    true, and a name may be spelt with hyphens: --dry-run is --dry_run=true.
    """
    hints = {
        option: str(getattr(action, "_typehint", None))
        for action in parser._actions
        for option in action.option_strings
    }
    others: list[str] = []
    values: dict[str, list[str]] = {}
    current = None
    for argument, following in zip(arguments, [*arguments, "--"][1:], strict=True):
        if not argument.startswith("--"):
            (others if current is None else values[current]).append(argument)
            continue
        name, equals, value = argument.partition("=")
        name = name if name in hints else "--" + name[2:].replace("-", "_")
        hint = hints.get(name, "")
        current = name if "list[" in hint else None
        if current is not None:
            values.setdefault(name, []).extend([value] if equals else [])
        elif hint == str(bool) and not equals and following.startswith("--"):
            others.append(f"{name}=true")
        else:
            others.append(name + equals + value if hint else argument)
    return others + [_list(name, given, hints[name]) for name, given in values.items()]


def _list(name: str, given: list[str], hint: str) -> str:
    """One option with all its values; words stay words, whatever YAML would make of them."""
    alone = len(given) == 1 and (_is_list(given[0]) or not hint.startswith("list["))
    if alone:
        return f"{name}={given[0]}"
    items = map(json.dumps, given) if "list[str]" in hint else given
    return f"{name}=[{', '.join(items)}]"


def _is_list(word: str) -> bool:
    """A list as YAML has it, and no directory with brackets in its name."""
    return word.startswith("[") and not os.path.exists(word)


def _explained(message: str, parser: Any) -> str:
    """The parser's message, with the nearest option where one is unknown."""
    known = {option for action in parser._actions for option in action.option_strings}
    names = {option.lstrip("-") for option in known}
    for word in message.replace("'", " ").replace("=", " ").replace(":", " ").split():
        name = word.lstrip("-")
        if word.startswith("--") and word not in known:
            return message + _nearest(name, names, "--")
        if "not accepted" in message and name not in names and f"'{name}'" in message:
            return message + _nearest(name, names)
    return message


def _nearest(word: str, known: Sequence[str] | set[str] | dict[str, str], prefix: str = "") -> str:
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {prefix}{near[0]}?" if near else ""


def _fail(message: str, status: int) -> int:
    print(f"warp-fast: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
