"""Fidelity: how much a cache changes what a model predicts, measured on a given text.

`texts.py` reads problems and chains of thought, and turns them into token ids. `traces.jsonl` has twelve of them.
"""
