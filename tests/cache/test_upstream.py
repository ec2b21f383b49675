"""transformers' own generation and cache tests, with RaaSCache at full budget where they use the default cache.

A test here checks what the upstream test of the same name checks. docs/upstream-tests.md says which upstream tests
these are, and which have no counterpart and why.
"""

import copy

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import DynamicCache, LlamaConfig, Qwen3Config
from transformers.generation import GenerateBeamDecoderOnlyOutput, GenerateDecoderOnlyOutput

from raas_cache.common.upstream import CACHE_ARGUMENT

from ..helpers import VOCAB, compile_anywhere, prompt, tiny_model
from .upstream import (
    BEAM,
    GREEDY,
    INPUTS,
    LENGTH,
    ONE_ROW,
    SAMPLE,
    STEPS,
    assert_same_cache,
    assert_similar,
    full_budget,
    run,
    same_as_dynamic,
)


@pytest.fixture(params=[LlamaConfig, Qwen3Config], ids=["llama", "qwen3"], scope="module")
def model(request):
    return tiny_model(cls=request.param)


def embedded(model, inputs, ids=True):
    """The inputs with their embeddings, and without their ids if these are not wanted."""
    embeddings = {"inputs_embeds": model.get_input_embeddings()(inputs["input_ids"]).detach()}
    return {name: tensor for name, tensor in (inputs | embeddings).items() if ids or name != "input_ids"}


class TestStrategies:
    """`generate` in each of its modes, and all that it can return but attentions, which a paged cache has not."""

    def test_greedy_generate(self, model):
        assert same_as_dynamic(model, **GREEDY).sequences.shape == (2, LENGTH + STEPS)

    def test_sample_generate(self, model):
        assert same_as_dynamic(model, **SAMPLE).sequences.shape == (2, LENGTH + STEPS)

    def test_beam_search_generate(self, model):
        assert same_as_dynamic(model, **GREEDY, **BEAM).sequences.shape == (2, LENGTH + STEPS)

    def test_beam_sample_generate(self, model):
        assert same_as_dynamic(model, **SAMPLE, **BEAM).sequences.shape == (2, LENGTH + STEPS)

    def check_outputs(self, model, kind, rows, **kw):
        """`rows` as the model sees them: beams or returned sequences."""
        output = same_as_dynamic(model, output_logits=True, output_hidden_states=True, **kw)
        assert type(output) is kind
        for given in (output.scores, output.logits):
            assert [step.shape for step in given] == [(rows, VOCAB)] * STEPS
        widths = [LENGTH] + [1] * (STEPS - 1)
        layers, size = len(output.past_key_values) + 1, model.config.hidden_size
        for step, width in zip(output.hidden_states, widths, strict=True):
            assert [hidden.shape for hidden in step] == [(rows, width, size)] * layers
        assert output.past_key_values.get_seq_length() == output.sequences.shape[1] - 1
        assert output.past_key_values.batch_size == rows
        return output

    def test_greedy_generate_dict_outputs_use_cache(self, model):
        self.check_outputs(model, GenerateDecoderOnlyOutput, 2, **GREEDY)

    def test_sample_generate_dict_output(self, model):
        output = self.check_outputs(model, GenerateDecoderOnlyOutput, 4, num_return_sequences=2, **SAMPLE)
        assert output.sequences.shape == (4, LENGTH + STEPS)

    def test_beam_search_generate_dict_outputs_use_cache(self, model):
        self.check_outputs(model, GenerateBeamDecoderOnlyOutput, 4, **GREEDY, **BEAM)

    def test_beam_sample_generate_dict_output(self, model):
        self.check_outputs(model, GenerateBeamDecoderOnlyOutput, 4, **SAMPLE, **BEAM)

    def test_transition_scores_beam_search_decoder_only(self, model):
        kw = {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.0}
        output = same_as_dynamic(model, sample=False, **kw)
        scores = model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)
        torch.testing.assert_close(scores.sum(-1), output.sequences_scores)

    def test_cfg_mixin(self, model):
        """Guidance runs a second context through the model, in a cache of its own, between our steps."""
        guided = same_as_dynamic(model, ONE_ROW, sample=False, guidance_scale=1.5)
        negative = prompt(1, 3, seed=2)["input_ids"]
        other = same_as_dynamic(model, ONE_ROW, sample=False, guidance_scale=1.5, negative_prompt_ids=negative)
        assert not torch.equal(guided.scores[-1], other.scores[-1])

    def test_eos_token_id_int_and_list_greedy_search(self, model):
        """A row that has ended is fed padding until the others have."""
        free = run(model, INPUTS, DynamicCache(), sample=False).sequences[:, LENGTH:]
        ends = [free[0, 1].item(), free[1, 3].item()]
        for eos in (ends[0], ends):
            output = same_as_dynamic(model, sample=False, eos_token_id=eos, min_new_tokens=0)
            assert output.sequences[0, LENGTH + 1] == ends[0] and not output.sequences[0, LENGTH + 2 :].any()

    def test_generate_with_and_without_cache(self, model):
        plain = run(model, INPUTS, None, use_cache=False, **GREEDY)
        cached = run(model, INPUTS, full_budget(), **GREEDY)
        assert plain.past_key_values is None and torch.equal(cached.sequences, plain.sequences)
        torch.testing.assert_close(cached.scores, plain.scores)

    def test_eager_matches_sdpa_generate(self, model):
        # transformers' eager softmax is float32, where the mask of float64 is -inf and a padding row NaN.
        sdpa = copy.deepcopy(model).float()
        eager = copy.deepcopy(sdpa)
        eager.set_attn_implementation("eager")
        ours = run(eager, INPUTS, full_budget(), **GREEDY)
        for each in (eager, sdpa):
            expected = run(each, INPUTS, DynamicCache(), **GREEDY)
            assert_similar(ours, expected, INPUTS["attention_mask"], rtol=1e-3, atol=1e-3)


