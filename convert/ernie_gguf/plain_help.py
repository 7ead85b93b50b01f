"""Help texts in the form that every other command line has: SRC, N, FILE, [a|b]."""

import re
from gettext import gettext
from typing import Any

from typer.core import TyperCommand

# What typer shows for a type -> what people know. Other versions of typer show other words, which stay.
_TYPES = {"int range": "N", "int": "N", "float": "X", "float range": "X", "path": "PATH", "str": "TEXT"}
# Names that options had before they took llama.cpp's.
OLD_NAMES = {"--ctx": "--ctx-size", "--kv": "--cache-type-k"}
_SHOWN = re.compile(r"<([^<>]+)>")


def _plain(record: str) -> str:
    return _SHOWN.sub(lambda match: _TYPES.get(match[1]) or f"[{match[1]}]", record)


def _renamed(arg: str) -> str:
    name, equals, value = arg.partition("=")
    return f"{OLD_NAMES.get(name, name)}{equals}{value}"


class PlainCommand(TyperCommand):
    """A command whose usage line and lists show arguments as their metavar says, and that knows options' old names."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:  # noqa: ANN401 - typer's context or click's
        """What follows -- is for another program."""
        end = args.index("--") if "--" in args else len(args)
        return list(super().parse_args(ctx, [*map(_renamed, args[:end]), *args[end:]]))

    def collect_usage_pieces(self, ctx: Any) -> list[str]:  # noqa: ANN401
        """`[OPTIONS] SRC`."""
        arguments = [each for each in self.get_params(ctx) if each.param_type_name == "argument"]
        return [self.options_metavar or "", *(str(each.metavar or each.name) for each in arguments)]

    def format_options(self, ctx: Any, formatter: Any) -> None:  # noqa: ANN401
        """The arguments, then the options."""
        records: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for each in self.get_params(ctx):
            if (record := each.get_help_record(ctx)) is not None:
                name = str(each.metavar or each.name) if each.param_type_name == "argument" else _plain(record[0])
                records[each.param_type_name].append((name, record[1]))
        for kind, title in (("argument", "Arguments"), ("option", "Options")):
            if records[kind]:
                with formatter.section(gettext(title)):
                    formatter.write_dl(records[kind])
