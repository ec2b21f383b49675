"""A left-padded batch gives, row for row, what each row gives alone."""

import pytest
import torch

from raas_cache.methods.registry import POLICIES

from ..architectures import build, require
from ..helpers import generate, tiny_model
from ..methods.against_oracle import EVICTING, LATENT_MODES, MODES
from ..oracle import OracleCache
from .alone import BUDGET, PAGE, Alone, chose, forward, make_cache, same_row, settings_of, texts


pytestmark = pytest.mark.filterwarnings("ignore:budget=")
STEPS = 7 * PAGE + 1
# More than the budget, nearly the budget, two tokens, a page less and more one token.
LENGTHS = (BUDGET + PAGE + 2, BUDGET - 1, 2, PAGE - 1, PAGE + 1)


def padded(prompts):
    """The prompts `[rows, longest]`, padded on the left, and their mask."""
    longest = max(map(len, prompts))
    rows = [torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts]
    mask = [torch.arange(longest) >= longest - len(prompt) for prompt in prompts]
    return torch.stack(rows), torch.stack(mask).long()


class Batch:
    """A left-padded batch in one cache, beside each of its rows alone."""

    def __init__(self, model, lengths, settings, oracle=False, tolerance=1e-9):
        self.model, self.settings, self.tolerance = model, settings, tolerance
        self.prompts = texts(lengths)
        self.ids, self.mask = padded(self.prompts)
        self.padding = (self.mask == 0).sum(1).tolist()
        self.cache, self.seen, self.logits = make_cache(settings), 0, []
        self.oracle = oracle
        self.alone = [Alone(model, self.own_cache()) for _ in lengths]

    def own_cache(self):
        if not self.oracle:
            return make_cache(self.settings)
        return OracleCache(**self.settings)

    def prefill(self, sizes=None):
        """The prompts in chunks of these sizes; a chunk that is padding only for a row is no forward of that row."""
        chunks = torch.split(self.ids, sizes or [self.ids.shape[1]], dim=1)
        for chunk in chunks:
            padding = [max(0, min(count - self.seen, chunk.shape[1])) for count in self.padding]
            self.read(chunk, padding, self.mask[:, : self.seen + chunk.shape[1]])
        return self

    def read(self, tokens, padding=None, mask=None):
        """One forward of `tokens` `[rows, new]`, whose first `padding[row]` tokens are padding."""
        padding = padding or [0] * len(tokens)
        if mask is None:
            mask = self.mask = torch.cat([self.mask, torch.ones_like(tokens)], 1)
        logits = forward(self.model, self.cache, tokens, self.seen, mask)
        self.seen += tokens.shape[1]
        for row, alone in enumerate(self.alone):
            if padding[row] == tokens.shape[1]:
                continue
            with self.attention():
                alone.read(tokens[row, padding[row] :])
            torch.testing.assert_close(
                logits[row, padding[row] :], alone.logits[-1], rtol=self.tolerance, atol=self.tolerance
            )
        return self

    def attention(self):
        return _Oracle(self.model) if self.oracle else _Nothing()

    def decode(self, steps=STEPS, seed=1):
        for token in torch.stack(texts([steps] * len(self.alone), seed)).split(1, dim=1):
            self.read(token)
        return self

    def check(self, evicts=True):
        """Every row holds what it holds alone, and every row had to choose."""
        for row, alone in enumerate(self.alone):
            same_row(self.cache, row, alone.cache, self.padding[row])
            assert not evicts or chose(self.cache, self.settings["method"], row), row


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass


class _Oracle(_Nothing):
    """While the context lasts, the model's attention is the oracle's."""

    def __init__(self, model):
        self.model, self.before = model, model.config._attn_implementation

    def __enter__(self):
        self.model.set_attn_implementation("oracle")

    def __exit__(self, *error):
        self.model.set_attn_implementation(self.before)