def assistant(model, kind):
    """A model that drafts two tokens at a time: `"same"` has its drafts accepted, `"random"` has them rejected."""
    other = copy.deepcopy(model) if kind == "same" else tiny_model(cls=type(model.config), seed=1)
    other.generation_config.num_assistant_tokens = 2
    other.generation_config.num_assistant_tokens_schedule = "constant"
    return other


def forwards_of(model, function):
    """What `function` returns, and how many forwards of `model` it took."""
    calls = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    try:
        return function(), len(calls)
    finally:
        handle.remove()


class TestAssisted:
    @pytest.mark.parametrize("kind", ["random", "same"])
    def test_assisted_decoding_matches_greedy_search(self, model, kind):
        kw = {"output_logits": True, "output_hidden_states": True, **GREEDY}
        greedy = run(model, ONE_ROW, DynamicCache(), **kw)
        helper = assistant(model, kind)
        ours, forwards = forwards_of(model, lambda: run(model, ONE_ROW, full_budget(), assistant_model=helper, **kw))
        assert_similar(ours, greedy)
        assert len(ours.hidden_states) == STEPS
        assert (forwards < STEPS) == (kind == "same")

    def test_prompt_lookup_decoding_matches_greedy_search(self, model):
        # The prompt holds its own continuation, so that some drafts are accepted.
        known = run(model, ONE_ROW, DynamicCache(), sample=False).sequences
        inputs = {"input_ids": torch.cat([known, ONE_ROW["input_ids"]], 1)}
        greedy = run(model, inputs, DynamicCache(), sample=False, steps=40)
        lookup = {"steps": 40, "sample": False, "prompt_lookup_num_tokens": 2}
        ours, forwards = forwards_of(model, lambda: run(model, inputs, full_budget(), **lookup))
        assert_similar(ours, greedy)
        assert forwards < 40

    def test_assisted_decoding_sample(self, model):
        output = same_as_dynamic(model, ONE_ROW, assistant_model=assistant(model, "same"), **SAMPLE)
        assert output.sequences.shape == (1, LENGTH + STEPS)

    def test_assisted_generation_early_exit(self, model):
        """The model's own first layer drafts."""
        ours = run(model, ONE_ROW, full_budget(), sample=False, assistant_early_exit=1)
        assert_similar(ours, run(model, ONE_ROW, DynamicCache(), sample=False))

    @pytest.mark.parametrize("kind", ["random", "same"])
    def test_generated_length_assisted_generation(self, model, kind):
        kw = {"sample": False, "assistant_model": assistant(model, kind)}
        for steps in (1, 4, 7):
            output = run(model, ONE_ROW, full_budget(), steps=steps, **kw)
            assert output.sequences.shape[1] == LENGTH + steps
            assert output.past_key_values.get_seq_length() == LENGTH + steps - 1


