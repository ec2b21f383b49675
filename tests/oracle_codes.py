"""What codes leave of keys and values, for the simulation of `oracle.py`; shares no code with the package."""

import numpy as np
import torch


def between(states, low, high):
    """What 4-bit codes leave of `states`: the nearest of 16 numbers from `low` to `high`."""
    step = (high - low) / 15
    codes = np.clip(np.floor((states - low) / np.where(step > 0, step, 1) + 0.5), 0, 15)
    return low + np.where(step > 0, codes, 0) * step


def as_stored(states, kv_dtype):
    """What quantisation leaves of keys or values `[batch, heads, tokens, d]`."""
    if kv_dtype == "int4":
        exact = states.detach().double().cpu().numpy()
        return torch.from_numpy(between(exact, exact.min(-1, keepdims=True), exact.max(-1, keepdims=True))).to(states)
    exact = states.detach().float().cpu().numpy()
    largest = np.abs(exact).max(-1, keepdims=True)
    scale = np.where(largest == 0, np.float32(1), largest / np.float32({"int8": 127, "fp8": 448}[kv_dtype]))
    if kv_dtype == "int8":
        codes = np.clip(np.floor(exact / scale + np.float32(0.5)), -127, 127)
    else:
        codes = torch.from_numpy(np.clip(exact / scale, -448, 448)).to(torch.float8_e4m3fn).float().numpy()
    return torch.from_numpy(codes.astype(np.float64) * scale.astype(np.float64)).to(states)


def codes_of(page, exact, padding):
    """4-bit codes: each channel of a page's keys lies between the smallest and the largest that is visible.

    A page that gets more tokens is coded again, from what the codes have left of the earlier ones.
    """
    keys = np.array([page.coded.get(token, exact[token]) for token in page.tokens])
    visible = [i for i, token in enumerate(page.tokens) if token not in padding] or list(range(len(keys)))
    return dict(zip(page.tokens, between(keys, keys[visible].min(0), keys[visible].max(0)), strict=True))
