"""Seed streams, and the process settings without which equal seeds give unequal bits.

Every random draw belongs to a stream named by what it is for and by (seed, round, partition,
step): never by node id, arrival order, process or wall time.  What samples draw (their order, their
augmentation) comes from `words`, the same on every device and for any number of clients at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# MKL picks kernels by memory alignment unless told not to; it reads this at its first call.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# cuBLAS is deterministic only with a fixed workspace; it reads this when a handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
"""SplitMix64's increment, as a signed number."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


def seed_of(purpose: str, *key: int) -> int:
    """A 63-bit seed for the stream `purpose` at `key`, e.g. `seed_of("step", seed, round, ...)`."""
    text = f"{purpose}:{','.join(map(str, key))}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def words(keys: torch.Tensor | int, count: int, device: torch.device) -> torch.Tensor:
    """The first `count` 64-bit numbers (..., count) int64 of the stream of each key (...) int64.

    Made by integer operations on `device`, so that they are the same on every device, whatever else
    is drawn with them: SplitMix64 (Steele et al., Fast Splittable Pseudorandom Number Generators,
    OOPSLA 2014, https://doi.org/10.1145/2660193.2660195, figure 17) seeded with the key.
    """
    import torch

    z = torch.arange(1, count + 1, device=device).mul_(_GOLDEN)
    z = z.add_(keys) if isinstance(keys, int) else keys.unsqueeze(-1) + z
    # Products wrap; right shifts of signed numbers bring in the sign, which is masked away.
    z ^= z >> 30 & (1 << 34) - 1
    z *= 0xBF58476D1CE4E5B9 - (1 << 64)
    z ^= z >> 27 & (1 << 37) - 1
    z *= 0x94D049BB133111EB - (1 << 64)
    z ^= z >> 31 & (1 << 33) - 1
    return z


def uniform(numbers: torch.Tensor) -> torch.Tensor:
    """`words` as numbers from U[0, 1), float32 multiples of 2^-24."""
    return (numbers >> 40 & 0xFFFFFF).float().mul_(2.0**-24)


def prepare_process(threads: int = 1, deterministic: bool = True, device_type: str = "cpu") -> None:
    """Set threads, allocator and kernel choice of this process, before its first tensor.

    `threads` torch threads (two on a busy two-core machine can be fifteen times slower than
    one); large blocks stay with the allocator instead of going back to the system after every
    step; with `deterministic`, only kernels that repeat their sums, and on a GPU a warning for each
    that torch has in no such form (the gradient of max pooling, say).
    """
    import torch

    _set_thresholds(1 << 30, (1 << 31) - 1)
    torch.set_num_threads(threads)
    # The same switch as torch.use_deterministic_algorithms, without its import of the compiler
    # (a CPU second and 75 MiB).
    strict = "warn" if device_type == "cuda" else "error"
    torch.set_deterministic_debug_mode(strict if deterministic else "default")
    # Filling fresh memory is a debugging aid; it costs a pass over every new tensor.
    torch.utils.deterministic.fill_uninitialized_memory = False
    if torch.cuda.is_available():
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic


def return_memory() -> None:
    """Have blocks above 1 MiB go back to the system at once: for a process that mostly waits."""
    _set_thresholds(1 << 20, 1 << 20)


def release_memory() -> None:
    """Give back, once, what an exceptional piece of work has left with the allocators."""
    import torch

    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    torch.cuda.empty_cache()


def _set_thresholds(mmap: int, trim: int) -> None:
    """From which size on blocks are mapped, and free memory goes back to the system [bytes]."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(_M_MMAP_THRESHOLD, mmap)
        libc.mallopt(_M_TRIM_THRESHOLD, trim)


def seed_device(device_type: str, seed: int) -> None:
    """Seed the default generators of this device and of the CPU, where a network on a GPU may draw
    too: whether to skip a block, say."""
    import torch

    torch.default_generator.manual_seed(seed)
    if device_type == "cuda":
        torch.cuda.manual_seed(seed)


def step_seed(device_type: str) -> int:
    """What `seed_device` was given last: of a local round's step, its own seed."""
    import torch

    return torch.cuda.initial_seed() if device_type == "cuda" else torch.initial_seed()


def generator_state(device_type: str) -> list[torch.Tensor]:
    """The states of the generators that `seed_device` seeds."""
    import torch

    states = [torch.default_generator.get_state()]
    if device_type == "cuda":
        states.append(torch.cuda.get_rng_state())
    return states


def set_generator_state(device_type: str, states: list[torch.Tensor]) -> None:
    """Restore the generators' states, so that draws repeat."""
    import torch

    torch.default_generator.set_state(states[0])
    if device_type == "cuda":
        torch.cuda.set_rng_state(states[1])
