<<<<<<< HEAD
"""Pages of KV and the decode step over them: which page is written, read, scored and recycled.

This room knows tensors, pages and the interface of a policy. It knows neither transformers nor models.
=======
"""The pages of one attention layer and what a step does with them.

This folder must not know the cache, the model, the name of a method, or how anything is drawn.
>>>>>>> e7bcb5b46ced4bc1c8b419b3493a2886ceab8d79
"""
