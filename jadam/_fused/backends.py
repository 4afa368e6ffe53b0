"""Which kernels there are, which of them are active, and why."""

import dataclasses
import os


@dataclasses.dataclass(frozen=True)
class Backend:
    """What serves `jadam.step` on a platform: ``kernel`` is None where it is XLA alone; ``reason`` says why."""

    kernel: str | None
    reason: str

    def __str__(self):
        return f"{self.kernel or 'XLA'}: {self.reason}"


def backends() -> dict[str, Backend]:
    """Tell what serves `jadam.step` on every platform, and why.

    ``JADAM_KERNELS=xla`` in the environment turns all kernels off; it is read whenever a step is compiled.

    Returns:
        A dict of the platforms ``"cpu"``, ``"cuda"`` and ``"tpu"``, whose values have ``kernel``, a name or None, and
        ``reason``; print one for a line.

    Raises:
        ValueError: another value of ``JADAM_KERNELS``.

    Example:
        >>> import jadam
        >>> sorted(jadam.backends())
        ['cpu', 'cuda', 'tpu']
    """
    from jadam._fused.cpu import kernel as cpu

    if off():
        return dict.fromkeys(("cpu", "cuda", "tpu"), Backend(None, "JADAM_KERNELS=xla"))
    library = cpu.load()
    kernel = None if library.instructions is None else f"FFI, {library.instructions}"
    built = Backend(kernel, library.reason)
    alone = "XLA alone is one pass over the others"
    return {
        "cpu": built,
        "cuda": Backend("Pallas, Triton", f"for int8 moments; {alone}"),
        "tpu": Backend("Pallas, Mosaic", f"for int8 and bfloat16 moments and bfloat16 weights; {alone}"),
    }


def platform_of(device) -> str:
    """The name under which JAX lowers for a device; the device of a GPU says only that it is one."""
    if device.platform == "gpu":
        return "rocm" if "rocm" in device.client.platform_version else "cuda"
    return device.platform


def off() -> bool:
    """Whether the environment turns the kernels off."""
    value = os.environ.get("JADAM_KERNELS", "")
    if value not in ("", "xla"):
        raise ValueError(f"JADAM_KERNELS must be unset or 'xla', got {value!r}. Unset it.")
    return value == "xla"
