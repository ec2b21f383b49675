"""What users reported of other caches, tried on this one. Each test names its report, where there is one."""

import numpy as np
import pytest
import torch
from transformers import DynamicCache, Gemma3TextConfig, LlamaConfig

from raas_cache import QuestCache, RaaSCache, StreamingLLMCache, from_name, list_methods

from ..helpers import VOCAB, compile_anywhere, generate, prompt, resident_set, tiny_model


def ids(length, batch=1, seed=0):
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def difference(logits, expected):
    return ((logits - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


class TestMasksOfThePast:
    """transformers #34232: a row of a batched chat ends early, and its padding must not be read in the next turn."""

    def compare(self, model, forwards, **options):
        """`forwards` are pairs (ids, mask or None): the logits equal `DynamicCache`'s where the mask shows a token."""
        cache, dense = RaaSCache(256, page_size=4, **options), DynamicCache()
        with torch.no_grad():
            for tokens, mask in forwards:
                logits, expected = (
                    model(tokens, attention_mask=mask, past_key_values=past).logits for past in (cache, dense)
                )
                shown = torch.ones_like(tokens) if mask is None else mask[:, -tokens.shape[1] :]
                torch.testing.assert_close(logits[shown.bool()], expected[shown.bool()], rtol=1e-9, atol=1e-9)
        return cache

    def masks(self, length, *hidden):
        mask = torch.ones(1, length, dtype=torch.long)
        for tokens in hidden:
            mask[:, tokens] = 0
        return mask

    def test_hiding_matters(self, model):
        """The comparisons below would pass with a model that does not look so far back."""
        logits = []
        for hidden in ((), (slice(10, 15),)):
            cache = DynamicCache()
            with torch.no_grad():
                model(ids(20), past_key_values=cache)
                mask = self.masks(25, *hidden)
                logits.append(model(ids(5, seed=1), attention_mask=mask, past_key_values=cache).logits)
        assert difference(*logits) > 0.1

    @pytest.mark.parametrize("options", [{}, {"scoring": "minmax"}, {"prompt": "select"}], ids=str)
    def test_a_turn_hides_part_of_the_prompt(self, model, options):
        self.compare(model, [(ids(20), None), (ids(5, seed=1), self.masks(25, slice(10, 15)))], **options)

    def test_a_decode_step_hides_and_a_later_one_shows_again(self, model):
        tokens = ids(6, seed=1).split(1, dim=1)
        hidden = [(), (slice(3, 9),), (slice(3, 9),), (slice(5, 7), slice(21, 22)), (), (slice(0, 20),)]
        steps = [(token, self.masks(21 + i, *hidden[i])) for i, token in enumerate(tokens)]
        cache = self.compare(model, [(ids(20), None), *steps])
        assert resident_set(cache, 0, 0, 0) == set(range(20, 26))

    def test_tokens_hidden_when_they_came_are_shown_later(self, model):
        first = self.masks(20, slice(4, 9))
        step = self.masks(21, slice(4, 9), slice(20, 21))
        self.compare(
            model, [(ids(20), first), (ids(1, seed=1), step), (ids(3, seed=2), self.masks(24)), (ids(1), None)]
        )

    def test_a_mask_of_four_dimensions_over_the_past(self, model):
        mask = torch.ones(1, 1, 5, 25, dtype=torch.bool).tril(20)
        mask[..., 10:15] = False
        cache, dense = RaaSCache(256, page_size=4), DynamicCache()
        with torch.no_grad():
            for past in (cache, dense):
                model(ids(20), past_key_values=past)
            logits, expected = (
                model(ids(5, seed=1), attention_mask=mask, past_key_values=past).logits for past in (cache, dense)
            )
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
            one = mask.new_ones(1, 1, 1, 26)
            one[..., 3:8] = False
            logits, expected = (
                model(ids(1), attention_mask=one, past_key_values=past).logits for past in (cache, dense)
            )
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("attention", ["eager", "sdpa", "raas"])
    def test_a_batched_chat_whose_pads_are_hidden_in_turn_two(self, attention):
        """`generate` fills a row that has ended with pads and shows them in its own mask; the user hides them."""
        model = tiny_model(dtype=torch.float32)  # eager attention's softmax is of float32, whose limits it exceeds
        inputs, results = prompt(2, 12, (3, 0)), []
        for cache in (RaaSCache(256, page_size=4), DynamicCache()):
            model.set_attn_implementation("sdpa" if attention == "raas" and type(cache) is DynamicCache else attention)
            first = generate(model, inputs, cache, 20, sample=False)
            first[0, 20:] = 0  # row 0 ended after 8 tokens
            both = torch.cat([first, ids(6, batch=2, seed=5)], 1)
            mask = (both != 0).long()
            results.append(generate(model, {"input_ids": both, "attention_mask": mask}, cache, 30, sample=False))
        assert torch.equal(*results)

    def test_a_hidden_token_is_in_no_row_but_its_own(self, model):
        """A row in a batch gives what it gives alone, also where another row's past is hidden; with evictions."""
        mask = torch.ones(2, 90, dtype=torch.long)
        logits = {}
        for rows in ([0, 1], [0], [1]):
            cache = RaaSCache(32, page_size=4, min_decode_pages=2)
            steps = []
            with torch.no_grad():
                model(ids(12, batch=2)[rows], past_key_values=cache)
                for i in range(60):
                    seen = mask[:, : 13 + i].clone()
                    seen[0, 2:6] = int(i % 20 < 10)
                    token = ids(60, batch=2, seed=1)[rows, i : i + 1]
                    steps.append(model(token, attention_mask=seen[rows], past_key_values=cache).logits)
            logits[tuple(rows)] = torch.cat(steps, 1)
        torch.testing.assert_close(logits[0, 1], torch.cat([logits[(0,)], logits[(1,)]]), rtol=1e-9, atol=1e-9)

    def test_a_mask_shorter_than_the_sequence_is_refused(self, model):
        cache = RaaSCache(256)
        with torch.no_grad():
            model(ids(20), past_key_values=cache)
            with pytest.raises(
                ValueError, match=r"the cache has seen 20 tokens and 5 tokens are new, so the mask needs 25"
            ):
                model(ids(5), attention_mask=torch.ones(1, 5), past_key_values=cache)
            model(ids(5), attention_mask=torch.ones(1, 25), past_key_values=cache)
        assert cache.get_seq_length() == 25


def test_a_page_closed_by_a_turn_has_the_stamp_of_its_newest_token(model):
    """prompt="evict": a page opened at 12 that holds 12 to 14 when a turn comes is as old as 14, not as 12."""
    cache = StreamingLLMCache(64, page_size=4)
    with torch.no_grad():
        model(ids(12), past_key_values=cache)
        for token in ids(3, seed=1).split(1, dim=1):
            model(token, past_key_values=cache)
        model(ids(5, seed=2), past_key_values=cache)
    kv = cache.layers[0].engine.kv
    by_first = dict(zip(kv.first[0, 0].tolist(), kv.priority[0, 0].tolist(), strict=True))
    assert by_first[12] == 14
    assert resident_set(cache, 0, 0, 0) == set(range(20))


@pytest.mark.parametrize("name", ["raas", "lazy_eviction", "window"])
def test_a_page_that_a_turn_interrupts_is_stamped_when_it_is_full(model, name):
    """A page opened at 4 gets the tokens 13 to 15 after a turn: its positions are not consecutive."""
    cache = from_name(name, 64, page_size=4, **({} if name == "window" else {"alpha": 0.999}), prompt="pin")
    with torch.no_grad():
        for length in (4, 1, 8, 1, 1, 1):
            model(ids(length, seed=length), past_key_values=cache)
    kv = cache.layers[0].engine.kv
    assert resident_set(cache, 0, 0, 0) == set(range(16))
    page = kv.first[0, 0].tolist().index(4)
    assert kv.positions[0, 0].unflatten(0, (-1, 4))[page].tolist() == [4, 13, 14, 15]
    # The state of LazyEviction is the age of the page at its timestamp.
    stamp = kv.priority if name != "lazy_eviction" else 4 + kv.states[..., 0]
    assert stamp[0, 0, page] == 15


class TestInput:
    """transformers.js #1638: a conversation is kept in the cache, however its tokens reach the model."""

    @pytest.mark.parametrize("name", list_methods())
    def test_a_prompt_fed_token_by_token_stays(self, model, name):
        cache = from_name(name, 48, page_size=4, min_decode_pages=2)
        whole = from_name(name, 48, page_size=4, min_decode_pages=2)
        tokens = ids(30)
        with torch.no_grad():
            with cache.prefilling():
                for token in tokens.split(1, dim=1):
                    model(token, past_key_values=cache)
            model(tokens, past_key_values=whole)
            for token in ids(80, seed=1).split(1, dim=1):
                logits = [model(token, past_key_values=past).logits for past in (cache, whole)]
                if cache.settings.prompt != "evict":
                    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)
        if cache.settings.prompt != "evict":
            assert resident_set(cache, 0, 0, 0) >= set(range(30))
            assert resident_set(cache, 0, 0, 0) == resident_set(whole, 0, 0, 0)

    def test_it_is_not_compiled_and_ends_with_the_context(self, model):
        cache = RaaSCache(64, page_size=4)
        assert cache.is_compileable
        with cache.prefilling():
            assert not cache.is_compileable
            generate(model, prompt(1, 8), cache, 3)
        assert cache.layers[0].table.counts.prefilled[0] == 10
        with torch.no_grad():
            model(ids(1), past_key_values=cache)
        assert cache.layers[0].table.counts.prefilled[0] == 10 and cache.is_compileable


class TestReset:
    def test_another_model_after_reset(self):
        """What was learnt of the first model's layers must not serve the second."""
        gemma = tiny_model(
            cls=Gemma3TextConfig, layers=3, sliding_window=8,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        )  # fmt: skip
        llama = tiny_model(layers=2)
        cache = RaaSCache(256)
        generate(gemma, prompt(), cache, 10)
        assert [type(layer).__name__ for layer in cache.layers].count("PagedLayer") == 1
        cache.reset()
        tokens = generate(llama, prompt(), cache, 20)
        assert torch.equal(tokens, generate(llama, prompt(), DynamicCache(), 20))
        cache.reset()
        dense = DynamicCache(config=gemma.config)
        assert torch.equal(generate(gemma, prompt(), cache, 20), generate(gemma, prompt(), dense, 20))

    def test_it_warns_again(self, model):
        cache = RaaSCache(16, page_size=4, min_decode_pages=3)
        for _ in range(2):
            with pytest.warns(UserWarning, match="leaves 0 pages"):
                generate(model, prompt(), cache, 2)
            cache.reset()

    def test_the_same_model_keeps_its_layers(self, model):
        """A compiled step knows its layers: new ones would be compiled anew."""
        cache = RaaSCache(256)
        generate(model, prompt(), cache, 2)
        layers = list(cache.layers)
        cache.reset()
        generate(model, prompt(), cache, 2)
        assert all(map(lambda old, new: old is new, layers, cache.layers))


class TestGradients:
    def test_no_grad_forgotten(self):
        model = tiny_model()
        cache, dense = RaaSCache(256), DynamicCache()
        for tokens in (ids(12), ids(1, seed=1), ids(4, seed=2), ids(1, seed=3)):
            logits, expected = (model(tokens, past_key_values=past).logits for past in (cache, dense))
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("new", [1, 4])
    def test_a_backward_is_refused(self, new):
        model, cache = tiny_model(), RaaSCache(256)
        model(ids(12), past_key_values=cache)
        loss = model(ids(new, seed=1), past_key_values=cache).logits.sum()
        with pytest.raises(RuntimeError, match=r"without gradients.*torch.no_grad\(\).*use_cache=False"):
            loss.backward()

    def test_the_prompt_has_the_gradients_that_it_has_without_a_cache(self):
        gradients = []
        for cache in (None, RaaSCache(256)):
            model = tiny_model()
            model(ids(12), past_key_values=cache).logits.sum().backward()
            gradients.append(torch.cat([weight.grad.flatten() for weight in model.parameters()]))
        torch.testing.assert_close(*gradients)


class TestModes:
    @pytest.mark.parametrize("name", list_methods())
    def test_prefill_in_inference_mode_and_decode_without(self, model, name):
        """vllm #1968: Inplace update to inference tensor outside InferenceMode is not allowed."""
        results = []
        for prefill, decode in ((torch.no_grad, torch.no_grad), (torch.inference_mode, torch.no_grad)):
            cache = from_name(name, 32, page_size=4, min_decode_pages=2)
            with prefill():
                logits = [model(ids(12), past_key_values=cache).logits]
            with decode():
                for token in ids(60, seed=1).split(1, dim=1):
                    logits.append(model(token, past_key_values=cache).logits)
            with prefill():
                logits.append(model(ids(5, seed=2), past_key_values=cache).logits)
                cache.reorder_cache(torch.tensor([0]))
            with decode():
                for token in ids(40, seed=3).split(1, dim=1):
                    logits.append(model(token, past_key_values=cache).logits)
            results.append(torch.cat(logits, 1))
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("name", list_methods())
    @pytest.mark.parametrize(("kv_dtype", "bound"), [(None, 0.03), ("int8", 0.03), ("int4", 0.1)])
    def test_autocast_gives_keys_and_values_of_two_dtypes(self, name, kv_dtype, bound):
        """torchtune #1349: Index put requires the source and destination dtypes match."""
        model = tiny_model(dtype=torch.float32, sharp=False)
        cache = from_name(name, 256, kv_dtype=kv_dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for tokens in (ids(12), *ids(5, seed=1).split(1, dim=1), ids(4, seed=2)):
                logits = model(tokens, past_key_values=cache).logits
            expected = model(torch.cat([ids(12), ids(5, seed=1), ids(4, seed=2)], 1)).logits[:, -4:]
        assert cache.layers[0].table.dtypes == (torch.float32, torch.bfloat16)
        assert difference(logits.float(), expected.float()) < bound

    def test_compileable_only_where_generate_compiles(self, model):
        """peft #2379 and its kin: code of others takes `is_compileable` for a promise, and a CPU compiles nothing."""
        answers = []

        class Asked(RaaSCache):
            @property
            def is_compileable(self):
                answers.append(super().is_compileable)
                return answers[-1]

        generate(model, prompt(), Asked(256), 3)
        assert answers and not any(answers)
        answers.clear()
        generate(model, prompt(), Asked(256), 3, compile_config=compile_anywhere())
        assert all(answers)
        answers.clear()
        generate(model, prompt(), Asked(256), 3, compile_config=compile_anywhere(), disable_compile=True)
        assert answers and not any(answers)


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "P_TUNING"])
def test_peft_prompt_learning(method):
    """peft #2379: prompt tuning and generate with a cache."""
    peft = pytest.importorskip("peft")
    settings = {"num_virtual_tokens": 6, "task_type": "CAUSAL_LM"}
    kind = {"PROMPT_TUNING": peft.PromptTuningConfig, "P_TUNING": peft.PromptEncoderConfig}[method]
    model = peft.get_peft_model(tiny_model(dtype=torch.float32), kind(**settings)).eval()
    results = []
    for cache in (RaaSCache(256), DynamicCache()):
        torch.manual_seed(0)
        results.append(model.generate(**prompt(), past_key_values=cache, max_new_tokens=12, pad_token_id=0))
    assert torch.equal(*results)


