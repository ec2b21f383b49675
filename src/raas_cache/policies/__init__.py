"""Eviction policies, one file a method: scores in, page priorities out. They know neither memory nor models."""

from .base import Policy
from .raas import RaaSPolicy


__all__ = ["Policy", "RaaSPolicy"]
