"""`jadam.record` keeps `jadam.statistics` of the right steps, in a state and program of constant size."""

import functools
import gc
import re
import sys
import weakref

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CPU, MESH, assert_equal, float32_params, update_and_apply, zip_leaves
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jadam


def tree(seed=0, dtype=np.float32):
    """NumPy arrays (no compilation)."""
    rng = np.random.default_rng(seed)
    x = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return {"layers": [x(4, 4) for _ in range(2)], "kernel": x(64, 128), "bias": x(24)}


def one_pass(tx, g, state, p):
    return jadam.step(tx, g, state, p)


@functools.cache
def jitted(tx, take=one_pass):
    """Jitted ``init``, and a jitted step that donates parameters and state."""
    step = jax.jit(lambda p, state, g: take(tx, g, state, p), donate_argnums=(0, 1))
    return jax.jit(tx.init), step


def trained(tx, p, gradients, take=one_pass, each=None):
    """Parameters and state after the steps; calls ``each(i, p, state)`` after each."""
    init, step = jitted(tx, take)
    p, state = jax.tree.map(jnp.asarray, p), init(p)
    for i, g in enumerate(gradients, start=1):
        p, state = step(p, state, g)
        if each is not None:
            each(i, p, state)
    assert step._cache_size() == 1
    return p, state


def random_gradients(steps):
    return [tree(i + 1) for i in range(steps)]


def by_name(path, p):
    return "int8" if "kernel" in path else "bfloat16" if "bias" in path else "float32"


def chained(moments):
    return jadam.exact_bf16(jadam.chain(jadam.clip_by_global_norm(1.0), jadam.adamw(1e-2, moments=moments)))


TRANSFORMATIONS = {
    "int8": (jadam.adamw(1e-2, moments="int8"), np.float32),
    "chain, exact_bf16": (chained("float32"), jnp.bfloat16),
    "chain, exact_bf16, int8": (chained("int8"), jnp.bfloat16),
    "by_path": (jadam.by_path([("bias", jadam.FROZEN), ("", {"b1": lambda t: 0.8})], 1e-2), np.float32),
}


@helpers.parametrize_grid(
    {"transformation": TRANSFORMATIONS, "take": [one_pass, update_and_apply]},
    default=["chain, exact_bf16, int8-one_pass", "by_path-one_pass"],
    slow=["int8-update_and_apply", "chain, exact_bf16-one_pass"],
)
def test_history_has_the_statistics(transformation, take):
    """Keeps the statistics of every second step, the last three; the training has the bits of one without records."""
    inner, dtype = transformation
    tx = jadam.record(inner, every=2, keep=3)
    seen = {}

    def collect(i, p, state):
        if i % 2 == 0 and i > 4:
            seen[i] = jax.tree.map(np.asarray, jadam.statistics(tx, state, p, sample=2**15))

    p, state = trained(tx, tree(dtype=dtype), random_gradients(11), take, collect)
    history = jadam.history(state)
    np.testing.assert_array_equal(history.steps, [6, 8, 10])
    frozen = {"['bias']"} if transformation is TRANSFORMATIONS["by_path"] else set()
    assert set(history.leaves) == {n for n in seen[6].leaves if n not in frozen}
    assert (len(history.leaves), "['bias']" in history.leaves) == ((3, False) if frozen else (4, True))
    for k, i in enumerate(history.steps):
        for stats, kept in [(seen[i].total, history.total)] + [
            (seen[i].leaves[n], x) for n, x in history.leaves.items()
        ]:
            for field, x in zip(stats._fields, stats, strict=True):
                # other fusions: 16 roundings a term and n = 8,248 in the sum, halved by the root
                np.testing.assert_allclose(kept[field][k], x, rtol=4140 * 2.0**-24)
    plain, alone = trained(inner, tree(dtype=dtype), random_gradients(11), take)
    exact = take is one_pass and CPU.kernel is not None
    for a, b in zip_leaves((p, state.inner_state), (plain, alone)):
        if exact:
            np.testing.assert_array_equal(a, b)
        else:  # XLA may contract other products; int8 codes and remainders amplify that
            np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), rtol=0.02, atol=2.0**16)


