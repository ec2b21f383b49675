"""The pages of one attention layer, and the decode step over them: which page is written, read, scored and recycled.

This folder must not know the cache, the model, the name of a method, or how anything is drawn.
"""
