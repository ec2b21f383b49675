"""Compiles every kernel for one GPU architecture, without a GPU: `python -m tests.kernels.compile_ahead 90`.

It runs as a program of its own, outside Triton's interpreter, and prints a line for each kernel, dtype and head size.
"""

import itertools
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from raas_kernels.ops.append import triton as append
from raas_kernels.ops.attend import triton as attend
from raas_kernels.ops.attend.configs import MIN_DOT, Config, default_config, packed_config
from raas_kernels.ops.page_bounds import triton as page_bounds
from raas_kernels.ops.show import triton as show
from raas_kernels.ops.stamp import triton as stamp


KERNELS = {
    "append_kernel": append,
    "attend_kernel": attend,
    "reduce_kernel": attend,
    "page_bounds_kernel": page_bounds,
    "stamp_kernel": stamp,
    "show_kernel": show,
}


HEAD_SIZES = (64, 80, 96, 128, 256)
DTYPES = {"fp16": 2, "bf16": 2, "fp32": 4}
OPERANDS = {"fp16": triton.language.float16, "bf16": triton.language.bfloat16, "fp32": triton.language.float32}
POINTERS = {
    "bias": "*fp32", "positions": "*i32", "priority": "*fp64", "evictable": "*i1", "open_slot": "*i64", "clock": "*i64",
    "states": "*fp64", "rows": "*i64", "selected": "*i64", "blocks": "*i32",
    "part_output": "*fp32", "part_max": "*fp32", "part_sum": "*fp32", "unit_logit": "*fp32", "scores": "*fp32",
    "bounds": "*fp32", "key_scales": "*fp32", "value_scales": "*fp32", "key_scale": "*fp32",
    "value_scale": "*fp32", "visible": "*i1",
}  # fmt: skip
STATES = (
    "keys", "values", "key", "value", "key_min", "key_max", "query", "output", "sinks", "open_keys", "value_min",
    "value_max",
)  # fmt: skip
CODES = {"i8": triton.language.int8, "fp8e4nv": triton.language.float8e4nv}
PACKED = "u8"  # two 4-bit codes in a byte
GROUP, PAGE = 4, 16


def launch_of(head_size: int, dtype: str, code: str | None) -> Config:
    return (packed_config if code == PACKED else default_config)(head_size, DTYPES[dtype])


