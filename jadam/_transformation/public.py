"""What the public functions that make transformations share: a readable signature, and the call as ``repr``."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
EpsMode = Literal["paper", "hat"]
Mask = Any | Callable[[Any], Any]  # a tree of booleans, or a function from the parameters to one


class Signature(inspect.Signature):
    """A signature that prints one parameter a line, with the names of type aliases as they are written.

    `help` of Python 3.11 and 3.12 would print one long line.
    """

    def __str__(self):
        parameters = self.parameters.values()
        default = lambda p: "" if p.default is p.empty else f" = {p.default!r}"
        lines = [f"    {p.name}: {p.annotation}{default(p)}," for p in parameters]
        positional = sum(p.kind is not p.KEYWORD_ONLY for p in parameters)
        lines[positional:positional] = ["    *,"][: len(lines) - positional]  # nothing if no parameter is keyword-only
        return "\n".join(["(", *lines, f") -> {self.return_annotation}"])


def call_as_repr(function: F) -> F:
    """Decorator: the repr of the returned transformation is the call that made it, without default arguments."""
    signature = inspect.signature(function)
    parameters = signature.parameters
    is_default = lambda value, default: value is default or (isinstance(value, (int, float, str)) and value == default)

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        tx = function(*args, **kwargs)
        given = {**dict(zip(parameters, args, strict=False)), **kwargs}
        shown = [
            f"{x}={_short_repr(given[x])}"
            for x in parameters
            if x in given and not is_default(given[x], parameters[x].default)
        ]
        tx.update.made_by = f"jadam.{function.__name__}({', '.join(shown)})"
        return tx

    public = cast(Any, wrapper)
    public.__signature__ = Signature(list(parameters.values()), return_annotation=signature.return_annotation)
    return public


def _short_repr(value) -> str:
    """The repr, at most 200 characters; for functions and types their name, for schedules their factory's."""
    if inspect.isroutine(value):
        return f"<{value.__qualname__.split('.<locals>')[0].strip('<>')}>"
    text = value.__name__ if isinstance(value, type) else repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
