"""What happens to the package's objects in a child that `os.fork` has made."""

import os
import signal
import warnings
from collections.abc import Callable

import pytest


def told_by_a_child(work: Callable[[Callable[[str], None]], None]) -> str:
    """Runs ``work(say)`` in a forked child; what it said, and the RuntimeError that ended it. Blocks, 20 s at most."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of threads: they are the point here
        child = os.fork()
    if not child:  # not a test any more: whatever happens, it leaves
        signal.alarm(20)
        try:
            work(lambda text: os.write(writing, text.encode()) and None)
        except RuntimeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, encoding="utf-8") as told:
        said = told.read()
    os.waitpid(child, 0)
    return said