class TestArguments:
    def test_the_class_for_an_instance(self, model):
        with pytest.raises(AttributeError, match=r"RaaSCache is a class.*pass an instance, RaaSCache\(budget=1024\)"):
            generate(model, prompt(), RaaSCache, 3)

    @pytest.mark.parametrize("budget", [np.int64(64), torch.tensor(64), [np.int32(64), 64]], ids=str)
    def test_whole_numbers_of_every_kind(self, model, budget):
        cache = RaaSCache(budget, page_size=np.int8(4), min_decode_pages=np.uint8(2))
        generate(model, prompt(), cache, 5)
        assert cache.budget in (64, (64, 64)) and cache.settings.page_size == 4

    @pytest.mark.parametrize("budget", [64.0, "64", None, True, [64, 2.5]], ids=str)
    def test_what_is_no_whole_number(self, budget):
        with pytest.raises(TypeError, match=r"budget=.* must be an int"):
            RaaSCache(budget)

    def test_layers_are_counted_in_whole_numbers(self):
        with pytest.raises(TypeError, match=r"dense_layers=2\.5 must be an int"):
            QuestCache(64, dense_layers=2.5)

    @pytest.mark.parametrize("config", [{}, "llama", LlamaConfig], ids=str)
    def test_what_is_no_config(self, config):
        with pytest.raises(TypeError, match=r"config=.* must be a model's config \(model.config\)"):
            RaaSCache(64, config=config)