def test_it_never_grows():
    """State and program stay the same over 50 steps under scan, without a host callback."""
    tx = jadam.record(jadam.adam(1e-2), every=3, keep=4)
    p = jax.tree.map(jnp.asarray, tree())
    state = jitted(tx)[0](p)
    before = [(x.shape, x.dtype) for x in jax.tree.leaves(state)]
    step = lambda carry, g: (jadam.step(tx, g, carry[1], carry[0]), None)
    run = jax.jit(lambda p, state, g: jax.lax.scan(step, (p, state), g)[0], donate_argnums=(0, 1))
    gradients = jax.tree.map(lambda x: np.stack([x] * 10), tree(1))
    program = run.lower(p, state, gradients).compile()  # takes no other shapes or dtypes
    assert "callback" not in program.as_text()
    for _ in range(5):
        p, state = program(p, state, gradients)
    assert [(x.shape, x.dtype) for x in jax.tree.leaves(state)] == before
    np.testing.assert_array_equal(jadam.history(state).steps, [39, 42, 45, 48])


def test_eager_steps_compile_once(caplog):
    """Eager steps compile nothing after the first."""
    tx, p = jadam.record(jadam.adam(1e-2), every=3), jnp.ones(5)
    state = tx.init(p)
    counts = []
    for _ in range(4):
        caplog.clear()
        with jax.log_compiles():
            p, state = update_and_apply(tx, p, state, p)
        counts.append(sum("Finished XLA compilation" in record.message for record in caplog.records))
    assert counts[0] > 0
    assert counts[1:] == [0, 0, 0]


SHAPE = (1024, 1024)


@functools.cache
def compiled_step(keep):
    """Compiled step with donated arguments; ``keep=None`` records nothing."""
    tx, p = jadam.adam(1e-3), {"w": jax.ShapeDtypeStruct(SHAPE, jnp.float32)}
    tx = tx if keep is None else jadam.record(tx, keep=keep)
    return jitted(tx)[1].lower(p, jax.eval_shape(tx.init, p), p).compile()


@helpers.parametrize("keep", [10, 1000], default=["1000"])
def test_steps_without_a_record_cost_little(keep):
    """Statistics run within a loop of at most one iteration; parameters and ring are not copied."""
    program = compiled_step(keep)
    text = program.as_text()
    entry = text[text.index("ENTRY") :]
    assert len(re.findall(r" while\(", text)) == 1
    assert " conditional(" not in text
    assert not re.search(rf"= f32\[({SHAPE[0]},{SHAPE[1]}|{keep},2,11)\]\S* copy\(", text)
    assert not re.search(r" (sqrt|scatter|reduce)\(", entry)
    assert ("jadam_step" in entry) == (CPU.kernel is not None)
    alone = compiled_step(None).memory_analysis().temp_size_in_bytes
    # the loop: at most 32,768 sampled coordinates in some arrays of 4 bytes, and 1,024 bins
    assert program.memory_analysis().temp_size_in_bytes <= alone + 16 * 4 * 2**15


ADAMW = {
    "by name": jadam.adamw(1e-3, moments=by_name),
    **{moments: jadam.adamw(1e-3, moments=moments) for moments in ("float32", "int8")},
}


@helpers.parametrize_grid(
    {"tx": ADAMW, "dtype": [jnp.float32, jnp.bfloat16]},
    default=["by name-float32", "by name-bfloat16"],
    slow=[],
)
def test_statistics_are_not_hoisted_out_of_the_loop(tx, dtype):
    """XLA hoists loop-invariant code out of the loop, which would run it every step; only constants may be hoisted."""
    p = tree(dtype=dtype)
    tx = jadam.record(jadam.exact_bf16(tx) if dtype == jnp.bfloat16 else tx)
    text = jitted(tx)[1].lower(p, jax.eval_shape(tx.init, p), p).compile().as_text()
    entry = text[text.index("ENTRY") :].splitlines()
    of_the_loop = [line for line in entry if "/while/body/" in line]
    assert any("/while/body/" in line for line in text.splitlines())
    assert [line for line in of_the_loop if not re.search(r" constant\(", line)] == []


