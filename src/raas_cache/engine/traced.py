"""Whether a CUDA graph records a forward."""

import torch


def is_capturing() -> bool:
    """Whether the current CUDA stream is recorded.

    Recorded code runs once, and its kernels run again for many steps, as code under `torch.compile` does. So it must
    not read a value of a tensor, and the host cannot count steps. The check for `torch.compile` is not part of this
    function, because `torch.compile` may compile the function by itself when an eager caller calls it.
    """
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
