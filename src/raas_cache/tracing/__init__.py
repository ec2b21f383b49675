"""Trace the scores, timestamps and evictions of a cache, in memory and in a file.

This folder must not change what a cache does: the generated tokens are the same with and without a recording.
"""
