"""Where the recalls are in tokens: against an oracle that only reads the list of tokens."""

import pytest
from transformers import AutoTokenizer

from raas_cache import embedded_model
from raas_cache.probes import PROBES
from raas_cache.probes.tokens import probe_sources

from .tiny import tokenizer_of


@pytest.fixture(scope="module", params=["words", "spaced"])
def tokenizer(request):
    return tokenizer_of(request.param)


def uses(name, words):
    """Fact -> the places of the tokens that give its value, from the words of a text."""
    verb, found = "has" if name == "needle" else "is", {}
    for place in range(2, len(words)):
        if words[place - 1] == verb:
            found.setdefault(words[place - 2], []).append(place)
    return found


@pytest.mark.parametrize("name", PROBES)
def test_recalls_by_an_oracle(name, tokenizer):
    for source in probe_sources(name, tokenizer, 300, 2, seed=0):
        assert tokenizer.decode(source.ids.prompt).split() == tokenizer.decode(
            tokenizer(PROBES[name].prompt)["input_ids"]
        ).split()  # fmt: skip
        words = [word.strip() for word in tokenizer.convert_ids_to_tokens(source.ids.chain)]
        assert len(words) == 300
        expected = [
            (place, words[place], place - of_fact[count], place - of_fact[0])
            for of_fact in uses(name, words).values()
            for count, place in enumerate(of_fact[1:])
            if place >= 150
        ]
        values = PROBES[name].values
        found = [(one.place, values[one.value], one.since_use, one.since_derivation) for one in source.recalls]
        assert found == sorted(expected) and len(found) >= 5
        candidates = [tokenizer.convert_ids_to_tokens(token).strip() for token in source.candidates]
        assert candidates == list(values)


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("tokens", [301, 517])
def test_the_shortest_text_that_is_long_enough(name, tokens, tokenizer):
    """A needle must not be cut off, so a text is hardly longer than needed. Equal seeds give equal texts."""
    source, other = probe_sources(name, tokenizer, tokens, 2, seed=3)
    assert len(source.ids.chain) == tokens and source.ids.chain != other.ids.chain
    assert [source, other] == probe_sources(name, tokenizer, tokens, 2, seed=3)
    assert source != probe_sources(name, tokenizer, tokens, 1, seed=4)[0]
    if name == "needle" and tokens == 517:  # the questions fill more than half of a shorter text
        assert len(source.recalls) >= 22


def test_digits_of_a_tokenizer_of_letters():
    (source,) = probe_sources("lemma-once", tokenizer_of("letters"), 600, 1, seed=0)
    assert len(set(source.candidates)) == 9 and source.recalls


def test_number_words_that_begin_with_the_same_token():
    with pytest.raises(ValueError, match=r"does not begin each of the values two, three, .* with a token of its own"):
        probe_sources("needle", tokenizer_of("letters"), 600, 1, seed=0)


def test_a_value_whose_token_depends_on_its_place():
    """A tokenizer that joins a value with the word behind it, in some lines only."""
    tokenizer = tokenizer_of("words")
    texts = []

    class Joining:
        """Encodes the first recall's line as usual, and every digit 7 of a whole story as 8."""

        is_fast = True

        def __call__(self, text, **options):
            texts.append(text)
            many = text if isinstance(text, list) else [text]
            changed = [one.replace(" 7", " 8") if one.count("\n") > 5 else one for one in many]
            return tokenizer(changed if isinstance(text, list) else changed[0], **options)

    with pytest.raises(ValueError, match=r"does not begin each of the values 1, 2, .* with a token of its own"):
        probe_sources("lemma-once", Joining(), 400, 1, seed=0)
    assert texts


def test_a_tokenizer_without_offsets():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="The tokenizer Slow gives no offsets of its tokens: use a model with a fast"):
        probe_sources("needle", Slow(), 300, 1, seed=0)


def test_a_tokenizer_that_does_not_know_the_words():
    with pytest.raises(ValueError, match="cannot read the data"):
        probe_sources("needle", AutoTokenizer.from_pretrained(embedded_model()), 300, 1, seed=0)


@pytest.mark.parametrize("name", PROBES)
def test_too_few_tokens(name, tokenizer):
    with pytest.raises(ValueError, match=f"tokens=10 leaves a text of {name!r} without a recall: give more"):
        probe_sources(name, tokenizer, 10, 1, seed=0)


def test_too_many_tokens(tokenizer, monkeypatch):
    import raas_cache.probes.tokens as module

    (source,) = probe_sources("lemma-once", tokenizer, 300, 1, seed=0)
    short = dict(PROBES)
    short["lemma-once"] = module.Probe(*(getattr(PROBES["lemma-once"], of) for of in ("prompt", "values", "write")), 5)
    monkeypatch.setattr(module, "PROBES", short)
    with pytest.raises(ValueError, match="tokens=300 is more than a text of 'lemma-once' can have: give at most") as no:
        probe_sources("lemma-once", tokenizer, 300, 1, seed=0)
    most = int(str(no.value).split()[-1].rstrip("."))
    monkeypatch.setattr(module, "SAMPLE", 4)
    assert len(probe_sources("lemma-once", tokenizer, most, 1, seed=0)[0].ids.chain) == most
    assert len(source.ids.chain) == 300
