"""Where a bench runs: the library of its arrays, and the clock that times what computes with them."""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..threads import build_info

__all__ = ["HOST", "Device", "Gpu", "Host", "memory_bytes"]


def memory_bytes() -> int | None:
    """What memory this process can ever have: the machine's and its swap, or less by a limit; None where unknown."""
    sizes = []
    with suppress(OSError, ValueError, LookupError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        kilobytes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
        sizes.append(1024 * (kilobytes["MemTotal"] + kilobytes.get("SwapTotal", 0)))
    if not sizes and hasattr(os, "sysconf") and {"SC_PHYS_PAGES", "SC_PAGE_SIZE"} <= os.sysconf_names.keys():
        sizes.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(OSError, ValueError):  # of a container; "max" where there is none
        sizes.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    with suppress(ImportError):
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        sizes += [] if limit == resource.RLIM_INFINITY else [limit]
    return min((size for size in sizes if size > 0), default=None)


class Device(Protocol):
    """What a bench needs to know of where it runs."""

    @property
    def torch(self) -> str:
        """What PyTorch must be to compute there too."""
        ...

    def has_torch(self, torch: Any) -> bool:
        """Whether this PyTorch computes there."""
        ...

    def array(self, x: Any) -> Any:
        """An array of NumPy, there."""
        ...

    def seconds(self, call: Callable[[], object], count: int) -> float:
        """The time that so many calls take one after the other, until their work is done."""
        ...

    def free_bytes(self) -> int | None:
        """How much memory arrays may still take; None where that is not known."""
        ...

    def release(self) -> None:
        """Gives back the memory that libraries keep for later arrays."""
        ...

    def describe(self) -> str:
        """Its name, and what of its software times depend on."""
        ...


class Host:
    """The CPU: arrays of NumPy, and the system's clock."""

    torch = "PyTorch"

    def has_torch(self, torch: Any) -> bool:
        """Always."""
        return True

    def array(self, x: Any) -> Any:
        """Itself."""
        return x

    def seconds(self, call: Callable[[], object], count: int) -> float:
        """By the system's clock."""
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start

    def free_bytes(self) -> int | None:
        """All that there is: what others hold, the system may take from them."""
        return memory_bytes()

    def release(self) -> None:
        """Nothing: the system is given what is no longer in use."""

    def describe(self) -> str:
        """The processor, the threads and the vector instructions in use."""
        model = platform.processor() or platform.machine()
        cpuinfo = Path("/proc/cpuinfo")
        if cpuinfo.exists():
            names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
            model = names[0] if names else model
        info = build_info()
        return f"{model}, {info['threads']} threads, {info['simd']}"


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, CuPy's current one: arrays of CuPy, and the GPU's own clock."""

    cupy: Any
    torch = "PyTorch with CUDA"

    def has_torch(self, torch: Any) -> bool:
        """Whether it was built for CUDA, and finds a driver that it can use."""
        return torch.cuda.is_available()

    def array(self, x: Any) -> Any:
        """A copy on the GPU."""
        return self.cupy.asarray(x)

    def seconds(self, call: Callable[[], object], count: int) -> float:
        """By events on the default stream, which waits for what PyTorch and CuPy compute on theirs.

        The time between them includes that of launching, where the GPU waits for it.
        """
        cuda = self.cupy.cuda
        start, end = cuda.Event(), cuda.Event()
        with cuda.Stream.null:
            start.record()
            for _ in range(count):
                call()
            end.record()
        end.synchronize()
        return cuda.get_elapsed_time(start, end) / 1e3  # of milliseconds

    def free_bytes(self) -> int | None:
        """What is free on the GPU, and what CuPy keeps for later arrays."""
        from ..backends.array.device import free_bytes

        return free_bytes(self.cupy)

    def release(self) -> None:
        """What CuPy keeps, and PyTorch: each would leave the other without."""
        self.cupy.get_default_memory_pool().free_all_blocks()
        if (torch := sys.modules.get("torch")) is not None:
            torch.cuda.empty_cache()

    def describe(self) -> str:
        """The GPU, the CUDA that its driver is for, and CuPy."""
        runtime = self.cupy.cuda.runtime
        name = runtime.getDeviceProperties(runtime.getDevice())["name"].decode()
        major, minor = divmod(runtime.driverGetVersion(), 1000)
        return f"{name}, driver for CUDA {major}.{minor // 10}, CuPy {self.cupy.__version__}"


HOST = Host()
