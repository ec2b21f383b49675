"""Models that work offline: the small model in this package, and pretrained models that are packages of their own.

This room must not know caches, methods or the evaluation.
"""
