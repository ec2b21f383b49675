"""A recording is loaded as it was saved; a damaged, foreign or forged file is refused by name, and never unpickled."""

import io
import json
import pickle
import random
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from raas_cache import RaaSCache, Recording, from_name, list_methods, record
from raas_cache.methods.registry import POLICIES
from raas_cache.tracing import recording_file

from ..helpers import generate, prompt, tiny_model


pytestmark = pytest.mark.filterwarnings("ignore:budget=")
SMALL = {"budget": 48, "page_size": 4, "min_decode_pages": 5}
OLD = Path(__file__).parents[1] / "data" / "format-1.recording"  # written before files had a checksum
FLIPS = 300


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def recording(model):
    cache = RaaSCache(**SMALL, alpha=0.1)
    with record(cache) as recording:
        generate(model, prompt(2, 14, padding=(0, 6)), cache, 60, suppress_tokens=[0])
    assert cache.evictions > 0
    return recording


@pytest.fixture
def path(recording, tmp_path):
    recording.save(tmp_path / "a.recording")
    return tmp_path / "a.recording"


def content(recording):
    """All that a recording says, to the bit."""
    about = recording.method, recording.budget, recording.page_size, recording.prompt
    layers = []
    for index, layer in recording.layers.items():
        layers.append((index, layer.heads, layer.begin.dtype, layer.begin.tolist()))
        for forward in layer.calls():
            arrays = (getattr(forward, name) for name in ("first", "score", "priority", "resident"))
            layers.append((forward.step, forward.page, *((a.dtype, a.shape, a.tobytes()) for a in arrays)))
    return about, layers


def refused_or_equal(path, expected):
    """Whether loading `path` gives a ValueError that names the file; if not, it gives what `expected` is."""
    try:
        loaded = Recording.load(path)
    except ValueError as error:
        assert str(error).startswith(f"path={str(path)!r} is not a recording, or is damaged: ")
        assert str(error).endswith(". Give a file that Recording.save wrote.")
        return True
    assert content(loaded) == expected
    return False


def test_saved_and_loaded(recording, path, tmp_path):
    assert content(Recording.load(path)) == content(recording)
    by_layer = Recording("RaaSPolicy()", (np.int64(48), 64), 4, "pin")
    by_layer.save(tmp_path / "empty")
    loaded = Recording.load(str(tmp_path / "empty"))
    assert loaded.budget == (48, 64) and not loaded.layers


@pytest.mark.parametrize(
    ("method", "prompt_mode"), [(method, mode) for method in list_methods() for mode in POLICIES[method].prompts]
)
def test_every_method_and_a_later_turn_can_be_loaded(model, method, prompt_mode, tmp_path):
    cache, turn = from_name(method, **SMALL, prompt=prompt_mode), 11
    tokens = prompt(2, 90, seed=4)["input_ids"]
    with record(cache) as recording, torch.no_grad():
        for forward in tokens.split([13, *[1] * 38, turn, *[1] * 28], dim=1):
            model(forward, past_key_values=cache)
    recording.save(tmp_path / "file")
    assert content(Recording.load(tmp_path / "file")) == content(recording)


@pytest.mark.parametrize("of", ["this format", "the format before"])
def test_flipped_bits(of, path):
    if of == "the format before":
        path.write_bytes(OLD.read_bytes())
    data, expected, chosen = path.read_bytes(), content(Recording.load(path)), random.Random(of)
    refused = 0
    for _ in range(FLIPS):
        place, flipped = chosen.randrange(8 * len(data)), bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        refused += refused_or_equal(path, expected)
    assert refused > 0.8 * FLIPS  # the others hit a date, or a name that no reader looks at


def test_cut_and_lengthened(path):
    data, expected, chosen = path.read_bytes(), content(Recording.load(path)), random.Random(0)
    for length in [*range(64), *(chosen.randrange(len(data)) for _ in range(150)), *range(len(data) - 64, len(data))]:
        path.write_bytes(data[:length])
        assert refused_or_equal(path, expected), length
    for more in (b"\0", b"PK\5\6", data[:100], data[-100:], data):
        for longer in (data + more, more + data):
            path.write_bytes(longer)
            refused_or_equal(path, expected)


class Trap:
    """Unpickled, it fails the test."""

    def __reduce__(self):
        return pytest.fail, ("a file was unpickled",)