def test_describe_says_one_pass():
    p = tree()
    for tx in (jadam.adamw(1e-3, moments="int8"), jadam.chain(jadam.clip(1.0), jadam.adam(1e-3))):
        alone, record_history = jadam.describe(tx, p), jadam.describe(jadam.record(tx, keep=10), p)
        assert (record_history.one_pass, record_history.step) == (alone.one_pass, alone.step)
        assert record_history.leaves == alone.leaves
        assert record_history.bytes == alone.bytes + 10 * (5 * 11 * 4 + 4) + len("total") + sum(
            1 + len(leaf.name) for leaf in alone.leaves
        )
    bare = np.ones((10, 11), np.float32)  # its path is empty; the ring must not be taken for its state
    assert jadam.describe(jadam.record(jadam.adam(1e-3)), bare).leaves == jadam.describe(jadam.adam(1e-3), bare).leaves


def test_sharded():
    """`zero1` of `record`: the records of one device, replicated."""
    p = tree()
    tx = jadam.record(jadam.adamw(1e-2, moments="int8"), every=2, keep=2)
    divided = jadam.sharding.zero1(tx, jax.tree.map(jnp.asarray, p), MESH, "data")
    _, alone = trained(tx, p, random_gradients(5))
    p = jax.device_put(p, NamedSharding(MESH, P()))
    step = jax.jit(lambda p, state, g: jadam.step(divided, g, state, p), donate_argnums=(0, 1))
    state = divided.init(p)
    for g in random_gradients(5):
        p, state = step(p, state, g)
    assert step._cache_size() == 1
    assert all(x.sharding.is_fully_replicated for x in state.ring)
    np.testing.assert_array_equal(jadam.history(state).steps, [2, 4])
    # another order of sums: of 8,248 terms that are not negative, each sum rounds as often, by half an ulp
    np.testing.assert_allclose(state.ring.values, alone.ring.values, rtol=2 * 8248 * 2.0**-24)


def test_recording_from_a_plain_state():
    """Recording may start from a plain state, change ``every``, and be removed again."""
    plain, p = jadam.adam(1e-2), {"w": np.ones(5, np.float32)}
    p, inner = trained(plain, p, [p] * 3)
    with pytest.raises(TypeError, match=r"RecordState.*_replace\(inner_state=state\)"):
        jadam.step(jadam.record(plain), p, inner, p)
    often, seldom = jadam.record(plain, every=1, keep=3), jadam.record(plain, every=4, keep=3)
    state = often.init(p)._replace(inner_state=inner)
    for tx, n, steps in ((often, 3, [4, 5, 6]), (seldom, 6, [6, 8, 12])):
        for _ in range(n):
            p, state = jadam.step(tx, p, state, p)
        np.testing.assert_array_equal(jadam.history(state).steps, steps)
    _, inner = jadam.step(plain, p, state.inner_state, p)
    assert inner[0].count == 13


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["no parameters", "all frozen", "a wide count"])
def test_dtypes_of_the_ring_under_x64(name):
    """The ring keeps its dtypes under x64, also with a count restored as int64."""
    inner = jadam.by_path([("", jadam.FROZEN)], 0.1) if name == "all frozen" else jadam.adam(0.1)
    p = {} if name == "no parameters" else {"w": np.ones(3, np.float32)}
    tx = jadam.record(inner, every=1, keep=2)
    init, step = jitted(tx)
    state = init(p)
    if name == "a wide count":
        first, *rest = state.inner_state
        state = state._replace(inner_state=(first._replace(count=jnp.int64(5)), *rest))
    dtypes = [x.dtype for x in state.ring]
    _, new = step(p, state, p)
    assert [x.dtype for x in new.ring] == dtypes == [jnp.int32, jnp.float32, jnp.uint8]
    assert len(jadam.history(new).steps) == 1


