"""Commands whose first argument may be a name on the Hub. Light: the rest is imported when such a command runs."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def takes_names(command: Callable[P, T]) -> Callable[P, T]:
    """Let the first argument of a command, `source`, be a repository: the command gets the folder of its files.

    A command that has --dry-run gets the headers alone with it.
    """

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        from .source import download, opened

        given = inspect.signature(command).bind(*args, **kwargs)
        given.apply_defaults()
        source: Path = given.arguments["source"]
        with opened(source) as place:
            if place.name is not None:
                dry = bool(given.arguments.get("dry_run"))
                given.arguments["source"] = place.folder if dry else download(place)
            return command(*given.args, **given.kwargs)

    return wrapped