def constants_of(kernel: str, head_size: int, dtype: str, code: str | None) -> list[dict]:
    """The compile-time arguments that the launchers choose for a budget of 1,024 tokens.

    Options that add only a few instructions are all off, then all on. `blocks` None is a cache without blocks.
    """
    block = triton.next_power_of_2(head_size)
    group = {"GROUP": GROUP, "DV": head_size, "BLOCK_GROUP": MIN_DOT, "BLOCK_DV": block}
    part = max(MIN_DOT, triton.next_power_of_2(head_size // 2)) if code == PACKED else block
    bytes_of_token = head_size // 2 if code == PACKED else head_size
    config = launch_of(head_size, dtype, code)
    return {
        "append_kernel": [
            {
                "PAGE": PAGE, "DK": head_size, "DV": head_size, "BOUNDS": is_other, "MASKED": is_other,
                "MAY_CLOSE": is_other, "ROWS": is_other, "STATES": 3 * is_other, "QUANTIZED": code in CODES,
                "PACKED": code == PACKED, **({} if is_other else {"blocks": None}),
                "BLOCK_PAGES": 64, "BLOCK_DK": block, "BLOCK_DV": block, "BLOCK_STATES": 4 if is_other else 1,
            }
            for is_other in (False, True)
        ],
        "attend_kernel": [
            {
                **group, "PAGE": PAGE, "UNIT": PAGE, "DK": head_size, "BLOCK_SLOTS": config.tile, "BLOCK_DK": part,
                "BLOCK_DV": part, "KEYS_SLOT": bytes_of_token, "VALUES_SLOT": bytes_of_token * (1 + is_other),
                "OPERAND": OPERANDS[dtype], "CAPPED": is_other, "SELECTED": is_other, "ROWS": is_other,
                "SUM": is_other, "MEAN": is_other, "SINKS": is_other, "WHOLE": is_whole, "BLOCK_PAGES": 64,
                "QUANTIZED": code in CODES, "PACKED": code == PACKED, **({} if has_blocks else {"blocks": None}),
            }
            for is_other, is_whole, has_blocks in (
                (False, True, False), (True, True, False), (True, False, False), (False, True, True),
                (True, False, True),
            )
        ],
        "reduce_kernel": [
            {**group, "BLOCK_PAGES": 64, "UNITS": 1, "SINKS": is_other, "SUM": is_other, "MEAN": is_other}
            for is_other in (False, True)
        ],
        "page_bounds_kernel": [
            {
                "GROUP": GROUP, "PAGE": PAGE, "DK": head_size, "BLOCK_PAGES": 32, "BLOCK_DK": block,
                "CAPPED": is_other, "ROWS": is_other,
            }
            for is_other in (False, True)
        ],
        "stamp_kernel": [
            {"TOP_RATIO": ratio, "ROWS": ratio is not None, "PAGE": PAGE, "BLOCK_PAGES": 64} for ratio in (None, 0.5)
        ],
        "show_kernel": [
            {
                "COLUMNS": show.COLUMNS, "BIAS": triton.language.float32, "KEY": key, "BOUND": bound,
                "BOUNDS": has_bounds, "QUANTIZED": code in CODES, "PACKED": code == PACKED, "BLOCKS": has_blocks,
                "DK": head_size, "BLOCK_DK": block, "BLOCK": PAGE if has_bounds else show.BLOCK_SLOTS,
            }
            for has_bounds, has_blocks in (
                ((True, False),) if code == PACKED else ((False, False), (True, False), (True, True))
            )
            for key, bound in [(CODES[code], triton.language.float32) if code in CODES else (OPERANDS[dtype],) * 2]
        ],
    }[kernel]  # fmt: skip


def type_of(name: str, dtype: str, code: str | None, kernel: str) -> str:
    is_new = kernel == "append_kernel" and name in ("key", "value")  # a 4-bit cache gets them in the model's dtype
    if code and (name in ("keys", "values") or (is_new and code in CODES)):
        return f"*{code}"
    if code in CODES and name in ("key_min", "key_max"):
        return "*fp32"
    if name in STATES:
        return f"*{dtype}"
    if kernel == "show_kernel":
        return {"table": "*i64", "visible": "*u8"}.get(name, "i32")
    return POINTERS.get(name, "fp32" if name in ("scale", "softcap", "alpha") else "i32")


def main(architecture: int) -> None:
    target = GPUTarget("cuda", architecture, 32)
    # fp8 as codes needs a GPU of 8.9 or newer.
    codes = [None, "i8", PACKED] + (["fp8e4nv"] if architecture >= 89 else [])
    for name, module in KERNELS.items():
        kernel = getattr(module, name)
        reads_codes = name in ("append_kernel", "attend_kernel", "show_kernel")
        for dtype, head_size, code in itertools.product(DTYPES, HEAD_SIZES, codes if reads_codes else [None]):
            if name == "stamp_kernel" and (dtype, head_size) != ("fp16", 64):  # knows neither
                continue
            is_wide = code == PACKED and (dtype, head_size) == ("fp32", 256)  # needs the most shared memory
            if code and (dtype != "bf16" or head_size not in (64, 128, 256)) and not is_wide:  # to save time
                continue
            for constants in constants_of(name, head_size, dtype, code):
                signature = {
                    argument: "constexpr" if argument in constants else type_of(argument, dtype, code, name)
                    for argument in kernel.arg_names
                }
                # At a launch Triton finds that pointers and strides are divisible by 16, and can then load tiles ahead,
                # which takes the most shared memory.
                divisible = {
                    (place,): [["tt.divisibility", 16]]
                    for place, argument in enumerate(kernel.arg_names)
                    if signature[argument] == "i32" or signature[argument].startswith("*")
                }
                launch = launch_of(head_size, dtype, code)
                options = {"num_warps": launch.warps, "num_stages": launch.stages} if name == "attend_kernel" else {}
                source = ASTSource(kernel, signature, constants, divisible)
                compiled = triton.compile(source, target=target, options=options)
                assert compiled.asm["ptx"] and compiled.asm["cubin"]
                print(name, dtype, head_size, compiled.metadata.shared, flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
