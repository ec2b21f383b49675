"""RaaS in vLLM, as a plug-in: vLLM calls `register` in each of its processes, through its entry point."""

from __future__ import annotations


def register() -> None:
    """Make vLLM keep the keys and values of each request in a row of `RAAS_BUDGET` tokens.

    Does nothing if `RAAS_BUDGET` is not set. vLLM calls this at the start of each of its processes.

    Raises:
        TypeError, ValueError: one of the `RAAS_` variables cannot be used, see `RowSettings.from_environment`.
    """
    from .settings import BUDGET, current

    if not BUDGET.is_set:
        return
    from vllm.logger import init_logger
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    message, here = str(current()), "raas_cache.serving.vllm"
    for member in AttentionBackendEnum:
        if "MLA" in member.name:
            register_backend(member, f"{here}.refusals.NoLatent")
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{here}.backend.CPURowBackend")
    else:
        register_backend(AttentionBackendEnum.CUSTOM, f"{here}.backend.RowBackend")
        message += " It has no effect without --attention-backend CUSTOM."
    init_logger("vllm.raas_cache").info("%s", message)
