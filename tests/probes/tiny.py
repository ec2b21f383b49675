"""Tokenizers for the texts of the probes, and a random model with the vocabulary of a tokenizer."""

from random import Random

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from raas_cache.probes import PROBES
from raas_cache.probes.stories import DIGITS, NUMBERS
from raas_cache.probes.words import ADJECTIVES, EVENTS, NAMES, NOUNS, THINGS, TIMES

from ..helpers import tiny_model


SPLITS = {
    "words": r"\w+|[^\w\s]|\n",  # a space is no token
    "spaced": r" ?\w+|[^\w\s]|\n",  # a word includes the space in front of it, as in GPT-2
    "letters": r"[a-zA-Z]|\d|[^\w\s]|\n",  # two number words begin with the same letter
}


def tokenizer_of(kind="words"):
    """A fast tokenizer that knows every word of the probes, and puts a special token in front of a text."""
    split = pre_tokenizers.Split(Regex(SPLITS[kind]), "removed", invert=True)
    words = " ".join([*NOUNS, *ADJECTIVES, *NAMES, *THINGS, *TIMES, *EVENTS, *NUMBERS, *DIGITS]).split()
    texts = [" ".join(["", *words]), "\n".join(words), *(f"{probe.prompt}\n\n" for probe in PROBES.values())]
    texts += [probe.write(Random(seed), 40).text for probe in PROBES.values() for seed in range(8)]
    found = {piece for text in texts for piece, _ in split.pre_tokenize_str(text)}
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<bos>", *sorted(found)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary))
    tokenizer.pre_tokenizer = split
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def model_of(tokenizer, **options):
    return tiny_model(vocab_size=len(tokenizer), **options)
