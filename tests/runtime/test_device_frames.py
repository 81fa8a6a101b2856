"""Device memory that chunks lend to their consumers."""

from __future__ import annotations

import threading
from itertools import count

from runtime.frames import FramePool


def test_memory_that_is_let_go_of_is_used_again() -> None:
    addresses = count(256, 256)
    pool = FramePool(lambda nbytes: next(addresses), 16)
    one, two = pool.lease(), pool.lease()
    assert (one.address, two.address) == (256, 512)
    del one
    assert pool.lease().address == 256
    assert pool.owned == [256, 512]


def test_a_lease_may_end_while_another_begins() -> None:
    """As when the garbage collector runs in between."""
    held, addresses = [], count(256, 256)

    def alloc(nbytes: int) -> int:
        held.clear()
        return next(addresses)

    pool = FramePool(alloc, 16)
    held.append(pool.lease())
    thread = threading.Thread(target=lambda: held.append(pool.lease()), daemon=True)
    thread.start()
    thread.join(timeout=10)
    assert not thread.is_alive(), "it waits for itself"
    assert held[0].address == 512
    assert pool.lease().address == 256
