"""
CUDA code without a GPU: fake tensors on a fake device, on rank 0 of any number of fake ranks.

    import fake_cuda
    fake_cuda.install()                  # before the first import of torch; needs g++, 20 s once
    with fake_cuda.world(8):             # code in here is on a GPU, one of 8
        ...

Shapes, types, devices, autograd, FSDP2 and the order of its collectives are torch's own; no number
is computed, and the memory of all GPUs is that of a few Python objects. It shows an operator that
lacks the type or the device, tensors on two devices, wrong shapes, a hidden wait for the device
(what reads a number of a tensor), how much memory is held, what is sent. It cannot show wrong
numbers, speed, NCCL, vLLM, or anything inside a kernel.
"""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

SOURCE = Path(__file__).with_suffix(".cpp")
MEMORY = 80 * 2**30  # bytes of a fake GPU, unless told
KEPT = []  # for as long as the process lives


def compiler():
    """The C++ compiler of this machine, "" without one."""
    return shutil.which(os.environ.get("CXX", "g++")) or ""


def install(memory=MEMORY):
    """Make torch believe that there are GPUs of so many bytes. Call it before importing torch."""
    root = Path(importlib.util.find_spec("torch").origin).parent
    library = compile_device(root)
    # In this order: torch asks for hooks of CUDA once, when it is imported
    for path in (root / "lib/libc10.so", root / "lib/libtorch_cpu.so", library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    answer_for_the_driver(memory)
    give_kernels()


def compile_device(root):
    """fake_cuda.cpp against the torch in the folder `root`: a library, made once for each of both's
    versions."""
    source = SOURCE.read_bytes()
    version = (root / "version.py").read_bytes()
    name = hashlib.sha256(source + version).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"lad-fake-cuda-{os.getuid()}-{name}.so"
    if library.exists():
        return library
    unfinished = library.with_suffix(f".{os.getpid()}")  # another process may be at it too
    command = [compiler(), "-O1", "-shared", "-fPIC", "-std=c++20", SOURCE, "-o", unfinished]
    command += [f"-I{root}/include", f"-I{root}/include/torch/csrc/api/include"]
    command += [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True)
    unfinished.rename(library)
    return library


class Stream:
    """All streams are one, and never behind."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __init__(self, *args, **options):
        import torch

        self.device = torch.device("cuda", 0)

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass

    def record_event(self, event=None):
        return Event()

    def synchronize(self):
        pass

    def query(self):
        return True


class Event:
    def __init__(self, *args, **options):
        pass

    def record(self, stream=None):
        pass

    def wait(self, stream=None):
        pass

    def synchronize(self):
        pass

    def query(self):
        return True


def answer_for_the_driver(memory):
    """torch.cuda's Python side, as if a driver had answered."""
    import torch

    answers = {
        "is_available": True,
        "device_count": 8,
        "current_device": 0,
        "set_device": None,
        "synchronize": None,
        "empty_cache": None,
        "mem_get_info": (memory, memory),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "reset_peak_memory_stats": None,
        "get_device_properties": SimpleNamespace(total_memory=memory, name="a fake"),
    }
    for name, value in answers.items():
        setattr(torch.cuda, name, lambda *args, value=value, **options: value)
    torch.cuda.Stream = torch.Stream = Stream
    torch.cuda.Event = torch.Event = Event
    torch.cuda.current_stream = lambda device=None: Stream()
    torch.cuda.stream = lambda stream: contextlib.nullcontext()
    torch.Tensor.pin_memory = lambda self, *args: self
    torch.autograd.set_multithreading_enabled(False)  # or a device's backward runs in a thread


def give_kernels():
    """The one operator of our models that PyTorch takes apart where a device has no kernel of it,
    and CUDA has: what its parts would hold is not held."""
    import torch

    def never_called(*args):
        raise NotImplementedError("there is no GPU")

    library = torch.library.Library("aten", "IMPL")
    library.impl("silu_backward", never_called, "CUDA")
    KEPT.append(library)


@contextlib.contextmanager
def world(ranks):
    """Rank 0 of a process group of so many fake GPUs. Tensors made in here are fake, but for those
    of device meshes, whose numbers steer Python."""
    import torch.distributed as dist
    from torch._subclasses import fake_tensor
    from torch.distributed.tensor import _sharding_prop
    from torch.testing._internal.distributed.fake_pg import FakeStore

    init_device_mesh = dist.init_device_mesh

    def really(*args, **options):
        with fake_tensor.unset_fake_temporarily():
            return init_device_mesh(*args, **options)

    patches = [
        mock.patch.object(dist, "init_device_mesh", really),
        # DTensor finds out shapes with whole tensors, in a mode of its own: they are not held here
        mock.patch.object(_sharding_prop, "detect_fake_mode", lambda: None),
    ]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(ranks))
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        with contextlib.ExitStack() as stack:
            for patch in patches:
                stack.enter_context(patch)
            stack.enter_context(fake_tensor.FakeTensorMode(allow_non_fake_inputs=True))
            yield
    finally:
        dist.destroy_process_group()
