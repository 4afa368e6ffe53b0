"""Which kernel `jadam.step` uses on each platform, and why."""

import dataclasses
import logging
import os

FUSED_BY_XLA = ("cuda", "tpu")  # where XLA takes one pass over float32 leaves


@dataclasses.dataclass(frozen=True)
class Backend:
    """The kernel that `jadam.step` uses on one platform, and the reason.

    ``kernel`` is its name, or None where XLA does the whole step.
    """

    kernel: str | None
    reason: str

    def __str__(self):
        return f"{self.kernel or 'XLA'}: {self.reason}"


def backends() -> dict[str, Backend]:
    """Return the kernel that `jadam.step` uses on each platform, and the reason.

    This starts JAX's backends, to look for NVIDIA GPUs: call `jax.distributed.initialize` first. The environment
    variable ``JADAM_KERNELS=xla`` turns all kernels off. It is read when a step is compiled.

    Returns:
        A dict with the keys ``"cpu"``, ``"cuda"`` and ``"tpu"``. Each value has ``kernel``, a name or None for XLA,
        and ``reason``. It prints as one line.

    Raises:
        ValueError: ``JADAM_KERNELS`` has another value.

    Example:
        >>> import jadam
        >>> sorted(jadam.backends())
        ['cpu', 'cuda', 'tpu']
    """
    from jadam._fused.cuda import kernel as cuda
    from jadam._fused.native import call

    if kernels_disabled():
        return dict.fromkeys(("cpu", "cuda", "tpu"), Backend(None, "JADAM_KERNELS=xla"))
    library = call.load()
    kernel = None if library.instructions is None else f"FFI, {library.instructions}"
    return {
        "cpu": Backend(kernel, library.reason),
        "cuda": cuda.backend(),
        "tpu": Backend("Pallas, Mosaic", "for int8 and bfloat16 moments and bfloat16 weights; XLA fuses the rest"),
    }


def platform_of(device) -> str:
    """Return the platform that JAX lowers for: "cuda" or "rocm", where the device only says "gpu"."""
    if device.platform == "gpu":
        return "rocm" if "rocm" in device.client.platform_version else "cuda"
    return device.platform


def kernels_disabled() -> bool:
    """Whether ``JADAM_KERNELS=xla`` is set."""
    value = os.environ.get("JADAM_KERNELS", "")
    if value not in ("", "xla"):
        raise ValueError(f"JADAM_KERNELS must be unset or 'xla', got {value!r}. Unset it.")
    return value == "xla"


_warned = set()


def warn_once(message: str, key: str | None = None) -> None:
    """Log a message, the first time with this ``key``. Default: the message."""
    if (key or message) not in _warned:
        _warned.add(key or message)
        logging.getLogger("jadam").warning(message)
