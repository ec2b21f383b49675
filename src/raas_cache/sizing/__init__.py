"""Answers how large a budget should be: its bytes, a budget for each layer, and what a budget costs on a given text.

This folder must not know the command line or the evaluation.
"""
