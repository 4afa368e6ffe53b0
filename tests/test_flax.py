"""`jadam.flax` agrees with Flax's own classes, which also accept every transformation of jadam."""

import contextlib
import functools
import inspect

import family
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.core import FrozenDict
from flax.training import train_state
from helpers import (
    CPU,
    INT8_OPTIMIZERS,
    assert_equal,
    assert_steps_agree,
    float32_params,
    parametrize,
    zip_leaves,
)

import jadam
import jadam.flax

KERNEL = CPU.kernel is not None

# Learning rate 1, as `assert_steps_agree` assumes.
ONE_PASS = {
    "adam": lambda: jadam.adam(1.0),
    "adamw, masked": lambda: jadam.adamw(1.0, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)),
    "bfloat16": lambda: jadam.adam(1.0, moments="bfloat16"),
    "int8": lambda: jadam.adam(1.0, moments="int8"),
    "clipped": lambda: jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(1.0), jadam.adam(1.0)),
    "exact_bf16": lambda: jadam.exact_bf16(jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adam(1.0))),
    "exact_bf16, int8": lambda: jadam.exact_bf16(jadam.adamw(1.0, moments="int8")),
}
TWO_CALLS = {
    "optax.chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), jadam.adam(1.0)),
    "optax": lambda: optax.adam(1.0),
}
ALL = ONE_PASS | TWO_CALLS


def dtype_for(name):
    return jnp.bfloat16 if "exact" in name else jnp.float32


def gradients(seed, params):
    """Gradients of all sizes in the parameters' dtypes."""
    rng = np.random.default_rng(seed)
    random = lambda p: (rng.standard_normal(p.shape) * 10.0 ** rng.uniform(-3, 3, p.shape)).astype(p.dtype)
    return jax.tree.map(random, params)


def copies(tree):
    """Leaves as NumPy arrays."""
    return jax.tree.map(np.array, tree)


def ones_like(tree):
    return jax.tree.map(np.ones_like, copies(tree))


def assert_same_step(name, path, new, expected, old):
    """Compares ``(params, state)``: equal if both are stepped by XLA, else within the kernel's tolerance."""
    if path == "xla":
        return assert_equal(new, expected)
    if "exact" in name:  # compare the float32 masters
        new, expected, old = ((float32_params(*x), x[1].inner_state) for x in (new, expected, old))
    return assert_steps_agree(new, expected, old, "int8" in name)


averaged_params = jax.jit(jadam.averaged_params)


def paths(name):
    """Values of ``JADAM_KERNELS`` to test: XLA, and the kernel if it can take the step."""
    return ["xla", ""] if name in ONE_PASS and KERNEL else ["xla"]


# -- NNX ---------------------------------------------------------------------------------------------------------------


def random_kernel(key, shape, dtype=jnp.float32, **_):
    """An initializer that compiles little; Flax's compiles seven programs for each shape and dtype."""
    return jnp.asarray(np.random.default_rng(0).uniform(-1, 1, shape) * (3 / shape[0]) ** 0.5, dtype)


def linear(n_in, n_out, dtype=jnp.float32):
    return nnx.Linear(n_in, n_out, param_dtype=dtype, kernel_init=random_kernel, rngs=nnx.Rngs(0))


class Net(nnx.Module):
    """A model with matrices large enough for int8, a shared one, and batch statistics, which are not trained."""

    def __init__(self, dtype=jnp.float32):
        self.hidden = linear(33, 130, dtype)
        self.norm = nnx.BatchNorm(130, rngs=nnx.Rngs(0))
        self.square = linear(130, 130, dtype)
        self.again = self.square

    def __call__(self, x):
        x = nnx.relu(self.norm(self.hidden(x)))
        return self.again(nnx.relu(self.square(x)))


def loss_of(model, x):
    return jnp.mean((model(x).astype(jnp.float32) - 1) ** 2)


def gradient_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(loss_of)(model, x)
    assert optimizer.update(model, grads) is None or type(optimizer) is nnx.Optimizer
    return loss


def params_and_state(model, optimizer):
    return copies((nnx.state(model, optimizer.wrt), optimizer.opt_state))


