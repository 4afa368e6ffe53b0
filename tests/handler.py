"""Calls the FFI handlers of the CPU and of CUDA through ctypes, with chosen buffer addresses, sizes and thread pool.

The structs mirror XLA's stable C API, ``xla/ffi/api/c_api.h``.
"""

import ctypes
import mmap
import os
import threading
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p, pointer
from typing import NamedTuple

import numpy as np

import jadam

DTYPE_CODES = {
    **{"bool": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint8": 6, "uint16": 7, "uint32": 8, "uint64": 9},
    **{"float16": 10, "float32": 11, "float64": 12, "complex64": 15, "bfloat16": 16, "complex128": 18},
    **{"float8_e5m2": 19, "int4": 21},
}
INITIALIZE, EXECUTE = 2, 3  # XLA_FFI_ExecutionStage
FUNCTIONS = 18  # number of functions in `XLA_FFI_Api`; the indices below are in its order
ERROR_CREATE, ERROR_MESSAGE, ERROR_DESTROY, STREAM, SCHEDULE, NUM_THREADS, DEVICE = 0, 1, 2, 4, 11, 12, 17
HANDLERS = {"cpu": {EXECUTE: "jadam_step"}, "cuda": {INITIALIZE: "jadam_cuda_initialize", EXECUTE: "jadam_cuda_step"}}
NO_DEVICE = 1000  # the ordinal of a device that is not there


def struct(name, **fields):
    return type(name, (Structure,), {"_fields_": [("size", c_size_t), ("extension", c_void_p), *fields.items()]})


BufferStruct = struct("BufferStruct", dtype=c_int, data=c_void_p, rank=c_int64, dims=POINTER(c_int64))
BufferList = struct("BufferList", n=c_int64, types=POINTER(c_int), values=POINTER(c_void_p))
Attributes = struct("Attributes", n=c_int64, types=POINTER(c_int), names=POINTER(c_void_p), values=POINTER(c_void_p))
Api = struct("Api", version=c_int64 * 3, internal=c_void_p, functions=c_void_p * FUNCTIONS)
CallFrame = struct(
    "CallFrame",
    api=POINTER(Api),
    context=c_void_p,
    stage=c_int,
    args=BufferList,
    rets=BufferList,
    attrs=Attributes,
    future=c_void_p,
)
CreateErrorArgs = struct("CreateErrorArgs", text=c_char_p, code=c_int)
ErrorArgs = struct("ErrorArgs", error=c_void_p, text=c_char_p)
ScheduleArgs = struct("ScheduleArgs", context=c_void_p, run=c_void_p, data=c_void_p)
NumThreadsArgs = struct("NumThreadsArgs", context=c_void_p, number=POINTER(c_int64))
StreamArgs = struct("StreamArgs", context=c_void_p, stream=c_void_p)
DeviceArgs = struct("DeviceArgs", context=c_void_p, ordinal=c_int)


class ByteSpan(Structure):
    _fields_ = [("text", c_char_p), ("n", c_size_t)]


class Array(Structure):
    _fields_ = [("dtype", c_int), ("n", c_size_t), ("data", c_void_p)]


class Buffer(NamedTuple):
    address: int
    shape: tuple[int, ...]
    dtype: str


def library():
    """The active extension as a ctypes library."""
    found = ctypes.CDLL(jadam.backends()["cpu"].reason)
    for names in HANDLERS.values():
        for name in names.values():
            getattr(found, name).restype = c_void_p
    return found


# -- pools of threads --------------------------------------------------------------------------------------------------


class Inline:
    """Runs each task at once, in the calling thread."""

    threads = 4

    def schedule(self, task):
        task()
        return True

    def after(self):
        """Called after the handler has returned."""


class Full(Inline):
    """Refuses every task."""

    def schedule(self, task):
        return False


class Late(Inline):
    """Runs every task after the handler has returned, when its buffers may be freed."""

    def __init__(self):
        self.tasks = []

    def schedule(self, task):
        self.tasks.append(task)
        return True

    def after(self):
        for task in self.tasks:
            task()


class Threads(Inline):
    """Runs each task in a new thread."""

    def __init__(self):
        self.started = []

    def schedule(self, task):
        self.started.append(threading.Thread(target=task))
        self.started[-1].start()
        return True

    def after(self):
        for thread in self.started:
            thread.join()


# -- a call ------------------------------------------------------------------------------------------------------------


ATTRIBUTES = ("rule", "format", "clipping", "scalars", "salt", "block", "run", "digits")


def attributes(leaves, digits=()) -> dict[str, np.ndarray]:
    """The handler's attributes.

    ``leaves`` is flat: for each leaf the numbers named in `ATTRIBUTES`. ``digits`` has, one leaf after the other, the
    size and stride of each digit.
    """
    by_leaf = {name: np.array(leaves[i :: len(ATTRIBUTES)], np.int64) for i, name in enumerate(ATTRIBUTES)}
    by_digit = {f"digit_{name}": np.array(digits[i::2], np.int64) for i, name in enumerate(("sizes", "strides"))}
    return by_leaf | by_digit


def mixed_radix(i, strides) -> int:
    """The sum of the digits of ``i`` times their strides; ``strides`` has the ``(size, stride)`` of each digit."""
    index = 0
    for size, stride in strides:
        i, digit = divmod(i, size)
        index += digit * stride
    return index


def call(inputs, outputs, leaves, digits=(), pool=None, platform="cpu", device=NO_DEVICE) -> str | None:
    """Calls a platform's handlers and returns the first error or None. ``inputs`` begin with scalars and count.

    Call ``pool.after`` afterwards. For CUDA call `emulated.run_call` instead.
    """
    return call_with_attributes(inputs, outputs, attributes(leaves, digits), pool, platform, device)


def call_with_attributes(
    inputs, outputs, attributes, pool=None, platform="cpu", device=NO_DEVICE, stages=None
) -> str | None:
    """As `call`, of these stages. Default: all."""
    pool = pool or Inline()
    errors: dict[int, bytes] = {}

    def create(args):
        errors[len(errors) + 1] = args.contents.text
        return len(errors)

    def message(args):
        args.contents.text = errors[args.contents.error]

    def schedule(args):
        # copied, for the struct lives only during this call
        run, data = CFUNCTYPE(None, c_void_p)(args.contents.run), args.contents.data
        if pool.schedule(lambda: run(data)):
            return None
        errors[len(errors) + 1] = b"full"
        return len(errors)

    def number(args):
        args.contents.number[0] = pool.threads

    def stream(args):
        args.contents.stream = None

    def ordinal(args):
        args.contents.ordinal = device

    functions = {
        ERROR_CREATE: CFUNCTYPE(c_void_p, POINTER(CreateErrorArgs))(create),
        ERROR_MESSAGE: CFUNCTYPE(None, POINTER(ErrorArgs))(message),
        ERROR_DESTROY: CFUNCTYPE(None, POINTER(ErrorArgs))(lambda args: None),
        SCHEDULE: CFUNCTYPE(c_void_p, POINTER(ScheduleArgs))(schedule),
        NUM_THREADS: CFUNCTYPE(c_void_p, POINTER(NumThreadsArgs))(number),
        STREAM: CFUNCTYPE(c_void_p, POINTER(StreamArgs))(stream),
        DEVICE: CFUNCTYPE(c_void_p, POINTER(DeviceArgs))(ordinal),
    }
    api = Api(ctypes.sizeof(Api))
    for place, function in functions.items():
        api.functions[place] = ctypes.cast(function, c_void_p)
    attributes_by_name = sorted(attributes.items())  # XLA sorts them too
    arrays = [Array(DTYPE_CODES["int64"], x.size, x.ctypes.data) for _, x in attributes_by_name]
    names = [ByteSpan(name.encode(), len(name)) for name, _ in attributes_by_name]
    args, keep_args = pack_buffers(inputs)
    rets, keep_rets = pack_buffers(outputs)
    attrs = Attributes(
        ctypes.sizeof(Attributes),
        None,
        len(attributes_by_name),
        (c_int * len(attributes_by_name))(*[1] * len(attributes_by_name)),
        void_pointers(list(map(pointer, names))),
        void_pointers(list(map(pointer, arrays))),
    )
    for stage in stages or HANDLERS[platform]:
        name = HANDLERS[platform][stage]
        frame = CallFrame(CallFrame.future.offset, None, pointer(api), None, stage, args, rets, attrs, None)
        error = getattr(library(), name)(byref(frame))
        if error is not None:
            return errors[error].decode()
    del keep_args, keep_rets
    return None


def pack_buffers(buffers):
    """``XLA_FFI_Args`` of buffers, and the objects that must stay alive with it."""
    structs = []
    for address, shape, dtype in buffers:
        dims = (c_int64 * max(1, len(shape)))(*shape)
        structs.append(
            BufferStruct(ctypes.sizeof(BufferStruct), None, DTYPE_CODES[dtype], address or None, len(shape), dims)
        )
    pointers = [pointer(x) for x in structs]
    types = (c_int * max(1, len(pointers)))(*[1] * len(pointers))
    return BufferList(ctypes.sizeof(BufferList), None, len(pointers), types, void_pointers(pointers)), pointers


def void_pointers(pointers):
    return (c_void_p * max(1, len(pointers)))(*[ctypes.cast(x, c_void_p) for x in pointers])


# -- huge arrays -------------------------------------------------------------------------------------------------------


class Sparse:
    """A huge array of zeros in little memory: one piece mapped repeatedly, and private pages for ``windows``."""

    PIECE, FIXED = 2**25, 0x10

    def __init__(self, shape, dtype, windows):
        self.shape, self.dtype = shape, np.dtype(dtype)
        n = int(np.prod(shape, dtype=object)) * self.dtype.itemsize
        self.size = -(-n // self.PIECE) * self.PIECE
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        file = os.memfd_create("zeros")
        os.ftruncate(file, self.PIECE)
        self.address = self.map(None, self.size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, protection=0)
        for start in range(0, self.size, self.PIECE):
            self.map(self.address + start, self.PIECE, mmap.MAP_SHARED | self.FIXED, file)
        os.close(file)
        for start, values in windows:
            begin = start * self.dtype.itemsize // mmap.PAGESIZE * mmap.PAGESIZE
            end = min(self.size, -(-(start * self.dtype.itemsize + values.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE)
            self.map(self.address + begin, end - begin, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | self.FIXED, -1)
            self.window(start, values.size)[...] = values.ravel()

    def map(self, address, size, flags, file, protection=mmap.PROT_READ | mmap.PROT_WRITE):
        found = self.libc.mmap(address, size, protection, flags, file, 0)
        assert found != ctypes.c_void_p(-1).value, os.strerror(ctypes.get_errno())
        return found

    def window(self, start, n):
        memory = (ctypes.c_char * (n * self.dtype.itemsize)).from_address(self.address + start * self.dtype.itemsize)
        return np.frombuffer(memory, self.dtype)

    @property
    def buffer(self):
        return Buffer(self.address, self.shape, str(self.dtype))

    def close(self):
        self.libc.munmap(self.address, self.size)
