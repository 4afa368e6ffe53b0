"""`repr` of transformations is the call that made them; `describe`, `plan` and `statistics` print as tables."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import treescope
from flax import nnx
from helpers import ones

import jadam

CASES = {
    "jadam.adam(learning_rate=0.1)": lambda: jadam.adam(0.1, 0.9, b2=0.999),
    "jadam.adamw(learning_rate=<cosine_decay_schedule>, b2=0.95, moments='int8')": lambda: jadam.adamw(
        optax.cosine_decay_schedule(1.0, 9), b2=0.95, moments="int8"
    ),
    "jadam.nadam(learning_rate=0.1, momentum_decay=0.004)": lambda: jadam.nadam(0.1, momentum_decay=4e-3),
    "jadam.scale_by_radam()": lambda: jadam.scale_by_radam(),
    "jadam.by_path(rules=[('b', jadam.FROZEN), ('', {'b1': 0.8})], learning_rate=0.1)": lambda: jadam.by_path(
        [("b", jadam.FROZEN), ("", {"b1": 0.8})], 0.1
    ),
    "jadam.record(jadam.exact_bf16(jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(2.0), "
    "jadam.amsgrad(learning_rate=0.1))), every=5, keep=7, sample=32768)": lambda: jadam.record(
        jadam.exact_bf16(jadam.chain(jadam.clip(1.0), jadam.clip_by_global_norm(2.0), jadam.amsgrad(0.1))), 5, 7
    ),
}


def test_transformations():
    for text, make in CASES.items():
        assert repr(make()) == text
        assert treescope.render_to_text(make()) == text
    mask = {f"layer {i}": True for i in range(1000)}
    assert len(repr(jadam.adamw(0.1, mask=mask))) < 300
    lambdas = repr(jadam.adam(lambda count: 0.1))
    assert "0x" not in lambdas


def test_repr_within_flax():
    """The repr survives `nnx.Optimizer`, and two transformations keep their own."""
    a, b = jadam.adam(0.1), jadam.adam(0.2)
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0), kernel_init=nnx.initializers.zeros)
    optimizer = nnx.Optimizer(model, a, wrt=nnx.Param)
    assert repr(optimizer.tx) == repr(a) == "jadam.adam(learning_rate=0.1)"
    assert repr(b) == "jadam.adam(learning_rate=0.2)"


def test_states_are_plain_named_tuples():
    text = treescope.render_to_text(jadam.record(jadam.adam(0.1), keep=2).init(ones(2)))
    assert text.startswith("RecordState(")
    assert "ScaleByAdamState(" in text


def test_tables():
    params = {"<b>": ones((64, 128)), "c": ones(3)}
    described = jadam.describe(jadam.adam(0.1, moments="int8"), params)._repr_html_()
    assert described.count("<tr>") == 4
    assert "&lt;b&gt;" in described
    assert "<b>" not in described
    assert (
        '<td style="padding: 2px 5px; text-align: right">16,896</td>' in described
    )  # 64 * 128 * 2 bytes of codes, 64 * 2 scales of 4 bytes
    planned = jadam.plan(jadam.adam(0.1), params, {"data": 2}, "data")._repr_html_()
    assert planned.count("<tr>") == 7
    assert "8,195 parameters on 2 devices" in planned
    assert "state not sharded" in planned


def test_statistics_print_as_a_table():
    tx, params = jadam.adam(0.1), {"<b>": ones(3), "c": ones(2)}
    grads = {"<b>": ones(3), "c": -np.ones(2, np.float32)}
    seen = []

    @jax.jit
    def step(params):
        params, state = jadam.step(tx, grads, tx.init(params), params)
        seen.append(jadam.statistics(tx, state, params))
        return params, state, seen[0]

    params, state, stats = step(params)
    titles, *rows = (line.split() for line in str(stats).splitlines())
    assert titles[:2] == ["parameter", "moment_rms"]
    assert [row[0] for row in rows] == ["total", "['<b>']", "['c']"]
    for row, measures in zip(rows, (stats.total, *stats.leaves.values()), strict=True):
        assert row[1:] == [*(f"{float(x):.3g}" for x in measures[:-1]), f"{float(measures.step_quantiles[2]):.2g}"]
    assert stats._repr_html_().count("<tr>") == 4
    assert "&lt;b&gt;" in stats._repr_html_()
    assert str(jax.device_get(stats)) == str(stats)
    many = jax.tree.map(lambda x: np.asarray(x)[None], (state, params))
    statistics = lambda *of: jadam.statistics(tx, *of)
    shapes = jax.eval_shape(statistics, state, params)
    batched = jax.tree.map(
        lambda x: jnp.asarray(np.ones(x.shape, x.dtype)), jax.eval_shape(jax.vmap(statistics), *many)
    )
    means = jax.tree.map(lambda x: jnp.asarray(np.mean(x)), stats)
    none = stats._replace(leaves={"a": None})
    for other in (batched, shapes, means, none, stats._replace(total=None), *seen):
        assert str(other) == repr(other)
        assert other._repr_html_() is None
