"""Helpers that several folders share: command arguments, tables, optional packages, names that differ in transformers.

This folder must not import sizing, evaluation, benchmarks or commands.
"""
