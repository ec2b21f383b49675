"""The cache for `generate`: its layers, its options, and all code that looks into the model that uses it.

This folder must not know the name of a method, nor anything that is built on caches: sizing, evaluation, commands.
"""
