"""AdamW with exceptions by a parameter's name: other rates, decays and formats, or none of it."""

import difflib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jadam._core import checks
from jadam._core.numerics import at_least_float32
from jadam._core.trees import NamedLeaves, leaf_name
from jadam._moments import formats
from jadam._moments.formats import Moments
from jadam._optimizers.adam import scale_by_adam
from jadam._transformation.transformation import (
    FROZEN_RULE,
    FusedUpdate,
    LeafUpdate,
    QuantizedAdamState,
    ScheduledBetasState,
    Transformation,
    Update,
    call_as_repr,
    decouple,
    nan_if_invalid,
    schedule_value,
)


class _Frozen:
    def __repr__(self):
        return "jadam.FROZEN"


FROZEN = _Frozen()
SETTINGS = ("lr_mult", "weight_decay", "moments", "b1", "b2")


class ByPathState(NamedTuple):
    """The moments of all groups together, None for a frozen leaf; and for each group what corrects scheduled betas."""

    moments: QuantizedAdamState
    corrections: tuple[dict[str, jax.Array], ...]


class _Group(NamedTuple):
    """What holds for the leaves of one rule; ``direction`` is None where they are frozen."""

    name: str
    pattern: re.Pattern
    direction: Transformation | None
    moments: Any
    minus_lr: Callable[[jax.Array], Any]  # of the steps taken
    weight_decay: Callable[[jax.Array], Any]


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
    eps_mode: str = "paper",
    bias_correction: bool = True,
    moments: Moments = "float32",
    max_lr: float | None = None,
) -> Transformation:
    r"""`jadam.adamw` with exceptions by path.

    Args:
        rules: pairs ``(pattern, settings)``; a parameter follows the first whose pattern is found in its path. Patterns
            are regular expressions, as for `re.search`; paths are as `jax.tree_util.keystr` writes them, without the
            ``.value`` that Flax NNX adds in places: ``['Dense_0']['kernel']`` in Flax Linen,
            ``['layers'][0]['kernel']`` in NNX, ``.layers[0].weight`` in Equinox. `jadam.describe` prints them.
            Settings are a dict of what differs from the arguments below: ``lr_mult`` >= 0, which multiplies the
            learning rate, ``weight_decay``, ``moments``, ``b1``, ``b2``; or `jadam.FROZEN`: the parameter stays what it
            is and has no state. End with ``("", {})`` for all others.
        learning_rate, b1, b2, eps, eps_root, weight_decay, nesterov, eps_mode, bias_correction, moments, max_lr: as for
            `jadam.adamw`, for every parameter that its rule does not except.

    Returns:
        A transformation with state `ByPathState`; ``update`` needs ``params``. Under `jadam.exact_bf16` frozen bfloat16
        parameters keep their remainders.

    Raises:
        ValueError: a pattern found in no path, or only in those that follow rules before it, or a path in which none is
            found, at ``init``; a setting that does not exist; and what `jadam.adamw` raises.
        TypeError: rules that are no such pairs; and what `jadam.adamw` raises.

    Example:
        >>> import jax.numpy as jnp, jadam
        >>> params = {"embed": jnp.ones((64, 128)), "dense": {"kernel": jnp.ones((128, 64)), "bias": jnp.ones(64)}}
        >>> rules = [("embed", jadam.FROZEN), ("bias", {"weight_decay": 0.0, "lr_mult": 2.0}), ("", {})]
        >>> tx = jadam.by_path(rules, learning_rate=1e-3, moments="int8")
        >>> for leaf in jadam.describe(tx, params).leaves:
        ...     print(leaf.name, leaf.bytes, leaf.reason)
        ['dense']['bias'] 514 'bias' weight_decay=0.0 lr_mult=2.0 moments='int8': 1-dimensional, int8 needs 2 axes
        ['dense']['kernel'] 17408 '' moments='int8'
        ['embed'] 0 'embed' jadam.FROZEN
    """
    defaults = {"b1": b1, "b2": b2, "weight_decay": weight_decay, "moments": moments, "lr_mult": 1.0}
    switches = {"nesterov": nesterov, "eps_mode": eps_mode, "bias_correction": bias_correction}
    learning_rate = checks.hyperparameter("learning_rate", learning_rate, ">= 0", hint="To maximise, negate the loss.")
    if max_lr is not None:
        max_lr = checks.hyperparameter("max_lr", max_lr, "> 0", schedule=False)

    def group(pattern, settings) -> _Group:
        pattern = _pattern(pattern)
        if settings is FROZEN:
            nothing = lambda count: 0.0
            return _Group(f"{pattern.pattern!r} {settings!r}", pattern, None, "float32", nothing, nothing)
        own: dict[str, Any] = {**defaults, **_settings(pattern.pattern, settings)}
        make = lambda moments: scale_by_adam(own["b1"], own["b2"], eps, eps_root, moments=moments, **switches)
        named: Any = own["moments"]
        if not callable(named):
            make(named)  # raises what only a name can
        of_leaf: Any = (lambda path, p: named) if isinstance(named, str) else named  # so that all states have one type
        direction = make(of_leaf)
        lr_mult = checks.hyperparameter("lr_mult", own["lr_mult"], ">= 0", schedule=False)
        decay = nan_if_invalid("weight_decay", checks.hyperparameter("weight_decay", own["weight_decay"], ">= 0"))
        decay = decay if max_lr is None else decouple(decay, max_lr)
        told = settings if named == "float32" else {**settings, "moments": named}
        text = " ".join([repr(pattern.pattern), *(f"{name}={value!r}" for name, value in told.items())])
        minus_lr = lambda count: -(schedule_value(nan_if_invalid("learning_rate", learning_rate), count) * lr_mult)
        return _Group(text, pattern, direction, named, minus_lr, lambda count: schedule_value(decay, count))

    groups = [group(*rule) for rule in _pairs(rules)]
    trees = [name for name in QuantizedAdamState._fields if name not in ("count", "version")]

    def init(params) -> Any:
        checks.trainable(params, "params")
        parts = _Parts(groups, params)
        states = [group.direction.init(parts.only(k, params)) for k, group in parts.moving]
        corrections, states = _apart(states)
        merged = {name: parts.together([getattr(x, name) for x in states]) for name in trees}
        return ByPathState(
            QuantizedAdamState(jnp.zeros([], jnp.int32), **merged, version=formats.version()), corrections
        )

    def fuse(updates, state, params) -> FusedUpdate:
        if params is None:
            raise ValueError("by_path needs params: call update(updates, state, params).")
        checks.gradients(updates, state, params, planning=True)
        checks.state_of(state, ByPathState)
        checks.state_of(state.moments, QuantizedAdamState)
        parts = _Parts(groups, updates)
        count = state.moments.count
        leaf_updates: list = [None] * len(parts.of_leaf)
        rebuilders = []
        for (k, group), corrections in zip(parts.moving, state.corrections, strict=True):
            own = state.moments._replace(**{name: parts.only(k, getattr(state.moments, name)) for name in trees})
            own = ScheduledBetasState(corrections, own) if corrections else own
            planned, rebuild_state = group.direction.update.fuse(parts.only(k, updates), own, parts.only(k, params))
            rebuilders.append((parts.indices[k], rebuild_state))
            decay = group.weight_decay(count)
            changes = {"minus_lr": group.minus_lr(count), "weight_decay": decay, "group": group}
            for i, leaf_update in zip(parts.indices[k], planned, strict=True):
                leaf_updates[i] = leaf_update._replace(**changes)
        for i, g in enumerate(jax.tree.leaves(updates)):
            if leaf_updates[i] is None:
                frozen = groups[parts.of_leaf[i]]
                leaf_updates[i] = LeafUpdate(
                    FROZEN_RULE, None, at_least_float32(g), formats.FORMATS["float32"], (), 0, count, group=frozen
                )

        def rebuild_state(stored):
            states = [rebuild_state([stored[i] for i in indices]) for indices, rebuild_state in rebuilders]
            corrections, states = _apart(states)
            merged = {name: parts.together([getattr(x, name) for x in states]) for name in trees}
            moments = state.moments._replace(count=optax.safe_increment(count), **merged)
            return ByPathState(moments, corrections)

        return FusedUpdate(leaf_updates, rebuild_state)

    return Transformation(init, Update(fuse))


