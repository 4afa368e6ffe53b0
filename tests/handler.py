"""The CPU's handler called as XLA calls it, but with addresses, sizes and threads of the caller's choice.

The structs are those of ``xla/ffi/api/c_api.h``, which XLA keeps as they are.
"""

import ctypes
import mmap
import os
import threading
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p, pointer
from typing import NamedTuple

import numpy as np

import jadam

CODES = {
    **{"bool": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "uint8": 6, "uint16": 7, "uint32": 8, "uint64": 9},
    **{"float16": 10, "float32": 11, "float64": 12, "complex64": 15, "bfloat16": 16, "complex128": 18},
    **{"float8_e5m2": 19, "int4": 21},
}
EXECUTE = 3  # the stage
FUNCTIONS = 18  # of XLA's API, in the order of `XLA_FFI_Api`
ERROR_CREATE, ERROR_MESSAGE, ERROR_DESTROY, SCHEDULE, NUM_THREADS = 0, 1, 2, 11, 12


def struct(name, **fields):
    return type(name, (Structure,), {"_fields_": [("size", c_size_t), ("extension", c_void_p), *fields.items()]})


BufferStruct = struct("BufferStruct", dtype=c_int, data=c_void_p, rank=c_int64, dims=POINTER(c_int64))
Several = struct("Several", n=c_int64, types=POINTER(c_int), values=POINTER(c_void_p))
Attributes = struct("Attributes", n=c_int64, types=POINTER(c_int), names=POINTER(c_void_p), values=POINTER(c_void_p))
Api = struct("Api", version=c_int64 * 3, internal=c_void_p, functions=c_void_p * FUNCTIONS)
Frame = struct(
    "Frame",
    api=POINTER(Api),
    context=c_void_p,
    stage=c_int,
    args=Several,
    rets=Several,
    attrs=Attributes,
    future=c_void_p,
)
Error = struct("Error", text=c_char_p, code=c_int)
Failed = struct("Failed", error=c_void_p, text=c_char_p)
Task = struct("Task", context=c_void_p, run=c_void_p, data=c_void_p)
Number = struct("Number", context=c_void_p, number=POINTER(c_int64))


class Text(Structure):
    _fields_ = [("text", c_char_p), ("n", c_size_t)]


class Array(Structure):
    _fields_ = [("dtype", c_int), ("n", c_size_t), ("data", c_void_p)]


class Buffer(NamedTuple):
    address: int
    shape: tuple[int, ...]
    dtype: str


def library():
    """The extension that is active here, loaded once more, which is the same one."""
    found = ctypes.CDLL(jadam.backends()["cpu"].reason)
    found.jadam_step.restype = c_void_p
    return found


# -- pools of threads --------------------------------------------------------------------------------------------------


class Inline:
    """Does a task at once."""

    threads = 4

    def schedule(self, task):
        task()
        return True

    def after(self):
        """What is left to do once the handler has returned."""


class Full(Inline):
    """Takes no task."""

    def schedule(self, task):
        return False


class Late(Inline):
    """Does every task after the handler has returned, when its buffers are gone."""

    def __init__(self):
        self.tasks = []

    def schedule(self, task):
        self.tasks.append(task)
        return True

    def after(self):
        for task in self.tasks:
            task()


class Threads(Inline):
    """A thread for each task."""

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


ATTRIBUTES = ("rule", "format", "clipping", "scalars", "salt", "block", "run", "stride")


def attributes(leaves) -> dict[str, np.ndarray]:
    """Of leaves one after the other, each with its numbers in the order of `ATTRIBUTES`."""
    return {name: np.array(leaves[i :: len(ATTRIBUTES)], np.int64) for i, name in enumerate(ATTRIBUTES)}


def call(inputs, outputs, leaves, pool=None) -> str | None:
    """The handler's error, or None. ``inputs`` begin with scalars and count; ``pool.after`` is the caller's to call."""
    pool = pool or Inline()
    errors: dict[int, bytes] = {}

    def create(args):
        errors[len(errors) + 1] = args.contents.text
        return len(errors)

    def message(args):
        args.contents.text = errors[args.contents.error]

    def schedule(args):
        run, data = CFUNCTYPE(None, c_void_p)(args.contents.run), args.contents.data  # the struct lives no longer
        if pool.schedule(lambda: run(data)):
            return None
        errors[len(errors) + 1] = b"full"
        return len(errors)

    def number(args):
        args.contents.number[0] = pool.threads

    functions = {
        ERROR_CREATE: CFUNCTYPE(c_void_p, POINTER(Error))(create),
        ERROR_MESSAGE: CFUNCTYPE(None, POINTER(Failed))(message),
        ERROR_DESTROY: CFUNCTYPE(None, POINTER(Failed))(lambda args: None),
        SCHEDULE: CFUNCTYPE(c_void_p, POINTER(Task))(schedule),
        NUM_THREADS: CFUNCTYPE(c_void_p, POINTER(Number))(number),
    }
    api = Api(ctypes.sizeof(Api))
    for place, function in functions.items():
        api.functions[place] = ctypes.cast(function, c_void_p)
    named = sorted(attributes(leaves).items())  # as XLA has them
    arrays = [Array(CODES["int64"], x.size, x.ctypes.data) for _, x in named]
    names = [Text(name.encode(), len(name)) for name, _ in named]
    args, keep_args = several(inputs)
    rets, keep_rets = several(outputs)
    attrs = Attributes(
        ctypes.sizeof(Attributes),
        None,
        len(named),
        (c_int * len(named))(*[1] * len(named)),
        void_pointers(list(map(pointer, names))),
        void_pointers(list(map(pointer, arrays))),
    )
    frame = Frame(Frame.future.offset, None, pointer(api), None, EXECUTE, args, rets, attrs, None)
    error = library().jadam_step(byref(frame))
    del keep_args, keep_rets
    return None if error is None else errors[error].decode()


def several(buffers):
    """``XLA_FFI_Args``, and what must live as long."""
    structs = []
    for address, shape, dtype in buffers:
        dims = (c_int64 * max(1, len(shape)))(*shape)
        structs.append(BufferStruct(ctypes.sizeof(BufferStruct), None, CODES[dtype], address or None, len(shape), dims))
    pointers = [pointer(x) for x in structs]
    types = (c_int * max(1, len(pointers)))(*[1] * len(pointers))
    return Several(ctypes.sizeof(Several), None, len(pointers), types, void_pointers(pointers)), pointers


def void_pointers(pointers):
    return (c_void_p * max(1, len(pointers)))(*[ctypes.cast(x, c_void_p) for x in pointers])


# -- huge arrays -------------------------------------------------------------------------------------------------------


class Sparse:
    """An array of zeros of any length: the same few pages over and over, but for windows with pages of their own."""

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
