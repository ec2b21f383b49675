"""Pages of KV and the decode step over them: which page is written, read, scored and recycled.

This room knows tensors, pages and the interface of a policy. It knows neither transformers nor models.
"""
