"""The family, declared once: every contract test runs over every row."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import optax
import oracle

import jadam


class Member(NamedTuple):
    """One optimizer: how to make it, its Optax namesake, its oracle, and settings that both know."""

    name: str
    make: Callable  # make(learning_rate, **settings) -> transformation
    optax: Callable  # Optax's function of the same name, whose state and signature ours must have
    oracle: Callable  # oracle(gradients, **settings) -> directions
    settings: dict  # non-default
    decays: bool = False  # has weight_decay, mask and max_lr

    def __str__(self):
        return self.name


MOMENTS = {"b1": 0.8, "b2": 0.95, "eps": 1e-4}
ROOT = {"eps_root": 1e-6}

FAMILY = [
    Member("adam", jadam.adam, optax.adam, oracle.adam, {**MOMENTS, **ROOT}),
    Member("adamw", jadam.adamw, optax.adamw, oracle.adam, {**MOMENTS, **ROOT}, decays=True),
    Member("adamax", jadam.adamax, optax.adamax, oracle.adamax, MOMENTS),
    Member("adamaxw", jadam.adamaxw, optax.adamaxw, oracle.adamax, MOMENTS, decays=True),
    Member("nadam", jadam.nadam, optax.nadam, oracle.nadam, {**MOMENTS, **ROOT}),
    Member("nadamw", jadam.nadamw, optax.nadamw, oracle.nadam, {**MOMENTS, **ROOT}, decays=True),
    Member("amsgrad", jadam.amsgrad, optax.amsgrad, oracle.amsgrad, {**MOMENTS, **ROOT}),
    Member("radam", jadam.radam, optax.radam, oracle.radam, {**MOMENTS, **ROOT, "threshold": 4.5}),
]

# Further ways to call a member: (member, arguments only jadam knows, the oracle of the result).
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
