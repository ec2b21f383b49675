"""`viz.tokens`: the text of a sequence, shaded by what was kept of it."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import TokenizersBackend

from raas_cache import viz

from .by_hand import PLACE, Pieces, Words, recording_of


pytestmark = pytest.mark.filterwarnings("ignore:budget=")


@pytest.mark.parametrize("place", [{}, {"layer": 1}, PLACE], ids=str)
def test_tokens_of_a_chain(embedded, tokenizer, place):
    """Each token, against whether its page was held, step by step and head by head."""
    recording, _, ids = embedded
    shown = viz.tokens(recording, tokenizer, ids, **place)
    assert isinstance(shown, str) and shown._repr_html_() == shown
    found = Pieces(shown).found
    assert "".join(text for *_, text in found) == tokenizer.decode(ids) and len(found) == len(ids)
    layers = [place["layer"]] if "layer" in place else [0, 1, 2]
    heads = [(layer, head) for layer in layers for head in ([0] if "head" in place else [0, 1])]
    histories, pages = {of: recording.history(*of) for of in heads}, recording.pages_of_tokens(layers[0]).tolist()
    of_heads = "1 KV head" if "head" in place else f"{len(heads)} KV heads"
    assert f"it was held, mean of {of_heads}: " in shown
    steps = histories[heads[0]].steps
    struck = 0
    for token, (tag, title, _) in enumerate(found[:-1]):
        after = steps >= token
        held = [history.held[after, history.first.tolist().index(pages[token])] for history in histories.values()]
        evicting = sum(not one[-1] for one in held)
        kept = np.mean([one.sum() for one in held])
        said = f"held for {kept:.0f} of {after.sum()} steps, evicted by {evicting} of {of_heads}"
        assert title == f"token {token}: {said}"
        assert tag == ("del" if evicting == len(heads) else "span")
        struck += tag == "del"
    assert found[-1][:2] == ("span", f"token {len(ids) - 1}: not in the cache yet") and struck > 100
    before, since = shown.split("Since then")
    assert 'title="token 161:' in before and 'title="token 162:' in since, "the prompt is marked off"


def test_shades_of_tokens_by_hand(by_hand):
    """Page 3 goes at step 9, so token 3 was held for 6 of 8 steps, and token 4 for 5 of 7; page 5 goes at step 7."""
    shown = viz.tokens(by_hand, Words(), range(12))
    shades = dict.fromkeys((0, 2, 7, 10, 11), 1) | {3: 6 / 8, 4: 5 / 7, 5: 2 / 6, 6: 1 / 5}
    for token, share in shades.items():
        tag = "del" if token in (3, 4, 5, 6) else "span"
        (piece,) = (line for line in shown.split("<") if f'title="token {token}:' in line)
        assert piece.startswith(tag) and f"rgba(128,128,128,{0.6 * share:.2f})" in piece
    assert "token 4: held for 5 of 7 steps, evicted by 1 of 1 KV head" in shown


def test_text_is_escaped(by_hand):
    shown = viz.tokens(by_hand, Words(), list(range(11)))
    assert "<b>" not in shown and "&lt;b&gt;&amp;10\n" in shown and "white-space:pre-wrap" in shown
    assert [text for *_, text in Pieces(shown).found][3] == " <b>&3\n"


def test_padding_is_left_out_and_pages_gone_before_are_struck(by_hand):
    padded = [99, 99, *range(2, 11)]
    assert len(Pieces(viz.tokens(by_hand, Words(), padded)).found) == 9
    midst = recording_of([[0, 2, 40, 42]] * 2, start=42)
    found = Pieces(viz.tokens(midst, Words(), range(44))).found
    assert [tag for tag, *_ in found] == ["span"] * 4 + ["del"] * 36 + ["span"] * 4
    assert found[20][1] == "token 20: held for 0 of 2 steps, evicted by 1 of 1 KV head"


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
def test_a_character_of_several_tokens_is_whole(kind):
    """Whatever the tokenizer does with bytes and spaces, the pieces make up the text."""
    text = "Zo\u00eb says: \U0001f642 \u2264 \u4e2d\u6587!\n  Two  spaces"
    core = Tokenizer(models.BPE(byte_fallback=kind == "metaspace", unk_token="<unk>"))
    if kind == "bytes":
        core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        trainer = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<unk>"])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace()
        core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
        trainer = trainers.BpeTrainer(special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))])
    core.train_from_iterator(["says: Two spaces Zo Zo"] * 3, trainer)
    tokenizer = TokenizersBackend(tokenizer_object=core)
    ids = tokenizer(text)["input_ids"]
    held = [list(range(step + 1)) for step in range(3, len(ids))]
    found = Pieces(viz.tokens(recording_of(held, page_size=1), tokenizer, ids)).found
    assert "".join(piece for *_, piece in found) == text
    assert not any("\ufffd" in piece for *_, piece in found)
    (smile,) = (title for _, title, piece in found if "\U0001f642" in piece)
    assert smile.startswith("tokens ") and smile.count(" to ") == 1


def test_ids_of_another_length_are_refused(by_hand, embedded, tokenizer):
    for ids, shape in ((range(10), r"\[10\]"), (range(13), r"\[13\]"), (torch.zeros(1, 11), r"\[1, 11\]")):
        with pytest.raises(ValueError, match=f"ids has shape {shape}, and the recording has seen 11 tokens: give"):
            viz.tokens(by_hand, Words(), ids)
    with pytest.raises(ValueError, match=r"ids has shape \[1, 767\]"):
        viz.tokens(embedded[0], tokenizer, embedded[2][None])