class _Parts:
    """A tree of parameters in parts, one a group."""

    def __init__(self, groups: list[_Group], tree):
        paths, self.structure = jax.tree_util.tree_flatten_with_path(tree)
        self.names = [leaf_name(path) for path, _ in paths]
        self.of_leaf = _assign(groups, self.names)
        self.indices = [[i for i, own in enumerate(self.of_leaf) if own == k] for k in range(len(groups))]
        self.moving: list = [(k, group) for k, group in enumerate(groups) if group.direction is not None]

    def only(self, k: int, tree) -> NamedLeaves:
        """The part of group ``k``."""
        try:
            leaves = self.structure.flatten_up_to(tree)
        except ValueError:
            raise ValueError(
                "state.moments must be of the gradients' tree, got another. The parameters must be those of init."
            ) from None
        return NamedLeaves(*([x[i] for i in self.indices[k]] for x in (self.names, leaves)))

    def together(self, parts: list[NamedLeaves]):
        """The tree of the parts of all groups that move, with None for the leaves of the others."""
        leaves: list = [None] * len(self.names)
        for (k, _), part in zip(self.moving, parts, strict=True):
            for i, x in zip(self.indices[k], part.leaves, strict=True):
                leaves[i] = x
        return self.structure.unflatten(leaves)