@parametrize("name", ALL.keys(), default=["exact_bf16, int8", "optax.chain"], slow=[])
def test_nnx_agrees_with_flax(name, monkeypatch):
    """One step from the same parameters and state, three times."""
    make = lambda optimizer: (model := Net(dtype_for(name)), optimizer(model, ALL[name](), wrt=nnx.Param))
    stock, *pairs = make(nnx.Optimizer), *(make(jadam.flax.Optimizer) for _ in paths(name))
    traces = []

    def update(model, optimizer, grads):
        traces.append(type(optimizer))
        optimizer.update(model, grads)

    updates = [nnx.jit(update) for _ in (stock, *pairs)]
    for t in range(3):
        start = nnx.state(stock)
        old = params_and_state(*stock)
        for pair in pairs:
            nnx.update(pair, start)
        grads = gradients(t, nnx.state(stock[0], nnx.Param))
        updates[0](*stock, grads)
        for pair, step, path in zip(pairs, updates[1:], paths(name), strict=True):
            monkeypatch.setenv("JADAM_KERNELS", path)
            step(*pair, grads)
            assert pair[1].step[...] == t + 1
            assert_same_step(name, path, params_and_state(*pair), params_and_state(*stock), old)
    assert traces == [nnx.Optimizer] + [jadam.flax.Optimizer] * len(pairs)


@pytest.mark.slow
def test_nnx_trains_as_flax(monkeypatch):
    """Ten donated steps with evaluations in between: equal losses, which fall, and one trace."""
    monkeypatch.setenv("JADAM_KERNELS", "xla")
    x = jax.random.normal(jax.random.key(0), (64, 33))
    traces, losses = [], []

    @nnx.jit(donate_argnums=(0, 1))
    def train_step(model, optimizer, x):
        traces.append(type(optimizer))
        return gradient_step(model, optimizer, x)

    evaluate = nnx.jit(loss_of)
    for make in (jadam.flax.Optimizer, nnx.Optimizer):
        model = Net(jnp.bfloat16)
        optimizer = make(model, jadam.exact_bf16(jadam.adam(1e-2, moments="int8")), wrt=nnx.Param)
        for _ in range(10):
            model.train()
            losses.append(float(train_step(model, optimizer, x)))
            model.eval()
            losses.append(float(evaluate(model, x)))
    assert losses[:20] == losses[20:]
    assert losses[19] < 0.5 * losses[1]
    assert traces == [jadam.flax.Optimizer, nnx.Optimizer]


def test_nnx_in_place():
    """A donated step allocates its gradients only; with int8 moments Flax's Optimizer allocates more."""

    @nnx.jit(donate_argnums=(0, 1))
    def step(model, optimizer):
        optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))

    def temporaries(make):
        model = linear(512, 512)
        compiled = step.lower(model, make(model, jadam.adam(1.0, moments="int8"), wrt=nnx.Param)).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    gradient = 512 * 512 * 4  # bytes
    assert temporaries(nnx.Optimizer) > 1.1 * gradient
    assert temporaries(jadam.flax.Optimizer) < (1.1 if KERNEL else 100) * gradient


def test_nnx_split_and_merge():
    """`nnx.split` and `nnx.merge` between steps change nothing."""
    model = Net()
    optimizer = jadam.flax.Optimizer(model, jadam.adam(1e-2, moments="int8"), wrt=nnx.Param)
    step = nnx.jit(gradient_step)
    x = np.ones((4, 33), np.float32)
    step(model, optimizer, x)
    graphdef, state = nnx.split((model, optimizer))
    again = nnx.merge(graphdef, jax.tree.map(jnp.asarray, copies(state)))
    assert again[0].again is again[0].square  # still shared
    step(model, optimizer, x)
    step(*again, x)
    assert_equal(nnx.state(again), nnx.state((model, optimizer)))
    assert again[1].step[...] == 2


KERNELS, HIDDEN = nnx.PathContains("kernel"), nnx.PathContains("hidden")


