"""The C library's memory allocator."""

import ctypes

_M_ARENA_MAX = -8  # of glibc's malloc.h
_ARENAS = 2


def use_few_arenas() -> bool:
    """Has all threads of this process share two of malloc's arenas, before there are more.

    By default glibc gives each of the dozens of threads of JAX and orbax an arena, and keeps what is freed in it: the
    memory of a long run crept up by a tenth and more, though nothing was leaked.

    Returns:
      Whether it was done: only glibc can.
    """
    try:
        return ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS) == 1
    except (AttributeError, OSError, TypeError):  # another C library, or another system
        return False
