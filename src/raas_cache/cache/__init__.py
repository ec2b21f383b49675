"""The cache that `generate` takes: its layers, its options, and every look into the model that uses it.

This folder must not know the name of a method, nor anything that is built on caches: sizing, evaluation, commands.
"""
