"""Whether a forward is traced, and so must not read the values of tensors."""

import torch


def is_traced() -> bool:
    """Whether `torch.compile` traces this code, or a CUDA graph records it.

    The code runs once, and its result runs for many steps. So it must not read a value of a tensor, and the host cannot
    count steps.
    """
    return torch.compiler.is_compiling() or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
