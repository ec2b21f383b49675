"""Continuous batching with rows of fixed memory, and the server on top of it."""

from .continuous import continuous


__all__ = ["continuous"]
