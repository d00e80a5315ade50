"""Options of commands: `grouped` makes them from the fields of a settings class, so that each is declared once."""

import ast
import functools
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import click

from tesseract_async.cli.types import RATE, SECONDS, SHARE, SIZE, Parsed

Function = Callable[..., object]
Decorator = Callable[[Function], Function]

SECTIONS: Final = ("What matters first", "Experts", "Run", "Limits", "Network", "Advanced")
FIRST: Final = SECTIONS[0]
KINDS: Final = {"_bytes": SIZE, "_rate": RATE, "_load": SHARE, "_after": SECONDS}
"""Click types of fields whose annotations hold none, by how the fields' names end. Flags leave out the first two of
these endings, since their values have units."""
SEVERAL: Final = "; may be given several times."
NO_FLAG: Final = "no flag"
"""Marks, in its annotation, a field that has no flag: another option gives its value."""


class Flag:
    """Holds further properties of a field's flag, in the field's annotation: ``Annotated[bool, Flag("--open")]``."""

    def __init__(self, *names: str, **more: Any) -> None:
        """`names`: the flag's, where they differ from the field's. `more`: other arguments of `click.option`."""
        self.names = names
        self.more = more


@functools.cache
def options_of(settings: type) -> dict[str, Decorator]:
    """Return the options of a settings class by the names of its fields, but those with `NO_FLAG`.

    The first sentence of the docstring is the help. Name, type and default are the field's, unless its annotation holds
    a click type or a `Flag`. A field without a default must be given; one that is a tuple may be given several times.
    """
    found = dict[str, Decorator]()
    hints, sentences = get_type_hints(settings, include_extras=True), _first_sentences(settings)
    for name, parameter in inspect.signature(settings).parameters.items():
        notes: list[object] = []
        kind, more = hints[name], dict[str, Any](help=sentences.get(name, ""))
        if get_origin(kind) is Annotated:
            kind, *notes = get_args(kind)
        if NO_FLAG in notes:
            continue
        flag = next((one for one in notes if isinstance(one, Flag)), Flag())
        types = [one for one in notes if isinstance(one, click.ParamType)]
        if get_origin(kind) is tuple:
            kind = get_args(kind)[0]
            more |= {"multiple": True, "help": more["help"] and more["help"].removesuffix(".") + SEVERAL}
        if parameter.default is inspect.Parameter.empty:
            more["required"] = True
        elif parameter.default is not None and parameter.default != ():
            more |= {"default": parameter.default, "show_default": None if parameter.default != "" else False}
        kinds = [KINDS[end] for end in KINDS if name.endswith(end)]
        stem = name if types else re.sub("_(bytes|rate)$", "", name)
        more |= {"is_flag": True} if kind is bool else {"type": [*types, *kinds, _click_type(kind)][0]}
        names = flag.names or ("--" + stem.replace("_", "-"),)
        found[name] = click.option(*names, name, **more | flag.more)
    return found


def _first_sentences(settings: type) -> dict[str, str]:
    """Return the first sentences of the docstrings of a class's fields, by name. Python keeps these docstrings only in
    the source: None where a program was packed without it."""
    found: dict[str, str] = {}
    for one in reversed(settings.__mro__[:-1]):
        try:
            module = ast.parse(inspect.getsource(sys.modules[one.__module__]))
        except (OSError, TypeError):
            continue
        body = next(part.body for part in module.body if isinstance(part, ast.ClassDef) and part.name == one.__name__)
        for field, text in zip(body, body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                    found[name] = re.split(r"(?<=\.) (?=[A-Z])", " ".join(words.split()), maxsplit=1)[0]
    return found


def _click_type(kind: object) -> object:
    """Return the click type for values of this kind; None where click can tell it from the default."""
    arguments = [one for one in get_args(kind) if one is not type(None)]
    if get_origin(kind) is Literal:
        return click.Choice(arguments)
    if arguments:  # X | None
        return _click_type(arguments[0])
    parse = getattr(kind, "parse", None)
    return kind if parse is None else Parsed(str(getattr(kind, "__name__", "")).lower(), parse)


def in_section(title: str, option: Decorator) -> Decorator:
    """Return this option as one that help lists in this section, if it has sections."""

    def add(function: Function) -> Function:
        command = option(function)
        vars(getattr(command, "__click_params__")[-1])["section"] = title  # noqa: B009  (click's)
        return command

    return add


def chain(*decorators: Decorator) -> Decorator:
    """Return these decorators as one; help lists the options of the first one first."""
    return lambda function: functools.reduce(lambda command, one: one(command), reversed(decorators), function)


def grouped(
    name: str | None,
    make: Function,
    *options: Decorator,
    made: Callable[[Any], object] = lambda one: one,
    sections: Mapping[str, str] | None = None,
) -> Decorator:
    """Return a decorator that gives a command `options` and those of the settings class `make`.

    When the command runs, `make` is called with their values, and the command gets the result as its argument `name`,
    in place of the values that `make` has parameters for. `make` may also be a function; without a `name`, it is called
    for its effect. A ValueError that it raises is a usage error. `made` turns what `make` returns into what the command
    gets. `sections`: those of the help, by the fields with which they begin.
    """
    parameters = inspect.signature(make).parameters.keys()

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def command(**values: object) -> object:
            taken = {key: values.pop(key) for key in parameters & values.keys()}
            try:
                one = made(make(**taken))
            except ValueError as error:
                raise click.UsageError(str(error)) from None
            return function(**values, **({} if name is None else {name: one}))

        declared, title = list[Decorator](), SECTIONS[-1]
        for field, option in options_of(make).items() if isinstance(make, type) else ():
            title = (sections or {}).get(field, title)
            declared.append(in_section(title, option))
        return chain(*options, *declared)(command)

    return decorate


def several_option(*names: str, help: str, **more: Any) -> Decorator:
    """Return a `click.option` that may be given several times, and says so."""
    return click.option(*names, multiple=True, help=help.removesuffix(".") + SEVERAL, **more)


class Sectioned(click.Command):
    """A command whose help lists its options in sections; those without one are the advanced ones."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title in SECTIONS:
            mine = (one for one in self.get_params(ctx) if vars(one).get("section", SECTIONS[-1]) == title)
            with formatter.section(title):
                formatter.write_dl([record for one in mine if (record := one.get_help_record(ctx)) is not None])
