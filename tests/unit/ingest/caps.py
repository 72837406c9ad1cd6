"""How long and how large a reader may become on any input."""

import resource
import time
from contextlib import contextmanager

MEMORY_BYTES = 1 << 30
"""What a reader may take beyond what the process has."""
LONGEST_S = 2.0
"""Of this process's own time: a busy machine is not a slow reader. A wait for ever ends by the timeout of the test."""


@contextmanager
def capped():
    """A MemoryError for whoever asks for more than the cap, an AssertionError for whoever takes longer."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY_BYTES, before[1]))
    began = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
        assert time.process_time() - began < LONGEST_S