def test_exact_bf16_from_float32():
    tx = jadam.record(jadam.exact_bf16(jadam.adam(1e-4)), every=1, keep=5)
    w = tree()
    p, state = jax.jit(lambda w: jadam.from_float32(w, tx))(w)
    assert jax.tree.structure(state) == jax.tree.structure(jax.eval_shape(tx.init, p))
    assert_equal(float32_params(p, state), w)


@pytest.mark.parametrize("take", [one_pass, update_and_apply])
def test_derivatives_through_training(take):
    """Reverse and forward derivatives are those without records, although a while loop has no reverse derivative."""

    def trained_from(tx, p):
        state = tx.init(p)
        for _ in range(3):
            p, state = take(tx, jax.grad(lambda p: jnp.sum(jnp.cos(p)))(p), state, p)
        return jnp.sum(p**2), getattr(state, "ring", None)  # returned, or XLA removes the loop as dead code

    def derivatives(tx):
        f = functools.partial(trained_from, tx)
        return jax.jit(lambda p: (jax.grad(f, has_aux=True)(p), jax.jvp(f, (p,), (p,), has_aux=True)[1:]))

    tx, p = jadam.adam(0.1), np.linspace(0.1, 1.0, 5, dtype=np.float32)
    with_it, without = (derivatives(x)(p) for x in (jadam.record(tx, every=2, keep=2), tx))
    for (a, ring), (b, _) in zip(with_it, without, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(ring.steps, [2, -1])


@pytest.mark.slow
def test_vmap_and_lowering_for_an_accelerator():
    tx = jadam.record(jadam.adam(1e-2), every=2, keep=2)
    p = jnp.ones((3, 5))
    states = jax.vmap(tx.init)(p)
    for _ in range(2):
        p, states = jax.vmap(functools.partial(jadam.step, tx))(p, states, p)
    np.testing.assert_array_equal(states.ring.steps, [[2, -1]] * 3)
    allow = [export.DisabledSafetyCheck.custom_call("jadam_step")]
    step = jax.jit(functools.partial(jadam.step, tx))
    program = export.export(step, platforms=["cuda", "tpu"], disabled_checks=allow)
    one = jnp.ones(5)
    assert "callback" not in program(one, tx.init(one), one).mlir_module()


def test_history_and_its_errors():
    tx = jadam.record(jadam.adam(1e-3), every=1, keep=3)
    p = {"layers": [np.ones((), np.float32)] * 11, "bias": np.ones(2, np.float32)}
    init = jax.jit(tx.init)
    empty = jadam.history(init(p))
    assert (len(empty.steps), repr(empty)) == (0, "History(0 records of 12 parameters)")
    assert list(empty.leaves) == [
        "['bias']",
        *(f"['layers'][{i}]" for i in range(11)),
    ]  # in the order of the parameters
    assert empty.total["step_quantiles"].shape == (0, 5)
    with pytest.raises(ValueError, match="plot needs a history with at least one record"):
        jadam.plot(empty)
    with pytest.raises(TypeError, match=r"plot needs the result of jadam\.history\(state\), got dict"):
        jadam.plot({})
    with pytest.raises(ValueError, match="No recorded statistics in this state"):
        jadam.history(jax.jit(jadam.adam(1e-3).init)(p))
    assert "<table>" in empty._repr_html_()
    batched = jax.jit(jax.vmap(tx.init))(np.ones((2, 5), np.float32))
    with pytest.raises(ValueError, match=r"must not be batched, got steps of shape \(2, 3\)"):
        jadam.history(batched)
    assert len(jadam.history(jax.tree.map(lambda x: np.asarray(x)[1], batched)).steps) == 0
    with pytest.raises(TypeError, match=r"got tracers\. Call history outside of jax\.jit"):
        jax.jit(lambda state: jadam.history(state).steps)(init(p))
    state = init(p)
    state.ring.steps.delete()
    with pytest.raises(ValueError, match=r"state\.ring\.steps was donated"):
        jadam.history(state)


PLOTTED = jadam.record(jadam.adam(optax.constant_schedule(1e-2)), every=1, keep=5)
NAMES = ["a", "b", "c", "d", "e", "$\\oops{$"]  # the last is not valid mathtext


def record_history(values):
    """History of one step for each of ``values``: gradients of six parameters of 40, 80, ... 240 coordinates."""
    fill = lambda each: {name: np.full(40 * (1 + i), each[i], np.float32) for i, name in enumerate(NAMES)}
    _, state = trained(PLOTTED, fill([1.0] * 6), [fill(each) for each in values])
    return jadam.history(state)


def random_history(steps):
    return record_history(np.random.default_rng(0).standard_normal((steps, 6)))


def draw(figure, tmp_path):
    figure.savefig(tmp_path / "drawn.png", dpi=20)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_plot_and_table(steps):
    history = random_history(steps)
    figure = jadam.plot(history)
    sizes, snr, low = figure.axes
    (bar,) = low.child_axes
    assert [axes.get_xlabel() for axes in (low, sizes, snr)] == ["step"] * 3
    assert "parameters' unit" in sizes.get_ylabel()
    assert "no unit" in snr.get_ylabel()
    assert "no unit" in bar.get_ylabel()
    assert low.collections[0].get_array().shape == (6, min(steps, 5))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert [x.get_text() for x in low.get_yticklabels()] == list(history.leaves) == sorted(f"[{x!r}]" for x in NAMES)
    table = history._repr_html_()
    assert table.count("<tr>") == 1 + 1 + 6
    assert f"{history.total['snr'][-1]:.3g}" in table


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_plot_marks_the_first_non_finite_record(bad, tmp_path):
    figure = jadam.plot(record_history([[bad if i == 3 else 1] * 6 for i in range(5)]))
    sizes, snr, _ = figure.axes
    for axes in (sizes, snr):
        assert [x for line in axes.lines if line.get_linestyle() == ":" for x in line.get_xdata()] == [4, 4]
    assert "not finite" in [text.get_text() for text in sizes.get_legend().get_texts()]
    draw(figure, tmp_path)
    left, right = (axes.get_legend().get_window_extent() for axes in (sizes, snr))
    assert 0 <= left.x0 < left.x1 < right.x0 < right.x1 <= figure.bbox.width  # neither cut nor overlapping


def test_plot_shortens_long_names(tmp_path):
    params = {"x" * 150: jnp.ones(3), "層" * 36: jnp.ones(3)}
    tx = jadam.record(jadam.adam(0.1), every=1)
    _, state = jadam.step(tx, params, tx.init(params), params)
    figure = jadam.plot(jadam.history(state))
    draw(figure, tmp_path)  # pytest turns the warning that the layout does not fit into an error
    labels = [label.get_text() for label in figure.axes[2].get_yticklabels()]
    assert [len(x) for x in labels] == [40, 40]
    assert labels[0] == f"…{'x' * 37}']"


def artists(figure):
    """The number of axes, and of all that is drawn, once it is."""
    figure.canvas.draw()
    return len(figure.axes), len(figure.findobj())


def test_a_figure_is_updated():
    """The plot is that of a new figure, and nothing of the earlier ones is left."""
    histories = [random_history(steps) for steps in (2, 5)]
    figure = jadam.plot(histories[0])
    first = [weakref.ref(axes) for axes in (*figure.axes, *figure.axes[2].child_axes)]
    assert jadam.plot(histories[1], figure) is figure
    expected = artists(jadam.plot(histories[1]))
    assert expected[0] == 3
    sizes = figure.get_size_inches().tolist()
    for _ in range(20):
        jadam.plot(histories[1], figure)
        assert artists(figure) == expected
    assert figure.get_size_inches().tolist() == sizes
    again = jadam.plot(histories[1])
    assert figure._repr_png_() == again._repr_png_()
    gc.collect()
    assert [axes() for axes in first] == [None] * 4


@pytest.mark.parametrize("layout", [None, "constrained"])
def test_a_figure_of_pyplot(layout):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(9, 7.46), layout=layout)
    figure.add_subplot().plot([1, 2])
    assert jadam.plot(random_history(3), figure) is figure
    assert artists(figure) == artists(jadam.plot(random_history(3)))
    assert figure.get_size_inches().tolist() == [9, 7.46]
    assert figure.get_layout_engine() is not None  # else labels would overlap