def _apart(states) -> tuple[tuple[dict, ...], list]:
    """What corrects scheduled betas, of each state, and the states themselves."""
    scheduled = [isinstance(x, ScheduledBetasState) for x in states]
    corrections = tuple(x.corrections if on else {} for x, on in zip(states, scheduled, strict=True))
    return corrections, [x.inner_state if on else x for x, on in zip(states, scheduled, strict=True)]


def _assign(groups: list[_Group], names: list[str]) -> list[int]:
    """For each path the first group whose pattern is found in it; raises where rules and paths miss each other."""
    found = [[group.pattern.search(name) is not None for group in groups] for name in names]
    if not names:  # as of the tree that `optax.tree.map_params` makes
        return []
    for k, group in enumerate(groups):
        if not any(row[k] for row in found):
            raise ValueError(
                f"by_path's pattern {group.pattern.pattern!r} is found in no path. Near: "
                f"{', '.join(_near(group.pattern.pattern, names))}."
            )
        earlier = [row.index(True) for row in found if row[k]]
        if k not in earlier and len(earlier) < len(
            names
        ):  # one that is found in all, such as "", may be the last resort
            raise ValueError(
                f"by_path's pattern {group.pattern.pattern!r} comes too late: all that it is found in follows "
                f"{groups[earlier[0]].pattern.pattern!r} or another before it. Put it first."
            )
    lost = [name for name, row in zip(names, found, strict=True) if not any(row)]
    if lost:
        more = f" and {len(lost) - 5} more" if len(lost) > 5 else ""
        near = _near(lost[0], [group.pattern.pattern for group in groups])
        raise ValueError(
            f"by_path has no rule for {', '.join(lost[:5])}{more}; nearest pattern: {near[0]!r}. End "
            'the rules with ("", {}) to treat all others by the defaults.'
        )
    return [row.index(True) for row in found]


def _near(text: str, among: list[str]) -> list[str]:
    """The three of ``among`` that have words most like those of ``text``."""
    words = re.findall(r"\w+", text) or [""]

    def likeness(other):
        others = re.findall(r"\w+", other) or [""]
        return max(difflib.SequenceMatcher(None, a.lower(), b.lower()).ratio() for a in words for b in others)

    return sorted(among, key=likeness, reverse=True)[:3]


def _pairs(rules) -> list[tuple]:
    if isinstance(rules, (str, dict)) or not isinstance(rules, Sequence) or not rules:
        example = '[("bias", {"weight_decay": 0.0}), ("", {})]'
        raise TypeError(f"rules must be a list of (pattern, settings), such as {example}, got {checks.shown(rules)}.")
    for i, rule in enumerate(rules):
        if not isinstance(rule, (tuple, list)) or len(rule) != 2:
            raise TypeError(f"rules[{i}] must be a pair (pattern, settings), got {checks.shown(rule)}.")
    return list(rules)


def _pattern(pattern) -> re.Pattern:
    if not isinstance(pattern, (str, re.Pattern)):
        raise TypeError(f"by_path's pattern must be a string, got {checks.shown(pattern)}.")
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"by_path's pattern {pattern!r} is no regular expression: {error}. Brackets are escaped as \\[ and \\]."
        ) from None


def _settings(pattern: str, settings) -> dict:
    if not isinstance(settings, dict):
        raise TypeError(
            f"by_path's settings of {pattern!r} must be a dict or jadam.FROZEN, got {checks.shown(settings)}."
        )
    for name in settings:
        if name not in SETTINGS:
            near = difflib.get_close_matches(str(name), SETTINGS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"by_path's settings of {pattern!r} must be of {', '.join(SETTINGS)}, got {name!r}.{hint}")
    return settings
