"""`FAMILY` lists every optimizer of `jadam._optimizers`. The contract tests run on each.

Reference functions are found by name: Optax's function of the same name, and the function in ``oracle.py`` of that name
without the final ``w`` (of decoupled weight decay).
"""

import functools
import inspect
from collections.abc import Callable
from typing import NamedTuple

import optax
import oracle

import jadam

MOMENTS = {"b1": 0.8, "b2": 0.95, "eps": 1e-4}
SETTINGS = {**MOMENTS, "eps_root": 1e-6, "threshold": 4.5}  # non-default; a member gets those it has


class Member(NamedTuple):
    """An optimizer, its two references, and settings that all three accept."""

    name: str
    make: Callable  # make(learning_rate, **settings) -> transformation
    optax: Callable  # Optax's function of the same name; ours has its state and signature
    oracle: Callable  # oracle(gradients, **settings) -> directions
    settings: dict  # non-default
    decays: bool  # has weight_decay, mask and max_lr

    def __str__(self):
        return self.name


def _member(name: str) -> Member:
    make = getattr(jadam, name)
    arguments = inspect.signature(make).parameters
    settings = {x: value for x, value in SETTINGS.items() if x in arguments}
    loop = getattr(oracle, name.removesuffix("w"))
    return Member(name, make, getattr(optax, name), loop, settings, "weight_decay" in arguments)


def _is_optimizer(name: str) -> bool:
    return getattr(jadam, name).__module__.startswith("jadam._optimizers.") and not name.startswith("scale_by_")


FAMILY = [_member(name) for name in jadam.__all__ if callable(getattr(jadam, name)) and _is_optimizer(name)]

# Options that Optax lacks: (member, arguments, the matching oracle).
VARIANTS = [
    ("adam", {"eps_mode": "hat", **MOMENTS}, functools.partial(oracle.adam_hat, **MOMENTS)),
    ("adam", {"bias_correction": False, **MOMENTS}, functools.partial(oracle.adam_uncorrected, **MOMENTS)),
    (
        "adam",
        {"bias_correction": False, "eps_mode": "hat", **MOMENTS},
        functools.partial(oracle.adam_uncorrected, **MOMENTS),
    ),
    ("adam", {"nesterov": True, **MOMENTS}, functools.partial(oracle.nadam, **MOMENTS)),
    ("nadam", {"nesterov": False, **MOMENTS}, functools.partial(oracle.adam, **MOMENTS)),
    ("amsgrad", {"max_of": "v", **MOMENTS}, functools.partial(oracle.amsgrad, max_of="v", **MOMENTS)),
    (
        "amsgrad",
        {"bias_correction_mu": False, "bias_correction_nu": False, **MOMENTS},
        functools.partial(oracle.amsgrad, corrected=False, **MOMENTS),
    ),
    ("radam", {"nesterov": True, **MOMENTS}, functools.partial(oracle.radam, nesterov=True, **MOMENTS)),
    ("radam", {"b2": 0.5}, functools.partial(oracle.radam, b2=0.5)),  # rho_inf = 3: never rectified
]


def _switches(member: Member) -> list[str]:
    """Booleans that the optimizer shares with its oracle and no row of `VARIANTS` has, such as Nesterov."""
    listed = {name for who, settings, _ in VARIANTS if who == member.name for name in settings}
    shared = inspect.signature(member.make).parameters
    of_oracle = inspect.signature(member.oracle).parameters.values()
    return [p.name for p in of_oracle if isinstance(p.default, bool) and p.name in shared and p.name not in listed]


SWITCHED = [(m, {name: True}) for m in FAMILY if not m.decays for name in _switches(m)]
VARIANTS += [
    (m.name, {**switch, **MOMENTS}, functools.partial(m.oracle, **switch, **MOMENTS)) for m, switch in SWITCHED
]