@pytest.mark.parametrize(
    "wrt", [nnx.All(nnx.Param, HIDDEN), (HIDDEN, KERNELS), nnx.Not(nnx.Any(KERNELS, nnx.BatchStat))]
)
def test_nnx_filters(wrt):
    """Parameters outside of ``wrt`` stay, with or without gradients for them."""
    model, again, start = Net(), Net(), Net()
    grads = ones_like(nnx.state(model, nnx.Param))
    for x, given in ((model, nnx.filter_state(grads, wrt)), (again, grads)):
        optimizer = jadam.flax.Optimizer(x, jadam.adam(1.0), wrt=wrt)
        optimizer.update(x, given)
        assert len(jax.tree.leaves(optimizer.opt_state[0].mu)) == len(jax.tree.leaves(nnx.state(x, wrt)))
    for x, y in zip_leaves(*(nnx.state(x, wrt) for x in (model, start))):
        np.testing.assert_allclose(x, y - 1, atol=5e-7)  # two roundings of numbers up to 2
    rest = nnx.state(model, nnx.Not(wrt))
    assert jax.tree.leaves(rest)
    assert_equal(rest, nnx.state(start, nnx.Not(wrt)))
    assert_equal(nnx.state(model), nnx.state(again))


def test_nnx_convert_moments():
    """The converted state is that of an optimizer with these moments, Variables included."""
    model = nnx.Linear(64, 128, rngs=nnx.Rngs(0))
    old, new = (jadam.flax.Optimizer(model, jadam.adam(1.0, moments=x), wrt=nnx.Param) for x in ("float32", "int8"))
    for opt_state in (old.opt_state, new.opt_state):
        converted = jadam.convert_moments(opt_state, "int8")
        assert jax.tree.structure(converted) == jax.tree.structure(new.opt_state)
    new.opt_state = converted
    new.update(model, nnx.state(model, nnx.Param))


def test_nnx_extra_arguments():
    """Extra arguments are passed on to ``tx.update``."""

    def update(updates, state, params=None, *, scale):
        return jax.tree.map(lambda g: -scale * g, updates), state

    tx = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    model = linear(2, 3)
    start = copies(nnx.state(model))
    optimizer = jadam.flax.Optimizer(model, optax.chain(jadam.adam(1.0), tx), wrt=nnx.Param)

    @nnx.jit
    def take(model, optimizer, grads, scale):
        assert optimizer.update(model, grads, scale=scale) is None

    take(model, optimizer, ones_like(start), 0.0)
    assert_equal(copies(nnx.state(model)), start)
    take(model, optimizer, ones_like(start), -2.0)
    for x, y in zip_leaves(copies(nnx.state(model)), start):
        np.testing.assert_allclose(x, y - 2, atol=1e-6)  # three roundings of numbers up to 4
    assert optimizer.step[...] == 2
    with pytest.raises(TypeError, match="scale"):
        nnx.jit(lambda model, optimizer: optimizer.update(model, nnx.state(model)))(model, optimizer)


def test_nnx_graph_mode():
    """An optimizer keeps the graph mode it was made with, in Flax versions that have such modes."""
    newer = "graph" in inspect.signature(nnx.Optimizer.__init__).parameters
    model, start = Net(), Net()
    optimizer = jadam.flax.Optimizer(model, jadam.adam(1.0), wrt=nnx.Param, **({"graph": True} if newer else {}))
    grads = ones_like(nnx.state(model, nnx.Param))
    with (
        nnx.set_graph_mode(False) if newer else contextlib.nullcontext()
    ):  # in tree mode shared parameters are an error
        optimizer.update(model, grads)
    for x, y in zip_leaves(*(nnx.state(x, nnx.Param) for x in (model, start))):
        np.testing.assert_allclose(x, y - 1, atol=5e-7)  # two roundings of numbers up to 2


def test_nnx_wrong_calls():
    model = linear(2, 3)
    with pytest.raises(TypeError, match="wrt"):
        jadam.flax.Optimizer(model, jadam.adam(1.0))
    optimizer = jadam.flax.Optimizer(model, jadam.adam(1.0), wrt=nnx.Param)
    with pytest.raises(TypeError, match="grads"):
        optimizer.update(model)
    with pytest.raises(ValueError, match=r"'kernel'.*Gradients, parameters and the tree given to init must match"):
        optimizer.update(model, nnx.state(linear(3, 3)))
    assert optimizer.step[...] == 0


# -- Linen -------------------------------------------------------------------------------------------------------------


def linen_params(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    dense = {"kernel": rng.standard_normal((33, 130)) / 33**0.5, "bias": np.zeros(130)}
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), {"dense": dense, "scale": np.ones(())})


