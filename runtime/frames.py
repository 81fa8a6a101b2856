"""Frames that stay on the GPU, handed over by DLPack without a copy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import Any, Final

__all__ = ["DeviceFrames", "FramePool"]

_NAME: Final = b"dltensor"
_UINT: Final = 1


class _Tensor(ctypes.Structure):
    """`DLManagedTensor` of DLPack: the tensor, its owner, and what lets go of it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("type_code", ctypes.c_uint8),
        ("type_bits", ctypes.c_uint8),
        ("type_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("owner", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_exported: dict[int, tuple[Any, ...]] = {}
"""What exported tensors need to stay alive, by the address of their structure."""


def _delete(address: int) -> None:
    _exported.pop(address, None)


def _drop(capsule: int) -> None:
    """A capsule goes; if nobody took the tensor out of it (who does renames it), the tensor goes with it."""
    api = ctypes.pythonapi
    if api.PyCapsule_IsValid(ctypes.c_void_p(capsule), _NAME):
        _exported.pop(_pointer(ctypes.c_void_p(capsule), _NAME), None)


_DELETE = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_delete)
_DROP = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(_drop)
_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)


class FramePool:
    """Device memory for chunks that consumers hold: it is used again when they let go, and grows if they do not."""

    def __init__(self, alloc: Callable[[int], int], nbytes: int) -> None:
        self._alloc = alloc
        self._nbytes = nbytes
        self._free: list[int] = []
        self.owned: list[int] = []

    def lease(self) -> _Lease:
        """Memory for one chunk."""
        try:
            address = self._free.pop()
        except IndexError:
            address = self._alloc(self._nbytes)
            self.owned.append(address)
        return _Lease(self, address)

    def give_back(self, address: int) -> None:
        """Let the memory be used again. Takes no lock: the garbage collector may call it from within `lease`."""
        self._free.append(address)


class _Lease:
    """Memory of a pool until this object is gone."""

    def __init__(self, pool: FramePool, address: int) -> None:
        self.address = address
        self._pool = pool

    def __del__(self) -> None:
        self._pool.give_back(self.address)


class DeviceFrames:
    """Frames of a chunk on the device, uint8 `[frames, H, W, 3]`, complete when they are handed out.

    Take them with `torch.from_dlpack(frames)`, `cupy.from_dlpack(frames)` or whatever reads DLPack; nothing is
    copied. The memory is used for a later chunk when this object and every tensor made of it are gone, and it is freed
    with the pipeline; so keep them until work that reads them has finished, not only until it is queued.
    """

    def __init__(self, lease: _Lease, shape: tuple[int, ...], device: tuple[int, int]) -> None:
        """`device` is DLPack's pair of type and number."""
        self.shape = shape
        self._lease = lease
        self._device = device

    @property
    def address(self) -> int:
        """Where the frames lie on the device."""
        return self._lease.address

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __dlpack_device__(self) -> tuple[int, int]:
        return self._device

    def __dlpack__(
        self,
        *,
        stream: Any = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        """The capsule that consumers ask for. No stream has to wait: the frames are complete."""
        del stream, max_version
        if copy or (dl_device is not None and tuple(dl_device) != self._device):
            raise BufferError("the frames are handed over where they are; copy or move what you get")
        sizes = (ctypes.c_int64 * len(self.shape))(*self.shape)
        tensor = _Tensor(
            data=self._lease.address,
            device_type=self._device[0],
            device_id=self._device[1],
            ndim=len(self.shape),
            type_code=_UINT,
            type_bits=8,
            type_lanes=1,
            shape=ctypes.cast(sizes, ctypes.POINTER(ctypes.c_int64)),
            byte_offset=0,
            deleter=ctypes.cast(_DELETE, ctypes.c_void_p),
        )
        address = ctypes.addressof(tensor)
        _exported[address] = (tensor, sizes, self._lease)
        return _capsule(address, _NAME, ctypes.cast(_DROP, ctypes.c_void_p))
