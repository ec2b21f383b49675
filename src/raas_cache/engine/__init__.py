"""The pages of one attention layer and what a step does with them.

This folder must not know the cache, the model, the name of a method, or how anything is drawn.
"""
