"""Final loss, memory and speed of training GPT-2 small with every format: ``python -m benchmarks train``.

A model of 124,439,808 parameters is trained on the sources of Python's standard library and of the installed packages,
in about 50,000 byte-pair tokens. All sides start from the same weights and see the same batches, one side after the
other in one process. Reported are the loss on held-out text, its ratio to float32's, bytes, peak memory, tokens a
second and the optimizer's share of a step. It needs a GPU; ``--size tiny`` trains a small model on bytes, on a CPU.

The benchmark ends within ``--minutes`` (10, or 4 with ``--quick``; 3 and 2 for the small model). All sides are compiled
and timed first; if time is short, all take fewer steps. Results are written after every training, and the same command
resumes a benchmark that was killed or ran out of time. ``--aot`` compiles every side for an H100, on a machine without.
"""


def run(options) -> dict:
    """Train every side, or compile for an H100. The environment of the compiler lacks what training imports."""
    if options.aot:
        from benchmarks.train import aot

        return aot.run(options)
    try:
        if options.size == "gpt2":
            import tokenizers  # noqa: F401

        from benchmarks.train import training
    except ModuleNotFoundError as error:
        raise SystemExit(f"train: {error.name} is not installed; run: pip install '.[bench]'") from None

    return training.run(options)