class TestMemory:
    def test_a_large_budget_takes_what_its_chain_needs(self, model):
        large, small = RaaSCache(10**6), RaaSCache(256)
        for cache in (large, small):
            generate(model, prompt(1, 10), cache, 100)
        assert large.nbytes <= small.nbytes

    @pytest.mark.parametrize("name", [name for name in list_methods() if name not in ("quest", "dense")])
    def test_pages_as_they_come_change_nothing(self, model, name):
        tokens = []
        for is_preallocated in (False, True):
            cache = from_name(name, 400, page_size=4)
            if is_preallocated:
                cache.preallocate()
            tokens.append(generate(model, prompt(2, 10, (0, 3)), cache, 500))
            whole = cache.nbytes
        assert torch.equal(*tokens)
        assert whole == cache.nbytes and cache.evictions > 0

    def test_a_store_grows_up_to_its_budget(self, model):
        cache, sizes = RaaSCache(1024, page_size=4), []
        with torch.no_grad():
            model(ids(10), past_key_values=cache)
            for token in ids(1100, seed=1).split(1, dim=1):
                model(token, past_key_values=cache)
                sizes.append(cache.nbytes)
        whole = RaaSCache(1024, page_size=4)
        whole.preallocate()
        with torch.no_grad():
            model(ids(10), past_key_values=whole)
        assert sizes == sorted(sizes) and sizes[0] < whole.nbytes / 4
        assert sizes[-1] == whole.nbytes and len(set(sizes)) < 10
