"""Backends: what runs a graph on a device. `open_backend` picks one; nothing is imported before it is used."""

from parkdet.runtime.backends.base import BACKEND_NAMES, Backend, open_backend

__all__ = ["BACKEND_NAMES", "Backend", "open_backend"]