@parametrize("name", ALL.keys(), default=["clipped", "optax"], slow=[])
def test_linen_agrees_with_flax(name, monkeypatch):
    fields = {"apply_fn": None, "params": linen_params(dtype_for(name)), "tx": ALL[name]()}
    state = jadam.flax.TrainState.create(**fields)
    stock = train_state.TrainState.create(**fields)
    traces = []

    def update(state, grads):
        traces.append(type(state))
        return state.apply_gradients(grads=grads)

    updates = [jax.jit(functools.partial(update)) for _ in ("stock", *paths(name))]
    for t in range(3):
        grads = gradients(t, stock.params)
        old, stock = stock, updates[0](stock, grads)
        for step, path in zip(updates[1:], paths(name), strict=True):
            monkeypatch.setenv("JADAM_KERNELS", path)
            new = step(state.replace(step=old.step, params=old.params, opt_state=old.opt_state), grads)
            assert new.step == t + 1
            assert_same_step(name, path, *((x.params, x.opt_state) for x in (new, stock, old)))
    assert traces == [train_state.TrainState] + [jadam.flax.TrainState] * len(paths(name))


def test_linen_donated():
    """A donated step is one kernel call with the same bits."""
    state = jadam.flax.TrainState.create(apply_fn=None, params=linen_params(), tx=jadam.adam(1.0, moments="int8"))
    step = lambda state, grads: state.apply_gradients(grads=grads)
    grads = gradients(0, state.params)
    expected = jax.jit(step)(state, grads)
    donated = jax.jit(step, donate_argnums=0)
    assert donated.lower(state, grads).as_text().count("@jadam_step") == KERNEL
    assert_equal(donated(jax.tree.map(jnp.asarray, copies(state)), grads), expected)


@pytest.mark.slow
def test_linen_overwrite_with_gradient(monkeypatch):
    """fp8 layers return their new scales as gradients, which replace the old ones without the optimizer."""
    monkeypatch.setenv("JADAM_KERNELS", "xla")
    net = nn.Dense(16, dot_general_cls=nn.Fp8DirectDotGeneralOp)
    x = jax.random.normal(jax.random.key(0), (32, 16))
    variables = FrozenDict(net.init(jax.random.key(1), x))
    tx = jadam.adam(1e-2)
    states = [
        t.create(apply_fn=net.apply, params=variables, tx=tx) for t in (jadam.flax.TrainState, train_state.TrainState)
    ]

    @jax.jit
    def train_step(state):
        return state.apply_gradients(grads=jax.grad(lambda v: jnp.mean((state.apply_fn(v, x) - x) ** 2))(state.params))

    for _ in range(3):
        states = [train_step(state) for state in states]
    state, stock = states
    assert_equal(dict(state.params), dict(stock.params))
    assert_equal(state.opt_state, stock.opt_state)
    assert set(state.params) == {"params", "_overwrite_with_gradient"}
    start, end = (x["_overwrite_with_gradient"]["Fp8DirectDotGeneralOp_0"] for x in (variables, state.params))
    assert end["input_amax_history"].max() > start["input_amax_history"].max()
    assert set(state.opt_state[0].mu) == {"kernel", "bias"}


def test_linen_further_fields_and_bare_arrays():
    class WithStatistics(jadam.flax.TrainState):
        batch_stats: dict

    tx = jadam.adam(1.0)
    params = jnp.array([0.0, 3.0])
    state = WithStatistics(
        step=0, apply_fn=None, params=params, tx=tx, opt_state=tx.init(params), batch_stats={"mean": 0}
    )
    state = state.apply_gradients(grads=jnp.array([1.0, -1.0]), batch_stats={"mean": 1})
    assert type(state) is WithStatistics
    assert state.batch_stats == {"mean": 1}
    np.testing.assert_allclose(state.params, [-1, 4], rtol=3e-7)  # two roundings


# -- Flax's own classes ------------------------------------------------------------------------------------------------