def test_subfigures():
    """One beside another: each is updated, and the other stays."""
    import matplotlib.figure

    whole = matplotlib.figure.Figure(figsize=(18, 7), layout="constrained")
    left, right = whole.subfigures(1, 2)
    assert jadam.plot(random_history(3), left) is left
    assert jadam.plot(random_history(4), right) is right
    others = list(right.axes)
    expected = artists(whole)
    assert expected[0] == 6
    for _ in range(3):
        jadam.plot(random_history(3), left)
        assert artists(whole) == expected
    assert all(a is b for a, b in zip(right.axes, others, strict=True))


def test_axes_of_the_users_own():
    """They stay where they are, and the colour bar is drawn once."""
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(15, 8), layout="constrained")
    grid = figure.subplots(2, 3)
    grid[0, 0].plot([1, 2])
    history = random_history(4)
    assert jadam.plot(history, axes=grid[1]) is figure
    assert list(figure.axes) == list(grid.flat)
    expected = artists(figure)
    for _ in range(3):
        assert jadam.plot(history, axes=list(grid[1])) is figure
        assert artists(figure) == expected
    assert [axes.get_title() for axes in grid[1]] == [
        "step sizes (quantiles within 25 %)",
        "signal-to-noise ratio",
        "update-to-parameter ratio (RMS)",
    ]
    assert len(grid[0, 0].lines) == 1


