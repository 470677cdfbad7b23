"""What a library keeps from its first work on does not count as a stage's memory."""

import ctypes
import mmap
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from plugbridge.memory.warm import multiply

_NAMES = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"


class _Heap(ctypes.Structure):
    """What glibc's mallinfo2 gives."""

    _fields_ = tuple((name, ctypes.c_size_t) for name in _NAMES.split())


def _in_use() -> int:
    asked = ctypes.CDLL(None).mallinfo2
    asked.restype = _Heap
    found = asked()
    return found.uordblks + found.hblkhd


def _kept(dtype: torch.dtype) -> list[int]:
    """Bytes that stay of a product before the library is warm, and of others after; matrices are not in the heap."""
    torch.set_num_threads(1)
    space = torch.frombuffer(mmap.mmap(-1, 2**27), dtype=dtype)
    found: list[int] = []
    first = (8, 64, 8192) if dtype == torch.float32 else (3072, 256, 256)
    for n, m, k in (first, (256, 256, 256), (8, 384, 8192), (512, 384, 6400), (1600, 1600, 1600), (8192, 256, 768)):
        one, two = space[: n * m].view(n, m), space[n * m : n * m + m * k].view(m, k)
        product = space[-n * k :].view(n, k)
        before = _in_use()
        torch.matmul(one, two, out=product)
        found.append(_in_use() - before)
        if len(found) == 1:
            multiply(dtype)
    return found


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="another matrix library")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="only glibc says what is in use")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_find_the_matrix_librarys_buffers_made(clean: Callable[..., Any], dtype: torch.dtype) -> None:
    _, *warm = clean(partial(_kept, dtype))
    assert max(warm) < 2**18  # what the first one keeps differs by processor, in float32 it may be nothing
