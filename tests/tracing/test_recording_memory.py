"""No recording keeps a cache alive, nor itself: what is deleted is freed at once, without the cycle collector."""

import gc
import weakref
from contextlib import contextmanager, suppress

import pytest

from raas_cache import DenseCache, RaaSCache, Recording, read, record, viz

from ..helpers import generate, prompt, tiny_model


pytestmark = pytest.mark.filterwarnings("ignore:budget=")
SMALL = {"budget": 48, "page_size": 4, "min_decode_pages": 5}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@contextmanager
def without_collector():
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def tensors_of(cache):
    """Weak references to all that is large."""
    held = ([kv.keys, kv.values, kv.positions, kv.priority] for kv in (layer.engine.kv for layer in cache.layers))
    return [weakref.ref(tensor) for tensors in held for tensor in tensors]


def arrays_of(recording):
    entries = (entry for layer in recording.layers.values() for entry in layer.entries)
    return [weakref.ref(getattr(entry, name)) for entry in entries for name in ("first", "score", "stamp", "resident")]


def alive(references):
    return sum(reference() is not None for reference in references)


def recorded(model, **options):
    cache = RaaSCache(**SMALL)
    with record(cache, **options) as recording:
        generate(model, prompt(2, 14), cache, 60)
    return cache, recording


def test_a_cache_goes_though_its_recording_stays(model):
    with without_collector():
        cache, recording = recorded(model)
        tensors, arrays = tensors_of(cache), arrays_of(recording)
        assert alive(tensors) == 8 and alive(arrays) == 2 * 59 * 4
        del cache
        assert alive(tensors) == 0
        assert alive(arrays) == len(arrays) and recording.history(0, 0).steps[-1] == 72
        del recording
        assert alive(arrays) == 0


def test_a_recording_goes_though_its_cache_stays(model):
    with without_collector():
        cache, recording = recorded(model, layers=[1], heads=[0])
        arrays = arrays_of(recording)
        assert alive(arrays) == 59 * 4
        del recording
        assert alive(arrays) == 0 and cache.get_seq_length() == 73


def test_after_an_error_inside_the_recording_and_one_of_beginning_another(model):
    with without_collector():
        cache = RaaSCache(**SMALL)
        with suppress(KeyError), record(cache) as recording:
            generate(model, prompt(2, 14), cache, 20)
            with suppress(ValueError), record(cache):
                pass
            raise KeyError
        tensors, arrays = tensors_of(cache), arrays_of(recording)
        assert alive(tensors) == 8 and alive(arrays) == 2 * 19 * 4
        del cache, recording
        assert alive(tensors) == alive(arrays) == 0


def test_after_a_reset_what_was_recorded_before_is_gone(model):
    with without_collector():
        cache = RaaSCache(**SMALL)
        with record(cache) as recording:
            generate(model, prompt(2, 14), cache, 20)
            before, tensors = arrays_of(recording), tensors_of(cache)
            cache.reset()
            assert alive(before) == alive(tensors) == 0
            generate(model, prompt(2, 14), cache, 5)
        after, tensors = arrays_of(recording), tensors_of(cache)
        del cache, recording
        assert len(after) == 2 * 4 * 4 and alive(after) == alive(tensors) == 0


def test_saving_loading_and_asking_keep_nothing(model, tmp_path):
    with without_collector():
        cache, recording = recorded(model)
        recording.save(tmp_path / "file")
        loaded = Recording.load(tmp_path / "file")
        loaded.history(1, 1).score.sum()
        loaded.pages_of_tokens(0)
        recording.to_pandas()
        tensors, arrays = tensors_of(cache), [*arrays_of(recording), *arrays_of(loaded)]
        assert cache._repr_html_()
        del cache, recording, loaded
        assert alive(tensors) == alive(arrays) == 0


def test_a_refused_file_keeps_nothing(model, tmp_path):
    with without_collector():
        cache, recording = recorded(model)
        arrays, tensors = arrays_of(recording), tensors_of(cache)
        (tmp_path / "file").write_bytes(b"")
        with suppress(ValueError):
            recording.load(tmp_path / "file")
        del cache, recording
        assert alive(tensors) == alive(arrays) == 0


@pytest.mark.parametrize("name", ["waterfall", "lifetimes", "occupancy", "regret", "tokens"])
def test_a_picture_keeps_neither(model, name):
    """A figure is a cycle of matplotlib's own: it may wait for the collector, the recording it shows may not."""

    class Tokenizer:
        pad_token_id = 0

        def decode(self, ids, **_):
            return " ".join(map(str, ids))

    def draw():
        cache = RaaSCache(**SMALL)
        with record(cache) as recording:
            ids = generate(model, prompt(1, 14), cache, 60)
        dense = DenseCache(48, page_size=4)
        with record(dense) as everything:
            read(model, ids, 14, dense)
        match name:
            case "regret":
                viz.regret(recording, everything, layer=0, head=0)
            case "tokens":
                viz.tokens(recording, Tokenizer(), ids[0])
            case "occupancy":
                viz.occupancy(recording)
            case _:
                getattr(viz, name)(recording, layer=0, head=0)
        references = [weakref.ref(recording), weakref.ref(everything)]
        return [*references, *tensors_of(cache), *tensors_of(dense)]

    if name != "tokens":
        pytest.importorskip("matplotlib")
    draw()  # matplotlib's first import keeps the frames that it came from
    with without_collector():
        references = draw()
        assert len(references) > 10 and alive(references) == 0
