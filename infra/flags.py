"""Flags of a command: a frozen dataclass, a field each, with the help text as the string beneath the field."""

import ast
import inspect
import textwrap
from dataclasses import dataclass
from typing import Annotated, TypeVar

import tyro

Class = TypeVar("Class", bound=type)


def flags(cls: Class) -> Class:
    """A decorator that makes a class of annotated fields a dataclass that tyro reads from the command line.

    The strings beneath the fields become their help. Their line breaks are removed first, because tyro would print
    them and `--help` is read at 80 columns, not at the width of the source.
    """
    # tyro reads help from an annotation first, and only without one from the source.
    annotations = inspect.get_annotations(cls)
    for name, text in help_texts(cls).items():
        annotations[name] = Annotated[annotations[name], tyro.conf.arg(help=text)]
    cls.__annotations__ = annotations
    return dataclass(frozen=True)(cls)


def help_texts(cls: type) -> dict[str, str]:
    """The string beneath each field of a class, in one line."""
    # Python keeps no docstrings of fields, so the source is parsed.
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    texts = {}
    for field, text in zip(definition.body, definition.body[1:]):
        # A string on its own, directly after a field.
        is_string = isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
        if isinstance(field, ast.AnnAssign) and is_string:
            texts[field.target.id] = " ".join(text.value.value.split())
    return texts
