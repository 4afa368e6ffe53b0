"""AdamW with settings by parameter path: learning rate, weight decay, decay rates, moment format; or frozen."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jadam._core import checks
from jadam._core.numerics import at_least_float32
from jadam._core.trees import NamedLeaves, beside_params, leaf_name, leaf_names, without_metadata
from jadam._moments import formats
from jadam._moments.formats import FormatChoice
from jadam._optimizers.adam import scale_by_adam
from jadam._transformation.public import EpsMode, call_as_repr
from jadam._transformation.transformation import (
    FROZEN_RULE,
    LeafUpdate,
    LeafwiseUpdate,
    QuantizedAdamState,
    ScheduledBetasState,
    Transformation,
    UpdateFn,
    independent_decay,
    nan_if_invalid,
    schedule_value,
)


class _Frozen:
    """The settings of a parameter that never changes and has no state, for the rules of `jadam.by_path`."""

    def __repr__(self):
        return "jadam.FROZEN"

    def __reduce__(self):
        return "FROZEN"  # copies and pickles are the one object of this name


FROZEN = _Frozen()
_SCALES = ("mu_scale", "nu_scale")
SETTINGS = ("lr_mult", "weight_decay", "moments", "b1", "b2")


class ByPathState(NamedTuple):
    """State of `by_path`: the moments of all parameters, and the bias corrections of scheduled decay rates.

    ``moments`` has None for a frozen parameter. It is a `QuantizedAdamState` only if a rule may choose int8.
    ``corrections`` has a dict for each rule that is not `FROZEN`, as in `ScheduledBetasState`.
    """

    moments: optax.ScaleByAdamState | QuantizedAdamState
    corrections: tuple[dict[str, jax.Array], ...]


class _Group(NamedTuple):
    """Settings of the leaves that follow one rule."""

    name: str  # as `jadam.describe` prints it
    pattern: re.Pattern
    tx: Transformation | None = None  # `scale_by_adam` with the group's settings; None if frozen
    moments: Any = "float32"
    minus_lr: Callable[[jax.Array], Any] = lambda count: 0.0  # minus the learning rate after count steps
    weight_decay: Callable[[jax.Array], Any] = lambda count: 0.0  # likewise


@call_as_repr
def by_path(
    rules: Sequence[tuple[str, Any]],
    learning_rate: optax.ScalarOrSchedule,
    b1: optax.ScalarOrSchedule = 0.9,
    b2: optax.ScalarOrSchedule = 0.999,
    eps: optax.ScalarOrSchedule = 1e-8,
    eps_root: optax.ScalarOrSchedule = 0.0,
    weight_decay: optax.ScalarOrSchedule = 1e-4,
    *,
    nesterov: bool = False,
    eps_mode: EpsMode = "paper",
    bias_correction: bool = True,
    moments: FormatChoice = "float32",
    max_lr: float | None = None,
) -> Transformation:
    r"""`jadam.adamw` whose settings follow rules on the paths of parameters; each path must match a rule.

    Args:
        rules: pairs ``(pattern, settings)``. A parameter follows the first rule whose pattern matches its path.
            Patterns are regular expressions, used with `re.search`; `re.escape` makes one of a path. Paths are written
            as by `jax.tree_util.keystr`, without the ``.value`` that Flax NNX sometimes adds: ``['Dense_0']['kernel']``
            in Flax Linen, ``['layers'][0]['kernel']`` in NNX, ``.layers[0].weight`` in Equinox. `jadam.describe` prints
            them.
            Settings are a dict that replaces arguments below: ``weight_decay``, ``moments``, ``b1``, ``b2``, and
            ``lr_mult`` >= 0, a factor of the learning rate. Or they are `jadam.FROZEN`: the leaf never changes and has
            no state. It may be of any type, such as integers, a random key or a function, and so may its gradient.
            End with ``("", {})`` for all other parameters.
        learning_rate: as in `jadam.adamw`. So are all further arguments; they are the defaults for all rules.

    Returns:
        A transformation with state `ByPathState`; ``update`` needs ``params``. Its updates of frozen numbers are
        zeros, or None if their gradients are; of other frozen leaves None, which `jadam.step` accepts and
        `optax.apply_updates` does not. Under `jadam.exact_bf16`, frozen bfloat16 parameters keep their remainders.

    Raises:
        ValueError: at ``init``, a pattern that matches no path, or is never used because earlier patterns match the
            same paths, or a path that no pattern matches; an unknown setting; see also `jadam.adamw`.
        TypeError: ``rules`` is not a list of such pairs; see also `jadam.adamw`.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> params = {"embed": jnp.ones((64, 128)), "dense": {"kernel": jnp.ones((128, 64)), "bias": jnp.ones(64)}}
        >>> rules = [("embed", jadam.FROZEN), ("bias", {"weight_decay": 0.0, "lr_mult": 2.0}), ("", {})]
        >>> tx = jadam.by_path(rules, learning_rate=1e-3, moments="int8")
        >>> for leaf in jadam.describe(tx, params).leaves:
        ...     print(leaf.name, leaf.bytes, leaf.reason)
        ['dense']['bias'] 514 'bias' weight_decay=0.0 lr_mult=2.0 moments='int8': 1-dimensional, int8 needs 2 dimensions
        ['dense']['kernel'] 17408 '' moments='int8'
        ['embed'] 0 'embed' jadam.FROZEN
    """
    defaults = {"b1": b1, "b2": b2, "weight_decay": weight_decay, "moments": moments, "lr_mult": 1.0}
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction}
    learning_rate = checks.hyperparameter("learning_rate", learning_rate, ">= 0", hint="To maximise, negate the loss.")
    if max_lr is not None:
        max_lr = checks.hyperparameter("max_lr", max_lr, "> 0", schedule=False)

    def group(pattern, settings) -> _Group:
        """Return the `_Group` of one rule, with its settings merged into the defaults."""
        pattern = _compile_pattern(pattern)
        if settings is FROZEN:
            return _Group(f"{pattern.pattern!r} {settings!r}", pattern)
        merged: dict[str, Any] = {**defaults, **_check_settings(pattern.pattern, settings)}
        make = lambda moments: scale_by_adam(merged["b1"], merged["b2"], eps, eps_root, moments=moments, **switches)
        choice: Any = formats.by_name_or_function(merged["moments"])
        if not callable(choice):
            make(choice)  # for the checks that apply to names only
        # With a function for moments, the state of every group is a QuantizedAdamState; see `_scales_by_leaf`.
        tx = make((lambda path, p: choice) if isinstance(choice, str) else choice)
        lr_mult = checks.hyperparameter("lr_mult", merged["lr_mult"], ">= 0", schedule=False)
        decay = nan_if_invalid("weight_decay", checks.hyperparameter("weight_decay", merged["weight_decay"], ">= 0"))
        decay = decay if max_lr is None else independent_decay(decay, max_lr)
        shown = settings if choice == "float32" else {**settings, "moments": choice}
        name = " ".join([repr(pattern.pattern), *(f"{key}={value!r}" for key, value in shown.items())])
        minus_lr = lambda count: -(schedule_value(nan_if_invalid("learning_rate", learning_rate), count) * lr_mult)
        return _Group(name, pattern, tx, choice, minus_lr, lambda count: schedule_value(decay, count))

    groups = [group(*rule) for rule in _check_rules(rules)]
    may_be_int8 = any(group.moments == "int8" or callable(group.moments) for group in groups)
    state_type = QuantizedAdamState if may_be_int8 else optax.ScaleByAdamState

    def is_frozen(name) -> bool:
        """Whether the parameter follows a rule that is `FROZEN`."""
        return next((group.tx is None for group in groups if group.pattern.search(name)), False)

    def init(params) -> Any:
        _check_patterns(groups, leaf_names(params), _names_of_none(params))
        params = update.without_untrainable(params, params)
        checks.check_trainable(params, "params")
        partition = _Partition(groups, params)
        corrections, states = _split_corrections(
            [group.tx.init(partition.take(k, params)) for k, group in partition.trained]
        )
        merged = {}
        for name in _arrays_of(state_type):
            leaves = partition.merged_leaves([getattr(x, name) for x in states])
            merged[name] = partition.structure.unflatten(leaves)
            checks.check_dtypes_kept(merged[name], [x for x in leaves if x is not None])
            merged[name] = beside_params(merged[name]) if name in _SCALES else merged[name]
        version = {"version": formats.version()} if may_be_int8 else {}
        return ByPathState(state_type(jnp.zeros([], jnp.int32), **merged, **version), corrections)

    def leafwise(updates, state, params) -> LeafwiseUpdate:
        if params is None:
            raise ValueError("by_path needs params: call update(updates, state, params).")
        checks.check_gradients(updates, state, params, params_may_be_shapes=True)
        checks.check_state_type(state, ByPathState)
        if getattr(state.moments, "_fields", None) != optax.ScaleByAdamState._fields:
            checks.check_state_type(state.moments, QuantizedAdamState)  # earlier versions always had this one
        for name in ("mu", "nu"):
            _check_tree(is_frozen, params, getattr(state.moments, name), f"state.moments.{name}")
        partition = _Partition(groups, updates)
        scales = _scales_by_leaf(state.moments, partition)
        version: Any = getattr(state.moments, "version", np.full(formats.VERSION, formats.VERSION - 1, np.int8))
        count = state.moments.count
        leaf_updates: list = [None] * len(partition.group_of_leaf)
        rebuilders = []
        all_corrections = state.corrections
        if len(all_corrections) != len(partition.trained):
            if any(all_corrections):
                raise ValueError(
                    f"state.corrections must be of {len(partition.trained)} rules, got {len(all_corrections)}: it was "
                    "made with other rules, some with scheduled decay rates. Make it anew with tx.init(params)."
                )
            all_corrections = ({},) * len(partition.trained)
        for (k, group), corrections in zip(partition.trained, all_corrections, strict=True):
            mu, nu = partition.take(k, state.moments.mu), partition.take(k, state.moments.nu)
            mu_scale, nu_scale = (partition.take_leaves(k, x) for x in scales)
            own = QuantizedAdamState(count, mu, nu, mu_scale, nu_scale, version)
            own = ScheduledBetasState(corrections, own) if corrections else own
            own_updates, rebuild_state = group.tx.update.leafwise(
                partition.take(k, updates), own, partition.take(k, params)
            )
            rebuilders.append((partition.indices[k], rebuild_state))
            changes = {"minus_lr": group.minus_lr(count), "weight_decay": group.weight_decay(count), "group": group}
            for i, leaf in zip(partition.indices[k], own_updates, strict=True):
                leaf_updates[i] = leaf._replace(**changes)
        for i, g in enumerate(jax.tree.leaves(updates)):
            if leaf_updates[i] is None:
                leaf_updates[i] = LeafUpdate(
                    FROZEN_RULE,
                    hyperparams=None,
                    dtype=at_least_float32(g),
                    format=formats.FORMATS["float32"],
                    stored=(),
                    salt=0,
                    count=count,
                    group=groups[partition.group_of_leaf[i]],
                )

        def rebuild_state(state_arrays):
            """The new state, merged from those of the groups."""
            corrections, states = _split_corrections(
                [rebuild([state_arrays[i] for i in indices]) for indices, rebuild in rebuilders]
            )
            merged = {name: partition.merge([getattr(x, name) for x in states]) for name in _arrays_of(state.moments)}
            for name in set(_SCALES) & set(merged):
                if jax.tree.structure(merged[name]) != jax.tree.structure(getattr(state.moments, name)):
                    merged[name] = without_metadata(merged[name])
            moments = state.moments._replace(count=optax.safe_increment(count), **merged)
            return ByPathState(moments, corrections)

        return LeafwiseUpdate(leaf_updates, rebuild_state)

    update = UpdateFn(leafwise, is_frozen=is_frozen)
    return Transformation(init, update)


class _Partition:
    """The leaves of a tree, divided into groups."""

    def __init__(self, groups: list[_Group], tree):
        self.structure, self.names = jax.tree.structure(tree), leaf_names(tree)
        self.group_of_leaf = [next(k for k, x in enumerate(groups) if x.pattern.search(name)) for name in self.names]
        self.indices = [[i for i, own in enumerate(self.group_of_leaf) if own == k] for k in range(len(groups))]
        self.trained: list = [(k, group) for k, group in enumerate(groups) if group.tx is not None]

    def take(self, k: int, tree) -> NamedLeaves:
        """Return the leaves of group ``k`` of ``tree``, which is like the partitioned tree."""
        return self.take_leaves(k, self.structure.flatten_up_to(tree))

    def take_leaves(self, k: int, leaves: list) -> NamedLeaves:
        """Return those of group ``k``."""
        return NamedLeaves(*([x[i] for i in self.indices[k]] for x in (self.names, leaves)))

    def merged_leaves(self, parts: list[NamedLeaves]) -> list:
        """Merge the leaves of all trained groups, with None for frozen leaves."""
        leaves: list = [None] * len(self.names)
        for (k, _), part in zip(self.trained, parts, strict=True):
            for i, x in zip(self.indices[k], part.leaves, strict=True):
                leaves[i] = x
        return leaves

    def merge(self, parts: list[NamedLeaves]):
        """`merged_leaves` as a tree."""
        return self.structure.unflatten(self.merged_leaves(parts))


def _arrays_of(state) -> list[str]:
    """The fields with an array for each parameter."""
    return [name for name in state._fields if name not in ("count", "version")]


def _scales_by_leaf(moments, partition: _Partition) -> list[list]:
    """Each of `_SCALES` as a list by leaf: None where ``mu`` has none, placeholders if ``moments`` has no scales."""
    has_moments = [bool(jax.tree.leaves(x)) for x in partition.structure.flatten_up_to(moments.mu)]
    scales = []
    for name in _SCALES:
        tree = getattr(moments, name, [np.zeros(1, np.int8)] * sum(has_moments))
        checks.check_one_for_each(moments.mu, tree, f"state.moments.{name}")
        leaves = iter(jax.tree.leaves(tree))
        scales.append([next(leaves) if has else None for has in has_moments])
    return scales


def _split_corrections(states) -> tuple[tuple[dict, ...], list]:
    """Split states into the bias corrections of scheduled betas and the inner states."""
    scheduled = [isinstance(x, ScheduledBetasState) for x in states]
    corrections = tuple(x.corrections if on else {} for x, on in zip(states, scheduled, strict=True))
    return corrections, [x.inner_state if on else x for x, on in zip(states, scheduled, strict=True)]


def _check_tree(is_frozen, params, moments, what: str) -> None:
    """Raise unless ``moments`` are of a tree like ``params``, naming the first leaf that differs."""
    with contextlib.suppress(ValueError):
        jax.tree.structure(params).flatten_up_to(moments)
        return
    leaves = lambda tree: jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    by_name = lambda tree: NamedLeaves(names := [leaf_name(path) for path, _ in leaves(tree)], names)
    checks.check_same_structure(by_name(params), by_name(moments), "params", what)
    # The same paths, so the difference is in the nodes' types, or a parameter is now None.
    trained = jax.tree_util.tree_map_with_path(lambda path, p: None if is_frozen(leaf_name(path)) else p, params)
    checks.check_same_structure(trained, moments, "params", what)


def _names_of_none(tree) -> list[str]:
    """The paths of None in ``tree``, where a wrapper may have left out a frozen leaf."""
    with_none = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: x is None)
    return [leaf_name(path) for path, x in with_none if x is None]


def _check_patterns(groups: list[_Group], names: list[str], names_of_none: list[str]) -> None:
    """Raise if a path matches no pattern, or a pattern no path."""
    matches = [[group.pattern.search(name) is not None for group in groups] for name in names]
    if not names:  # `optax.tree.map_params` calls init with a tree of no leaves
        return
    patterns = [group.pattern.pattern for group in groups]
    for k, pattern in enumerate(patterns):
        if "[" in pattern and any(pattern in name for name in names):  # its [...] would match a single character
            raise ValueError(
                f"by_path's pattern {pattern!r} must be a regular expression, got a path. Escape it: "
                f"re.escape({pattern!r})."
            )
        if not any(row[k] for row in matches):
            if any(groups[k].pattern.search(name) for name in names_of_none):
                continue
            raise ValueError(
                f"by_path's pattern {pattern!r} matches no path. Closest paths: {', '.join(_closest(pattern, names))}."
            )
        first = [row.index(True) for row in matches if row[k]]
        if k not in first and not groups[k].pattern.search(""):  # a default for all paths, such as "", may be unused
            raise ValueError(
                f"by_path's pattern {pattern!r} is never used: earlier patterns, such as {patterns[first[0]]!r}, match "
                "all its paths. Move it before them."
            )
    missing = [name for name, row in zip(names, matches, strict=True) if not any(row)]
    if missing:
        raise ValueError(
            f"by_path has no pattern that matches {', '.join(missing[:5])}"
            f"{f' and {len(missing) - 5} more' if len(missing) > 5 else ''}. "
            f"Closest pattern: {_closest(missing[0], patterns)[0]!r}. "
            'To give all other parameters the defaults, end rules with ("", {}).'
        )


def _closest(text: str, candidates: list[str]) -> list[str]:
    """Return the three candidates with a word most similar to a word of ``text``."""
    words = re.findall(r"\w+", text) or [""]

    def similarity(other):
        """The similarity of the most similar pair of words, in [0, 1]."""
        others = re.findall(r"\w+", other) or [""]
        return max(difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio() for a in words for b in others)

    return sorted(candidates, key=similarity, reverse=True)[:3]


def _check_rules(rules) -> list[tuple]:
    """Return ``rules``; raise unless they are a list of pairs."""
    if isinstance(rules, (str, dict)) or not isinstance(rules, Sequence) or not rules:
        raise TypeError(
            'rules must be a list of (pattern, settings), such as [("bias", {"weight_decay": 0.0}), ("", {})], got '
            f"{checks.short_repr(rules)}."
        )
    for i, rule in enumerate(rules):
        if not isinstance(rule, (tuple, list)) or len(rule) != 2:
            raise TypeError(f"rules[{i}] must be a pair (pattern, settings), got {checks.short_repr(rule)}.")
    return list(rules)


def _compile_pattern(pattern) -> re.Pattern:
    """Return the regular expression; raise if it is invalid."""
    if not isinstance(pattern, (str, re.Pattern)):
        raise TypeError(f"by_path's pattern must be a string, got {checks.short_repr(pattern)}.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"by_path's pattern {pattern!r} must be a regular expression: {error}. Escape brackets as \\[ and \\], and "
            "write .* for any text."
        ) from None


def _check_settings(pattern: str, settings) -> dict:
    """Return ``settings``; raise unless they are a dict of known names."""
    if not isinstance(settings, dict):
        raise TypeError(
            f"by_path's settings of {pattern!r} must be a dict or jadam.FROZEN, got {checks.short_repr(settings)}."
        )
    for name in settings:
        if name not in SETTINGS:
            near = difflib.get_close_matches(str(name), SETTINGS, 1)
            raise ValueError(
                f"by_path's settings of {pattern!r} must be among {', '.join(SETTINGS)}, got {name!r}."
                f"{f' Did you mean {near[0]}?' if near else ''}"
            )
    return settings