MIXED = {
    True: lambda path, p: "int8" if "kernel" in path else "bfloat16",
    False: "bfloat16",
}  # {whether the optimizer has int8: moments}
EVERY = {
    f"{member} {name}": (lambda member=member, moments=moments: member.make(0.1, moments=moments))
    for member in family.FAMILY
    for name, moments in {"float32": "float32", "mixed": MIXED[member.name in INT8_OPTIMIZERS]}.items()
}
EVERY |= {
    "scheduled betas": lambda: jadam.adam(optax.linear_schedule(0.1, 0.0, 9), b1=optax.linear_schedule(0.5, 0.9, 9)),
    "jadam.chain": lambda: jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(1.0), jadam.adamw(0.1)),
    "average": lambda: optax.chain(jadam.adam(0.1), jadam.average_params(0.9)),
    "exact_bf16": lambda: jadam.exact_bf16(optax.chain(optax.clip(1.0), jadam.adam(0.1), jadam.average_params(None))),
    "exact_bf16, int8": lambda: jadam.exact_bf16(jadam.adam(0.1, moments="int8")),
}


@parametrize("name", EVERY.keys(), default=["nadamw mixed", "amsgrad mixed", "scheduled betas", "exact_bf16"], slow=[])
def test_flax_classes(name):
    """NNX's Optimizer and Linen's TrainState train every optimizer to the same bits."""
    tx = EVERY[name]()
    model = linear(33, 130, dtype_for(name))
    params = copies({"kernel": model.kernel[...], "bias": model.bias[...]})
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    linen = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    traces = []

    @jax.jit
    def linen_step(linen, grads):
        traces.append("linen")
        return linen.apply_gradients(grads=grads)

    @nnx.jit
    def nnx_step(model, optimizer, grads):
        traces.append("nnx")
        optimizer.update(model, grads)

    for t in range(3):
        grads = gradients(t, params)
        linen = linen_step(linen, grads)
        variables = nnx.state(model, nnx.Param)
        nnx.replace_by_pure_dict(variables, grads)
        nnx_step(model, optimizer, variables)
        model, optimizer = nnx.merge(*nnx.split((model, optimizer)))
    assert sorted(traces) == ["linen", "nnx"]
    assert linen.step == optimizer.step[...] == 3
    assert all((x != y).any() for x, y in zip_leaves(copies(linen.params), params))
    leaves_equal = lambda *trees: assert_equal(*map(jax.tree.leaves, trees))  # the trees have different classes
    variables = nnx.state(model, nnx.Param)
    leaves_equal((variables, optimizer.opt_state), (linen.params, linen.opt_state))
    if "average" in name:
        leaves_equal(*(averaged_params(x.opt_state) for x in (optimizer, linen)))
    if "exact" in name:
        masters = float32_params(variables, optimizer.opt_state)
        leaves_equal(masters, float32_params(linen.params, linen.opt_state))


ADAM = jadam.adam(0.1)
RECORD = jadam.record(ADAM, every=1)


@nnx.jit
def train_step(model, optimizer):
    optimizer.update(model, nnx.grad(lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2))(model))


OPTIMIZERS = {"flax": nnx.Optimizer, "jadam.flax": jadam.flax.Optimizer}


@parametrize("make", OPTIMIZERS, default=["jadam.flax"])
def test_recording_from_a_plain_state(make):
    """A plain optimizer's state becomes the inner state of a recording one."""
    model = linear(2, 3)
    earlier = make(model, ADAM, wrt=nnx.Param)
    train_step(model, earlier)
    optimizer = make(model, RECORD, wrt=nnx.Param)
    optimizer.opt_state = optimizer.opt_state._replace(inner_state=earlier.opt_state)
    for _ in range(2):
        train_step(model, optimizer)
    np.testing.assert_array_equal(jadam.history(optimizer.opt_state).steps, [2, 3])


@parametrize("make", OPTIMIZERS, default=OPTIMIZERS)
def test_statistics_of_nnx_states(make):
    """Statistics of NNX's state and parameters are those of plain arrays."""
    model, tx = linear(2, 3), ADAM
    optimizer = make(model, tx, wrt=nnx.Param)
    train_step(model, optimizer)
    told = jadam.statistics(tx, optimizer.opt_state, nnx.state(model, nnx.Param))
    plain = jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    state = jax.eval_shape(tx.init, plain)
    pure = jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(optimizer.opt_state))
    expected = jadam.statistics(tx, pure, plain)
    assert list(told.leaves) == list(expected.leaves) == ["['bias']", "['kernel']"]
    assert_equal(told, expected)
