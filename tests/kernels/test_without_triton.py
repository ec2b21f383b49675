"""Where Triton cannot be installed, as on macOS and Windows, all but its kernels works."""

import subprocess
import sys


GENERATES = """
import sys
sys.modules["triton"] = None  # every import of it fails
import raas_cache
from raas_cache.eval.chains import problems

model, tokenizer = raas_cache.pretrained("chain_reasoner")
(problem,) = problems(1, num_lines=8, seed=0)
inputs = tokenizer(problem.prompt, return_tensors="pt", return_token_type_ids=False)
prompt = inputs["input_ids"].shape[1]
for name, options in [
    ("raas", {}), ("raas", {"kv_dtype": "int8"}), ("raas", {"kv_dtype": "int4"}), ("h2o", {}), ("tova", {}),
]:
    cache = raas_cache.from_name(name, budget=prompt + 20, page_size=4, min_decode_pages=1, **options)
    text = model.generate(**inputs, past_key_values=cache, min_new_tokens=40, max_new_tokens=40, do_sample=False)
    print(text.shape[1] - prompt, cache.evictions)
print(sorted(name for name, module in sys.modules.items() if name.startswith("triton") and module is not None))
"""


def test_generates_with_evictions():
    result = subprocess.run([sys.executable, "-c", GENERATES], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    *generated, imported = result.stdout.splitlines()
    assert imported == "[]"
    assert len(generated) == 5
    for line in generated:
        tokens, evictions = map(int, line.split())
        assert tokens == 40 and evictions > 0


def test_every_module_but_those_of_triton_is_imported():
    code = (
        "import pkgutil, sys; sys.modules['triton'] = None\n"
        "import raas_kernels\n"
        "for found in pkgutil.walk_packages(raas_kernels.__path__, 'raas_kernels.'):\n"
        "    try: __import__(found.name)\n"
        "    except ImportError as error: print(found.name, error.name)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    operators = ("append", "attend", "page_bounds", "show", "stamp")
    modules = {f"raas_kernels.ops.{name}.triton" for name in operators} | {"raas_kernels.ops.attend.tune"}
    assert set(result.stdout.split()) == {*modules, "triton"}
