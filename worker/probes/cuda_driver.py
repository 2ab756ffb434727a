"""Call NVIDIA's driver without torch.

Probes run before a server's first worker, and torch alone takes longer than they do.
"""

import ctypes

_LIBRARY = "libcuda.so.1"


class DriverError(Exception):
    """There is no driver, or it refused a call."""


class Driver:
    """The functions of libcuda."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise DriverError(str(error)) from None
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        """Call a function. DriverError with the error's name if it refuses."""
        if code := getattr(self._library, name)(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'').decode()} ({code})")

    def value(self, name: str, kind: "type[ctypes.c_void_p | ctypes.c_int | ctypes.c_uint64]", *arguments: object):  # type: ignore[no-untyped-def]
        """Return what a call stores where its first argument points."""
        found = kind()
        self.call(name, ctypes.byref(found), *arguments)
        return found
