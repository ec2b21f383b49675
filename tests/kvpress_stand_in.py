"""An environment with a stand-in for kvpress, which the tests have no room for: its transformers is an older one."""

import shlex
import sys


KVPRESS = '''
"""A stand-in for kvpress: its presses write down what they see; beside a file `fail`, they fail at the third step."""

import json
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).parent
print("what a library says when it is imported")


class KnormPress:
    pass


class DecodingPress:
    def __init__(self, base_press, target_size):
        assert isinstance(base_press, KnormPress)
        self.target_size = target_size

    @contextmanager
    def __call__(self, model):
        (attention,) = (layer.self_attn for layer in model.model.layers[:1])

        def note(module, args, kwargs, output):
            cache = kwargs.get("past_key_values", kwargs.get("cache"))
            with (FOLDER / "noted").open("a") as file:
                noted = {"press": id(self), "target": self.target_size, "cache": id(cache)}
                noted |= {"held": cache.layers[0].keys.shape[2], "batch": cache.layers[0].keys.shape[0]}
                noted |= {"position": kwargs["cache_position"].tolist(), "weights": module.q_proj.weight.data_ptr()}
                print(json.dumps(noted), file=file)
            if (FOLDER / "fail").exists() and len((FOLDER / "noted").read_text().splitlines()) == 3:
                raise MemoryError("no room for the third step")
            print("what a library says at a step")

        hook = attention.register_forward_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
'''


def make(folder):
    """What `python -m venv folder` and `folder/bin/pip install kvpress` would make, as far as the bench uses it."""
    about, packages = "Metadata-Version: 2.1\nName: kvpress\nVersion: 9.8\n", folder / "lib"
    (packages / "kvpress-9.8.dist-info").mkdir(parents=True)
    (packages / "kvpress-9.8.dist-info" / "METADATA").write_text(about)
    (packages / "kvpress.py").write_text(KVPRESS)
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    code = f"import runpy, sys; sys.path.insert(0, {str(packages.resolve())!r}); "
    code += "runpy.run_path(sys.argv[1], run_name='__main__')"
    run = shlex.join([sys.executable, "-I", "-c", code])
    python.write_text(f'#!/bin/sh\n[ "$1" = -I ] && exec {run} "$2"\n')
    python.chmod(0o755)
