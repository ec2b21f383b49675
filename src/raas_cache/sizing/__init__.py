"""Choose a budget: the memory it needs, a budget for each layer, and its cost on a given text.

This folder must not import the command line or the evaluation.
"""