def test_map_divided_by_the_learning_rate():
    """The rate is that of the recorded step, which is counted from 0; where it is 0 nothing is drawn."""
    schedule = lambda count: jnp.where(count == 1, 0.0, 0.1 * 0.5**count)
    tx = jadam.record(jadam.adam(schedule), every=1)
    p = {name: 2.0 * jnp.ones(4) for name in "ab"}
    _, state = trained(tx, p, [{name: np.ones(4, np.float32) for name in p}] * 3)
    history = jadam.history(state)
    drawn = lambda **options: jadam.plot(history, **options).axes[2].collections[0].get_array()
    plain, by_schedule = drawn(), drawn(learning_rate=schedule)
    np.testing.assert_array_equal(np.ma.getmaskarray(by_schedule), [[False, True, False]] * 2)
    rates = np.array([0.1, 1, 0.025], np.float32)
    np.testing.assert_allclose(by_schedule, plain / rates, rtol=2**-22)  # the same quotient, twice rounded
    np.testing.assert_array_equal(drawn(learning_rate=0.5), plain / np.float32(0.5))
    bar = jadam.plot(history, learning_rate=0.5).axes[2].child_axes[0]
    assert bar.get_ylabel() == "ratio / learning rate (no unit)"


@pytest.mark.parametrize("names", [["a", "b"], list("abcdefg"), ["a", "b" * 20]], ids=["few", "many", "long"])
def test_a_few_lines_have_the_names_of_their_parameters(names):
    tx = jadam.record(jadam.adam(0.1), every=1)
    p = {name: jnp.ones(3) for name in names}
    _, state = trained(tx, p, [{name: np.ones(3, np.float32) for name in p}] * 2)
    _, snr, _ = jadam.plot(jadam.history(state)).axes
    labels = [text.get_text() for text in snr.get_legend().get_texts()]
    few = ["['a']", "['b']", "all parameters"]
    assert labels == (few if names == ["a", "b"] else ["all parameters", "each parameter"])


