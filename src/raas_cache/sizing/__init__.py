"""Choose a budget: the memory it needs, the share of it that each KV head gets, and its cost on a given text.

This folder must not import the command line or the evaluation.
"""
