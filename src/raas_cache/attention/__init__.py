"""The attention and mask functions registered with transformers; they hand a query to the layer that holds its keys.

This folder must not know the cache or the name of a method.
"""