def test_where_to_plot_is_checked():
    import matplotlib.figure

    history, figure = random_history(1), matplotlib.figure.Figure()
    axes = figure.subplots(1, 3)
    with pytest.raises(TypeError, match=r"figure must be a matplotlib Figure or SubFigure, got Axes\. To draw in axes"):
        jadam.plot(history, axes[0])
    with pytest.raises(ValueError, match=r"figure or axes must be None, got both\. Pass the one to draw in\."):
        jadam.plot(history, figure, axes=axes)
    for wrong, got in ((axes[:2], "Axes, Axes"), (figure, "Figure"), ([], "none"), ([*axes[:2], 3], "Axes, Axes, int")):
        with pytest.raises(TypeError, match=f"axes must be three matplotlib Axes, for step sizes, .*, got {got}."):
            jadam.plot(history, axes=wrong)
    with pytest.raises(ValueError, match=r"learning_rate must be > 0, got 0\."):
        jadam.plot(history, learning_rate=0)
    assert len(figure.axes) == 3


# Gradients of the six parameters: of 40, 80, ... 240 of 840 coordinates.
CURVES = {
    "some are lost": lambda i: [1] + 5 * [np.nan],
    "most are 0": lambda i: 5 * [0] + [1],
    "nearly all are 0": lambda i: [1] + 5 * [0],
    "most are infinite": lambda i: 3 * [1] + 3 * [np.inf],
    "all are lost": lambda i: 6 * [np.nan],
    "all but the first are lost": lambda i: 6 * [np.nan if i else 1],
    "all are 0": lambda i: 6 * [0],
}


@pytest.mark.parametrize("name", CURVES)
def test_plot_of_degenerate_curves(name, tmp_path):
    """Draws without a warning, over the steps of all records."""
    history = record_history([CURVES[name](i) for i in range(4)])
    positive = (history.total["step_quantiles"][0] > 0) & np.isfinite(history.total["step_quantiles"][0])
    assert list(positive) == {
        "most are 0": [False] * 3 + [True] * 2,
        "all but the first are lost": [True] * 5,
    }.get(name, [False] * 5)
    figure = jadam.plot(history)
    draw(figure, tmp_path)
    sizes, snr, _ = figure.axes
    for axes in (sizes, snr):
        left, right = axes.get_xlim()
        assert left < 1
        assert 4 < right < 4.5
    if name == "all but the first are lost":
        assert sizes.lines[0].get_marker() == "o"


def test_plot_of_no_parameters():
    tx = jadam.record(jadam.adam(1e-2), every=1)
    _, state = trained(tx, {}, [{}])
    with pytest.raises(ValueError, match="plot needs a history with at least one trained parameter"):
        jadam.plot(jadam.history(state))


def test_a_history_is_equal_to_itself():
    history = random_history(1)
    assert history == history
    assert history != random_history(1)


def test_a_pandas_frame():
    import pandas

    history = random_history(7)
    frame = history.frame()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.names == ["step", "parameter"]
    assert frame.shape == (5 * 7, 11)
    assert frame.loc[(4, "['e']"), "snr"] == history.leaves["['e']"]["snr"][1]
    assert list(frame.columns[-5:]) == ["step_5%", "step_25%", "step_50%", "step_75%", "step_95%"]


@pytest.mark.parametrize(
    ("package", "call"), [("pandas", lambda history: history.frame()), ("matplotlib.figure", jadam.plot)]
)
def test_without_pandas_or_matplotlib(monkeypatch, package, call):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.split(".")[0]
    with pytest.raises(ImportError, match=f"needs {name}: pip install {name}"):
        call(random_history(1))
