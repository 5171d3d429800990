"""What the processes share that train: their environment, and that they end with their parent."""

import ctypes
import sys

ENVIRONMENT = {
    # Results differ in the last digits between one thread and two.
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    # Keep the memory of large tensors for the next ones: to get it from the system anew takes 5 %
    # of a step (glibc).
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_TOP_PAD_": str(2**26),
}


def end_with_parent(signum: int) -> None:
    """Send this process a signal when its parent dies, even of kill -9.

    (On Linux; the kernels of notebooks look by themselves.)
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signum)  # 1: PR_SET_PDEATHSIG
