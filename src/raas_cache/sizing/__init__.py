"""How large a budget should be: its memory, a budget for each layer, and what a budget costs on a given text.

This folder must not import the command line or the evaluation.
"""