def zipped(**members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            archive.writestr(name.replace("_", "."), member)
    return buffer.getvalue()


def array(value):
    buffer = io.BytesIO()
    np.save(buffer, value)
    return buffer.getvalue()


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


DEEP = "[" * 100_000 + "]" * 100_000
HUGE = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,)}\n"
HUGE = b"\x93NUMPY\1\0" + bytes([len(HUGE), 0]) + HUGE  # what a .npy file of 8 TB begins with
FOREIGN = {
    "empty": b"",
    "text": b"step,page\n1,2\n",
    "JSON": json.dumps({"format": 2}).encode(),
    "deep JSON": DEEP.encode(),
    "pickle": pickle.dumps(Trap()),
    "zip": zipped(readme_txt=b"hello"),
    "empty zip": zipped(),
    "npy": array(np.arange(3)),
    "npz": npz(a=np.arange(3)),
    "npz of pickles": npz(about=np.array([Trap()], object)),
    "no array": zipped(about_npy=b"hello"),
    "short array": zipped(about_npy=HUGE),
    "array and more": zipped(about_npy=array("{}") + b"more"),
    "no JSON": npz(about=np.array("about")),
    "JSON list": npz(about=np.array("[1, 2]")),
    "JSON number": npz(about=np.array(2)),
    "nested about": npz(about=np.array(DEEP)),
    "no format": npz(about=np.array("{}")),
    "format true": npz(about=np.array('{"format": true}')),
    "format list": npz(about=np.array('{"format": [2]}')),
    "newer": npz(about=np.array('{"format": 4, "pages": "elsewhere"}')),
    "no checksum": npz(about=np.array('{"format": 2}')),
    "wrong checksum": npz(about=np.array('{"format": 2}'), sha256=np.array("0" * 64)),
    "format 1 of pickles": npz(about=np.array('{"format": 1}'), first=np.array([Trap()], object)),
    "format 1 of nothing": npz(about=np.array('{"format": 1}')),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_files_are_refused(kind, tmp_path):
    (tmp_path / "file").write_bytes(FOREIGN[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert refused_or_equal(tmp_path / "file", None)


def test_what_is_wrong_is_said(path):
    for data, wrong in (
        (b"", "File is not a zip file"),
        (FOREIGN["npz"], "it is an archive without a member 'about'"),
        (FOREIGN["newer"], "it has format 4, and this version reads 1, 2, 3"),
        (FOREIGN["no checksum"], "it has no checksum"),
        (FOREIGN["wrong checksum"], "its content does not match its checksum"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=wrong):
            Recording.load(path)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recording.load(tmp_path / "none")
    with pytest.raises(OSError):
        Recording.load(tmp_path)


def test_the_format_before_is_loaded():
    loaded = Recording.load(OLD)
    assert (loaded.budget, loaded.page_size, loaded.prompt, loaded.recorded) == (48, 4, "pin", [1])
    history = loaded.history(1, 1)
    assert history.steps.tolist() == list(range(14, 73)) and history.first.tolist() == [
        0,
        4,
        8,
        *range(12, 13),
        *range(14, 71, 4),
    ]
    evicted = dict(zip(history.first.tolist(), history.evicted.tolist(), strict=True))
    assert {first: at for first, at in evicted.items() if at == at} == {
        14: 66, 18: 54, 22: 50, 26: 62, 34: 58, 38: 46, 50: 70
    }  # fmt: skip
    assert history.scores.sum(dtype=float) == pytest.approx(101.19954, abs=1e-4)


def test_format_2_is_loaded_and_saved_again(recording, path, tmp_path, monkeypatch):
    """It does not say which tokens a page had at the first step. In a prompt, that follows from the first tokens."""
    about, arrays = recording_file.read(path)
    del about["format"]
    monkeypatch.setattr(recording_file, "FORMAT", 2)
    recording_file.write(path, about, {name: array for name, array in arrays.items() if "begin" not in name})
    monkeypatch.undo()
    loaded = Recording.load(path)
    assert content(loaded) == content(recording)
    loaded.save(tmp_path / "again")
    assert content(Recording.load(tmp_path / "again")) == content(recording)


def forge(path, change):
    """Save to `path`, with a right checksum, what `change` makes of a good file's `about` and arrays."""
    about, arrays = recording_file.read(path)
    del about["format"]
    arrays = {name: array.copy() for name, array in arrays.items()}
    change(about, arrays)
    recording_file.write(path, about, arrays)


def put(name, place, value):
    def change(about, arrays):
        arrays[name][place] = value

    return change


def say(name, value):
    return lambda about, arrays: about.update({name: value})


def make(name, function):
    return lambda about, arrays: arrays.update({name: function(arrays[name])})


def other_batch(about, arrays):
    for name in ("first", "score", "stamp", "begin"):
        arrays[f"1/{name}"] = arrays[f"1/{name}"][:1]
    arrays["1/resident"] = arrays["1/resident"][:, :1]


FORGED = [
    (say("method", 3), "method=3 is not a string"),
    (say("page_size", 0), "page_size=0 is not a power of two"),
    (say("page_size", 6), "page_size=6 is not a power of two"),
    (say("page_size", True), "page_size=True is not a power of two"),
    (say("page_size", 4.0), "page_size=4.0 is not a power of two"),
    (say("budget", -1), "budget=-1 is not a number of tokens"),
    (say("budget", []), r"budget=\[\] is not a number of tokens"),
    (say("budget", [48, "64"]), "budget=.* is not a number of tokens"),
    (say("budget", {}), "budget=.* is not a number of tokens"),
    (say("prompt", "keep"), "prompt='keep' is unknown"),
    (say("prompt", []), r"prompt=\[\] is unknown"),
    (say("heads", [1]), r"heads=\[1\] has no layers"),
    (say("heads", {"one": [0]}), "layer 'one' is not an index"),
    (say("heads", {"01": [0]}), "layer '01' is not an index"),
    (say("heads", {"-1": [0]}), "layer '-1' is not an index"),
    (say("heads", {"0": []}), r"heads=\[\] of layer 0 are not indices"),
    (say("heads", {"0": [-1]}), r"heads=\[-1\] of layer 0 are not indices"),
    (say("heads", {"0": [0, 1]}), "its arrays do not match its layers: .*1/step.* differ"),
    (say("heads", {"0": [0], "1": [0]}), r"layer 0: resident has shape \(59, 2, 2\) instead of \(59, 2, 1\)"),
    (say("colour", "red"), "its member 'about' has .*colour"),
    (lambda about, _: about.pop("method"), "its member 'about' has .* instead of .*method"),
    (lambda _, arrays: arrays.pop("0/score"), r"\['0/score'\] differ"),
    (lambda _, arrays: arrays.update(more=np.arange(3)), r"\['more'\] differ"),
    (make("0/score", np.float64), "layer 0: score is float64"),
    (make("0/first", np.int64), "layer 0: first is int64"),
    (make("0/step", np.float32), "layer 0: step is float32"),
    (make("1/stamp", lambda array: array.astype(str)), "layer 1: stamp is <U"),
    (make("0/resident", lambda array: array[1:]), r"layer 0: resident has shape \(58, 2, 2\)"),
    (make("0/pages", lambda array: array[:, None]), r"layer 0: step has shape \(59, 2\) instead of \(0, 2\)"),
    (make("0/first", lambda array: array[0]), r"layer 0: first has shape \(2, "),
    (make("0/first", lambda array: array[:0]), r"layer 0: first has shape \(0, 2"),
    (make("0/score", lambda array: array[..., 1:]), "layer 0: score has shape"),
    (other_batch, r"its layers have batches of \[1, 2\] rows"),
    (put("0/pages", 3, 1), "layer 0: it has 708 pages, not 697"),
    (put("0/pages", slice(0, 2), [24, 0]), "layer 0: it has 708 pages"),
    (put("0/pages", slice(0, 2), [2**62, 2**62]), "layer 0: it has 708 pages"),
    (put("0/step", (5, 0), 3), "layer 0: the steps do not increase"),
    (put("0/step", (0, 0), -1), "layer 0: the steps do not increase"),
    (put("0/step", (-1, 0), 2**31), "layer 0: step 2147483648 is out of range"),
    (put("0/step", (5, 1), 60), "layer 0: the page of a token starts outside the sequence"),
    (put("0/step", (5, 1), -2), "layer 0: the page of a token starts outside the sequence"),
    (put("0/first", (0, 0, 0), 15), "layer 0: a page starts outside the sequence"),
    (put("0/first", (0, 0, 0), -2), "layer 0: a page starts outside the sequence"),
    (put("0/first", (0, 0, 0), 4), "layer 0: a page is held twice at one step"),
    (put("0/begin", (1, 3), 4), "layer 0: begin names a page outside the text"),
    (make("1/begin", lambda array: array[:, 1:]), r"layer 1: begin has dtype int32 and shape \(2, 14\)"),
    (make("1/begin", np.int64), "layer 1: begin has dtype int64"),
    (put("0/resident", (0, 0, 0), 999), "layer 0: resident does not match the pages"),
    (put("0/resident", (0, 0, 0), 0), "layer 0: resident does not match the pages"),
    (put("1/first", (0, 0, slice(None)), -1), "layer 1: resident does not match the pages"),
    (put("0/score", (0, 0, 0), -0.5), "layer 0: a score is negative or infinite"),
    (put("0/score", (0, 0, 0), np.inf), "layer 0: a score is negative or infinite"),
]


@pytest.mark.parametrize(("change", "wrong"), FORGED, ids=[wrong for _, wrong in FORGED])
def test_inconsistent_content_is_refused_though_its_checksum_is_right(path, change, wrong):
    forge(path, lambda about, arrays: None)
    Recording.load(path)
    forge(path, change)
    with pytest.raises(ValueError, match=wrong):
        Recording.load(path)


def test_exchanged_members_are_refused(path):
    """Each is whole, and together they are consistent: only the checksum of all of them tells."""
    with np.load(path) as file:
        arrays = dict(file)
    arrays["0/score"], arrays["1/score"] = arrays["1/score"], arrays["0/score"]
    with path.open("wb") as file:
        np.savez(file, **arrays)
    with pytest.raises(ValueError, match="does not match its checksum"):
        Recording.load(path)
