"""The attention and mask functions that are registered with transformers. They pass a query to the layer of its keys.

This folder must not know the cache or the name of a method.
"""