@pytest.mark.parametrize("granularity", ["head", "layer"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(("method", "mode"), MODES)
def test_every_method_and_mode(method, mode, kv_heads, granularity):
    model = tiny_model(kv_heads=kv_heads, layers=1)
    Batch(model, LENGTHS, settings_of(method, mode, granularity=granularity)).prefill().decode().check()


@pytest.mark.parametrize(("size", "pages"), [(1, 12), (2, 8), (16, 3)])
@pytest.mark.parametrize(("method", "mode"), MODES)
def test_page_sizes(method, mode, size, pages):
    settings = settings_of(method, mode, page_size=size, budget=pages * size)
    lengths = (pages * size + 3, pages * size - 1, 2, max(1, size - 1), size + 1)
    Batch(tiny_model(), lengths, settings).prefill().decode((pages + 1) * size + 2).check()


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_the_oracle_alone(method, mode):
    settings = settings_of(method, mode)
    Batch(tiny_model(layers=1), LENGTHS, settings, oracle=True).prefill().decode().check()


@pytest.mark.parametrize(("method", "mode"), MODES)
def test_the_oracle_in_a_conversation(method, mode):
    """A prompt in chunks, one of them padding only for three rows; generated tokens, a turn, generated tokens."""
    batch = Batch(tiny_model(layers=1), LENGTHS, settings_of(method, mode), oracle=True).prefill([9, 13, 8])
    batch.decode(10).read(torch.stack(texts([6] * len(LENGTHS), 5))).decode(22, seed=6).check()


@pytest.mark.parametrize("sizes", [[9, 13, 8], [20, 2, 8], [24, 6]])
@pytest.mark.parametrize(("method", "mode"), MODES)
def test_a_prompt_in_chunks(method, mode, sizes):
    """The first chunk is padding only for the three short rows."""
    assert sum(sizes) == max(LENGTHS) and sizes[0] <= max(LENGTHS) - max(LENGTHS[2:])
    Batch(tiny_model(layers=1), LENGTHS, settings_of(method, mode)).prefill(sizes).decode().check()


@pytest.mark.parametrize("decoded", [1, PAGE, 2 * PAGE + 3])
@pytest.mark.parametrize(("method", "mode"), MODES)
def test_turns(method, mode, decoded):
    """Two turns: behind an open page that is full, or has room."""
    batch = Batch(tiny_model(layers=1), LENGTHS, settings_of(method, mode)).prefill()
    for seed, length in ((3, 6), (4, 9)):
        batch.decode(decoded, seed).read(torch.stack(texts([length] * len(LENGTHS), seed)))
    batch.decode().check()


@pytest.mark.parametrize(
    "more", [*({"kv_dtype": code} for code in ("int8", "fp8", "int4")), {"scoring": "minmax"}], ids=str
)
@pytest.mark.parametrize("oracle", [False, True])
@pytest.mark.parametrize(
    ("method", "mode"),
    [("raas", "pin"), ("raas", "select"), ("h2o", "evict"), ("rkv", "evict"), ("vase", "pin"), ("triattention", "pin")],
)
def test_codes_and_minmax(method, mode, more, oracle):
    """The prompt in one chunk: a sequence's first chunk is read as it is, later ones by their codes.

    The oracle rounds its scales to float32 at another place.
    """
    tolerance = 1e-4 if oracle and "kv_dtype" in more else 1e-9
    batch = Batch(tiny_model(layers=1), LENGTHS, settings_of(method, mode, **more), oracle, tolerance)
    batch.prefill().decode(14).read(torch.stack(texts([6] * len(LENGTHS), 5))).decode(20, seed=6).check()


@pytest.mark.parametrize("sizes", [[20, 10], [24, 2, 4]])
@pytest.mark.parametrize(("method", "mode"), [("raas", "pin"), ("raas", "select"), ("h2o", "evict")])
def test_the_first_tokens_of_a_row_are_read_before_they_are_8_bit(method, mode, sizes):
    """The first chunk is padding only for the three short rows: their own first chunk comes later."""
    model, settings = tiny_model(layers=1), settings_of(method, mode, kv_dtype="int8")
    Batch(model, (LENGTHS[0], *LENGTHS[2:]), settings).prefill(sizes).decode().check(evicts=False)


def test_the_first_tokens_of_a_row_of_latents_are_read_before_they_are_8_bit():
    require("deepseek_v3")
    model, settings = build("deepseek_v3", torch.float64), settings_of("raas", "pin", kv_dtype="int8")
    Batch(model, (LENGTHS[0], 2, 5), settings, tolerance=1e-4).prefill([28, 2]).decode().check(evicts=False)


@pytest.mark.parametrize(("method", "mode"), [("raas", "pin"), ("raas", "select"), ("h2o", "evict")])
def test_padding_in_a_later_chunk_of_latents_is_not_stored(method, mode):
    """The mask of a latent comes after its tokens: the padding of the second chunk must be known before."""
    require("deepseek_v3")
    model, settings = build("deepseek_v3", torch.float64), settings_of(method, mode)
    Batch(model, (LENGTHS[0], 2, 5), settings, tolerance=1e-4).prefill([24, 6]).decode().check(evicts=False)


@pytest.mark.parametrize(("method", "mode"), LATENT_MODES)
def test_a_latent(method, mode):
    """DeepSeek-V3 caches a latent, and stores its tokens before their mask is seen. Parts of it compute in float32."""
    require("deepseek_v3")
    model = build("deepseek_v3", torch.float64)
    batch = Batch(model, LENGTHS, settings_of(method, mode), tolerance=1e-4).prefill()
    batch.decode(10).read(torch.stack(texts([6] * len(LENGTHS), 5))).decode(seed=6).check()


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss"])
@pytest.mark.parametrize(("method", "mode"), [("raas", "pin"), ("raas", "select"), ("h2o", "evict"), ("rkv", "evict")])
def test_windows_beside_pages(name, method, mode):
    require(name)
    model = build(name, torch.float64)
    batch = Batch(model, LENGTHS, settings_of(method, mode, config=model.config)).prefill()
    batch.decode(10).read(torch.stack(texts([6] * len(LENGTHS), 5))).decode(seed=6).check()


@pytest.mark.parametrize("method", EVICTING)
def test_sampled_text(method):
    """`generate` samples a padded batch; forced on each row alone, its tokens are as likely as they were there."""
    prompts = texts(LENGTHS)
    ids, mask = padded(prompts)
    for mode in POLICIES[method].prompts:
        model, settings = tiny_model(layers=1), settings_of(method, mode)
        cache = make_cache(settings)
        inputs = {"input_ids": ids, "attention_mask": mask}
        out = generate(
            model, inputs, cache, STEPS, suppress_tokens=[0], output_logits=True, return_dict_in_generate=True
        )
        given = torch.stack(out.logits, 1)  # [rows, steps, vocab]
        for row, prompt in enumerate(prompts):
            alone = Alone(model, make_cache(settings)).read(prompt).decode(out.sequences[row, ids.shape[1] : -1])
            expected = torch.stack([logits[-1] for logits in alone.logits])
            torch.testing.assert_close(given[row], expected.float(), rtol=1e-5, atol=1e-5)
            same_row(cache, row, alone.cache, ids.shape[1] - len(prompt))
            assert chose(cache, method, row)