class TestInputs:
    def test_generate_without_input_ids(self, model):
        assert same_as_dynamic(model, {}, bos_token_id=5, **GREEDY).sequences[:, 0].tolist() == [5]

    def test_generate_from_random_inputs_embeds(self, model):
        inputs = embedded(model, INPUTS)
        other = inputs | {"inputs_embeds": torch.rand_like(inputs["inputs_embeds"])}
        outputs = [same_as_dynamic(model, each, sample=False) for each in (inputs, other)]
        for one, two in zip(*(output.scores for output in outputs), strict=True):
            assert not torch.allclose(one, two)

    @pytest.mark.parametrize("num_beams", [1, 2], ids=["greedy", "beam search"])
    def test_generate_from_inputs_embeds(self, model, num_beams):
        kw = {"sample": False, "num_beams": num_beams}
        from_ids = run(model, INPUTS, DynamicCache(), **kw)
        both, embeddings = (same_as_dynamic(model, embedded(model, INPUTS, ids), **kw) for ids in (True, False))
        assert torch.equal(both.sequences, from_ids.sequences)
        assert torch.equal(embeddings.sequences, from_ids.sequences[:, LENGTH:])
        for output in (both, embeddings):
            assert_same_cache(output.past_key_values, from_ids.past_key_values, INPUTS["attention_mask"])

    def check_length_if_input_embeds(self, model, **kw):
        """Limits count the prompt's tokens, whether they come as ids or embedded."""
        expected = model.generate(**ONE_ROW, past_key_values=DynamicCache(), do_sample=False, pad_token_id=0, **kw)
        inputs, cache = embedded(model, ONE_ROW, ids=False), full_budget()
        ours = model.generate(**inputs, past_key_values=cache, do_sample=False, pad_token_id=0, **kw)
        assert torch.equal(ours, expected[:, LENGTH:])
        assert cache.get_seq_length() == expected.shape[1] - 1
        return expected.shape[1]

    def test_max_length_if_input_embeds(self, model):
        assert self.check_length_if_input_embeds(model, max_length=12) == 12

    def test_min_length_if_input_embeds(self, model):
        # Any token but one ends the row, once one may.
        ends = list(range(VOCAB - 1))
        assert self.check_length_if_input_embeds(model, min_length=10, max_length=20, eos_token_id=ends) == 11

    def test_left_padding_compatibility(self, model):
        pad, inputs, logits = torch.nn.functional.pad, prompt(2, LENGTH), []
        for padding in (0, 32):
            ids, mask = (pad(inputs[name], (padding, 0)) for name in ("input_ids", "attention_mask"))
            positions, cache = (mask.cumsum(-1) - 1).clamp(min=0), full_budget()
            with torch.no_grad():
                for _ in range(2):
                    output = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
                    logits.append(output.logits[:, -1])
                    ids, mask, positions = ids[:, -1:], pad(mask, (0, 1), value=1), positions[:, -1:] + 1
        torch.testing.assert_close(logits[:2], logits[2:])

    def test_generate_with_and_without_position_ids(self, model):
        positions = (INPUTS["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        without = same_as_dynamic(model, sample=False)
        given = same_as_dynamic(model, INPUTS | {"position_ids": positions}, sample=False)
        assert torch.equal(given.sequences, without.sequences)

    def test_custom_4d_attention_mask(self, model):
        """Three continuations of one prefix, in a row each and side by side behind the prefix."""
        prefix, ends = [10, 11, 12], [13, 14, 15]
        rows = torch.tensor([[*prefix, end] for end in ends])
        seen = torch.ones(6, 6).tril()
        seen[4, 3] = seen[5, 3:5] = 0
        mask = torch.zeros(1, 1, 6, 6, dtype=model.dtype).masked_fill(seen == 0, torch.finfo(model.dtype).min)
        positions = torch.tensor([[0, 1, 2, 3, 3, 3]])
        with torch.no_grad():
            apart = model(rows, past_key_values=full_budget()).logits[:, -1]
            next_logits = []
            for cache in (full_budget(), DynamicCache()):
                settings = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
                together = model(torch.tensor([prefix + ends]), **settings).logits[0, -3:]
                torch.testing.assert_close(together, apart)
                next_logits.append(model(torch.tensor([[7]]), past_key_values=cache).logits)
        torch.testing.assert_close(*next_logits)

    def test_forward_with_logits_to_keep(self, model):
        with torch.no_grad():
            kept = [model(**INPUTS, past_key_values=full_budget(), logits_to_keep=n).logits for n in (0, 1)]
        assert [logits.shape for logits in kept] == [(2, LENGTH, VOCAB), (2, 1, VOCAB)]
        torch.testing.assert_close(kept[0][:, -1:], kept[1])

    def test_generate_methods_with_logits_to_keep(self, model):
        everything = same_as_dynamic(model, sample=False, logits_to_keep=0)
        assert torch.equal(everything.sequences, same_as_dynamic(model, sample=False).sequences)

    def test_prepare_inputs_for_generation_kwargs_forwards(self, model):
        cache = full_budget()
        arbitrary = {"output_hidden_states": True, "custom_arg": "value", "numeric_arg": 42}
        inputs = model.prepare_inputs_for_generation(**INPUTS, past_key_values=cache, **arbitrary)
        assert inputs.items() >= arbitrary.items() and inputs[CACHE_ARGUMENT] is cache
        assert torch.equal(inputs["input_ids"], INPUTS["input_ids"])

    def test_prepare_inputs_for_generation_decoder_llm(self, model):
        """A filled cache takes nothing away from the ids, and no embeddings after the prompt.

        The mask comes in four dimensions, as for `StaticCache`, but of the new tokens only. Upstream gives a mask
        without the tokens in the cache, which is refused here.
        """
        inputs, cache = embedded(model, INPUTS), full_budget()
        with torch.no_grad():
            model(INPUTS["input_ids"][:, :3], past_key_values=cache)
        first = model.prepare_inputs_for_generation(**inputs, is_first_iteration=True)
        assert first["input_ids"] is None and first["inputs_embeds"] is not None
        inputs["attention_mask"] = torch.cat([torch.ones(2, 3), inputs["attention_mask"]], 1)
        then = model.prepare_inputs_for_generation(**inputs, past_key_values=cache)
        assert then[CACHE_ARGUMENT] is cache and "inputs_embeds" not in then
        assert torch.equal(then["input_ids"], INPUTS["input_ids"])
        masks = then["attention_mask"]
        for mask in masks.values() if isinstance(masks, dict) else [masks]:
            assert mask.shape == (2, 1, LENGTH, LENGTH)


class TestCompilation:
    def test_generate_compile_model_forward_fullgraph(self, model):
        """A greedy loop whose decode steps are compiled as one graph, for one cache after the other."""
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(model.forward, fullgraph=True, backend="eager")
        for inputs in (INPUTS, prompt(2, LENGTH, (0, 3), seed=5)):
            whole, cache, ids = run(model, inputs, DynamicCache(), sample=False), full_budget(), []
            cache.preallocate()
            with torch.no_grad():
                places = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
                out = model(**inputs, past_key_values=cache, position_ids=places)
                for _ in range(STEPS):
                    ids.append(out.logits[:, -1:].argmax(-1))
                    places = places[:, -1:] + 1
                    out = compiled(input_ids=ids[-1], past_key_values=cache, position_ids=places)
            assert torch.equal(torch.cat([inputs["input_ids"], *ids], 1), whole.sequences)
        assert counters["stats"]["unique_graphs"] == 1

    def test_generate_compilation_all_outputs(self, model):
        outputs = {"output_logits": True, "output_hidden_states": True, "sample": False}
        ours = run(model, INPUTS, full_budget(), compile_config=compile_anywhere(), **outputs)
        expected = run(model, INPUTS, DynamicCache(), **outputs)
        assert_similar(ours, expected, INPUTS["attention_mask"])
        torch.testing.assert_close(ours.logits, expected.logits)
        torch.testing.assert_close(ours.hidden_states[1:], expected.hidden_states[1:])
        assert hasattr(model, "_compiled_call")
