"""Parameter shapes for ``jadam plan``: of a safetensors file or its index, a JSON file, or a Python function."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jadam._cli.output import CommandError
from jadam._core.trees import params_tree


def read_shapes(source: str) -> Any:
    """Return a tree of `jax.ShapeDtypeStruct`; raise `CommandError` if there is none. No array is read.

    Args:
        source: a ``.safetensors`` file, a ``.json`` file, or ``module:function``. The JSON file is the index of several
            safetensors files beside it, or nested objects and lists whose leaves are shapes, such as
            ``{"layer": {"kernel": [64, 128]}}``. The function takes no arguments and returns parameters, or a model.
    """
    try:
        if source.endswith(".safetensors"):
            shapes = _of_safetensors(Path(source))
        elif source.endswith(".json"):
            shapes = _of_json(Path(source))
        elif ":" in source:
            shapes = _of_function(*source.split(":", 1))
        else:
            raise CommandError(f"must be a .safetensors or .json file or module:function, got {source!r}")
        if not jax.tree.leaves(shapes):
            raise CommandError(f"no parameters are in {source!r}")
    except OSError as error:
        raise CommandError(f"--shapes: cannot read {source}: {error.strerror or error}") from None
    except CommandError as error:
        raise CommandError(f"--shapes: {error}") from None
    return shapes


def _of_safetensors(path: Path) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes in the header of a safetensors file."""
    try:
        import safetensors
    except ImportError:
        raise CommandError("safetensors is not installed; run: pip install safetensors") from None
    path.open("rb").close()  # safetensors' error has no reason
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118  # not a dict
    except safetensors.SafetensorError as error:
        raise CommandError(f"{path} is not a whole safetensors file: {error}") from None
    return {name: _struct(shape) for name, shape in shapes.items()}


def _of_json(path: Path) -> Any:
    """Shapes of the files that an index names, or written in JSON."""
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise CommandError(f"{path} is not JSON: {error}") from None
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        files = [_of_safetensors(path.parent / name) for name in sorted(set(map(str, content["weight_map"].values())))]
        return {name: x for file in files for name, x in file.items()}
    is_size = lambda x: isinstance(x, int) and not isinstance(x, bool) and x >= 0
    is_shape = lambda x: isinstance(x, list) and all(map(is_size, x))
    for leaf in jax.tree.leaves(content, is_leaf=is_shape):
        if not is_shape(leaf):
            raise CommandError(f"{path} must have lists of sizes, such as {{'kernel': [64, 128]}}, got {leaf!r}")
    return jax.tree.map(_struct, content, is_leaf=is_shape)


def _of_function(module: str, name: str) -> Any:
    """Shapes of what a function returns."""
    sys.path.insert(0, "")  # as for `python -m`
    try:
        function = getattr(importlib.import_module(module), name)
        shapes = params_tree(jax.eval_shape(function))
    except Exception as error:  # whatever the user's code raises
        raise CommandError(f"{module}:{name} raised {type(error).__name__}: {error}") from None
    finally:
        sys.path.remove("")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), shapes)


def _struct(shape) -> jax.ShapeDtypeStruct:
    """A floating array of this shape."""
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32)
