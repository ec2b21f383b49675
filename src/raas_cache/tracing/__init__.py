"""Records what a cache scores, stamps and evicts, in memory and in a file.

This folder must not change what a cache does: tokens are the same with and without a recording.
"""
