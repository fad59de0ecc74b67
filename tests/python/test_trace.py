"""kvreplay.trace: what is written comes back to the bit, and every rule of the format is enforced.

The list BROKEN is also fed to the C++ reader, so that the two readers cannot drift apart.
"""

import shutil
import subprocess
from dataclasses import replace

import h5py
import numpy as np
import pytest
from kvreplay import dtypes, trace
from kvreplay.trace import Header, LayerData, Model, Trace, TraceError, Writer, slice_trace, write

SAMPLES = ["smollm2-135m-wikitext2.h5", "smollm2-135m-retrieval.h5"]
T, ROWS, HQ, HKV, D, DV, HIDDEN = 12, 5, 4, 2, 8, 6, 10
INV_FREQ = np.array([1, 0.1, 0.01, 0.001], np.float32)


def make_header(dtype="bfloat16", **changes) -> Header:
    model = Model(
        6, HQ, HKV, D, DV, HIDDEN, 0.25, softcap=30.0, rope_type="default", rope_style="interleaved", inv_freq=INV_FREQ
    )
    return replace(
        Header(
            T,
            8,
            dtype,
            model,
            position=np.arange(T) * 3,
            token_id=np.arange(T) + 100,
            segment=np.arange(T) % 6,
            logprob=-np.arange(T, dtype=np.float32),
            text=[f"token {i} é" for i in range(T)],
            model_id="m",
            dataset="d",
            license="l",
            framework="f",
        ),
        **changes,
    )


def make_layer(index=1, seed=0, **changes) -> LayerData:
    rng = np.random.default_rng(seed)
    values = {
        name: rng.standard_normal(shape).astype(np.float32)
        for name, shape in {
            "q": (HQ, ROWS, D),
            "k": (HKV, T, D),
            "v": (HKV, T, DV),
            "o": (HQ, ROWS, DV),
            "wo": (HIDDEN, HQ * DV),
            "sink_logit": (HQ,),
            "e": (HQ, ROWS, DV),
            "g": (3, HQ, ROWS, DV),
            "attention": (HQ, ROWS, T),
        }.items()
    }
    return LayerData(index, **(values | {"q_index": np.array([0, 3, 7, 8, 11]), "window": 4} | changes))


@pytest.fixture
def path(tmp_path):
    """A small valid trace with two layers."""
    write(tmp_path / "x.h5", make_header(), [make_layer(1), make_layer(4, seed=1)])
    return tmp_path / "x.h5"


@pytest.mark.parametrize("dtype", dtypes.NAMES)
def test_round_trip(tmp_path, dtype):
    header, layer = make_header(dtype), make_layer(rope="post", rope_recipe="fp32")
    write(tmp_path / "x.h5", header, [layer])
    with Trace(tmp_path / "x.h5") as read:
        got = read.layer(1)
        assert (read.tokens, read.prompt_tokens, read.layers, read.dtype) == (T, 8, (1,), dtype)
        assert (got.window, got.rope, got.rope_recipe) == (4, "post", "fp32")
        np.testing.assert_array_equal(got.q_index, layer.q_index)
        for name in trace.TENSORS:
            stored = got.dtype(name)
            expected = dtypes.widen(dtypes.to_words(getattr(layer, name), stored), stored)
            np.testing.assert_array_equal(getattr(got, name), expected, err_msg=name)
            assert getattr(got, name).dtype == np.float32
        assert {name: got.dtype(name) for name in ("q", "k", "v", "o", "wo")} == dict.fromkeys(
            "q k v o wo".split(), dtype
        )
        for name in ("position", "token_id", "segment", "logprob"):
            np.testing.assert_array_equal(getattr(read.header, name), getattr(header, name))
        assert read.header.text == header.text and read.header.segment_names == header.segment_names
        np.testing.assert_array_equal(read.model.inv_freq, INV_FREQ)
        assert replace(read.model, inv_freq=None) == replace(header.model, inv_freq=None) and read.model.group == 2


def test_absent_parts_are_none(tmp_path):
    values = make_layer()
    layer = LayerData(0, np.ones((HQ, T, D)), values.k, values.v)
    header = Header(T, 0, "float32", Model(1, HQ, HKV, D, DV, 0, 1.0))
    write(tmp_path / "x.h5", header, [layer])
    with Trace(tmp_path / "x.h5") as read:
        got = read.layer(0)
        assert got.o is got.wo is got.e is got.g is got.attention is got.sink_logit is None
        assert read.header.token_id is read.header.text is read.model.inv_freq is None
        np.testing.assert_array_equal(got.q_index, np.arange(T))
        np.testing.assert_array_equal(read.header.position, np.arange(T))


def test_bfloat16_rounds_to_nearest_even():
    values = np.array([1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.4e38, 1e-45], np.float32)
    words = dtypes.to_words(values, "bfloat16")
    assert [hex(w) for w in words] == ["0x3f80", "0x3f80", "0x3f82", "0x3f81", "0xff80", "0x0"]
    assert dtypes.first_not_finite(words, "bfloat16") == (4,)


def test_words_are_stored_as_they_are(tmp_path):
    words = {name: dtypes.to_words(getattr(make_layer(), name), "bfloat16") for name in ("q", "k", "v", "e")}
    write(tmp_path / "x.h5", make_header(), [make_layer(**words, types={"g": "float16", "e": "bfloat16"})])
    with Trace(tmp_path / "x.h5") as read:
        for name, expected in words.items():
            np.testing.assert_array_equal(read.layer(1).words(name), expected)
        assert (read.layer(1).dtype("g"), read.layer(1).words("k").dtype) == ("float16", np.uint16)


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_traces(data, tmp_path, name):
    with Trace(data / name) as sample:
        assert (sample.tokens, sample.prompt_tokens, sample.layers) == (1024, 768, (0, 9, 19, 29))
        assert sample.layer(9).k.shape == (3, 1024, 64) and sample.layer(9).q.shape == (9, 1024, 64)
        with h5py.File(sample.file, locking=False) as file:
            assert sample.content_sha256 == file.attrs["content_sha256"]
            np.testing.assert_array_equal(sample.layer(9).v[:, :16], file["layers/009/v"][:, :16])  # HDF5's conversion
        slice_trace(sample.file, tmp_path / "copy.h5")
        with Trace(tmp_path / "copy.h5") as copy:
            assert copy.content_sha256 == sample.content_sha256
            assert copy.layer(29).names == sample.layer(29).names
            np.testing.assert_array_equal(copy.layer(29).words("o"), sample.layer(29).words("o"))
            np.testing.assert_array_equal(copy.header.logprob, sample.header.logprob)


def test_other_programs_read_the_numbers(path):
    with h5py.File(path) as file, Trace(path) as read:
        np.testing.assert_array_equal(file["layers/001/k"][()], read.layer(1).k)
        k = file["layers/001/k"]
        assert k.chunks == (1, T, D) and k.compression == "gzip" and k.shuffle and k.fletcher32
        assert file.attrs["complete"] == 1
    if shutil.which("h5dump"):  # an HDF5 of the system, mostly older than h5py's own
        done = subprocess.run(["h5dump", "-d", "/layers/001/k", str(path)], capture_output=True, check=False)
        assert done.returncode == 0, done.stderr


def test_slice(data, tmp_path, path):
    source, target = data / SAMPLES[0], tmp_path / "cut.h5"
    assert trace.main(["slice", str(source), str(target), "--layers", "9,0", "--tokens", "512"]) == 0
    with Trace(source) as whole, Trace(target) as cut:
        assert (cut.tokens, cut.prompt_tokens, cut.layers) == (512, 512, (0, 9))
        for name in ("q", "k", "v", "o"):
            np.testing.assert_array_equal(cut.layer(9).words(name), whole.layer(9).words(name)[:, :512])
        np.testing.assert_array_equal(cut.header.token_id, whole.header.token_id[:512])
    slice_trace(path, target, tokens=8)  # rows by q_index, the attention's two axes
    with Trace(path) as whole, Trace(target) as cut:
        np.testing.assert_array_equal(cut.layer(4).q_index, [0, 3, 7])
        np.testing.assert_array_equal(cut.layer(4).attention, whole.layer(4).attention[:, :3, :8])
        np.testing.assert_array_equal(cut.layer(4).g, whole.layer(4).g[:, :, :3])


@pytest.mark.parametrize(
    "arguments, message", [(["--layers", "0,5"], "recorded are 0, 9, 19, 29"), (["--tokens", "2000"], "2000 of 1024")]
)
def test_impossible_slice(data, tmp_path, capsys, arguments, message):
    target = tmp_path / "cut.h5"
    assert trace.main(["slice", str(data / SAMPLES[0]), str(target), *arguments]) == 3
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def put(name, values, dtype=None):
    """Replaces a dataset."""

    def change(file):
        del file[name]
        file.create_dataset(name, data=values, dtype=dtype)

    return change


def attribute(where, name, value):
    """Sets an attribute; None deletes it."""

    def change(file):
        if value is None:
            del file[where].attrs[name]
        else:
            file[where].attrs[name] = value

    return change


def not_finite(name, at):
    """Sets one stored word to infinity without touching the rest."""

    def change(file):
        dataset, stored = file[name], dtypes.dtype_of(file[name])
        words = dtypes.read_words(dataset, stored)
        words[at] = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}[stored]
        dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, words, mtype=dataset.id.get_type())

    return change


def not_written(file):
    """A dataset of the right shape and type without any chunk."""
    old = file["layers/001/v"]
    layout = old.id.get_create_plist()
    del file["layers/001/v"]
    h5py.h5d.create(
        file["layers/001"].id, b"v", dtypes.hdf5_type("bfloat16"), h5py.h5s.create_simple((HKV, T, DV)), dcpl=layout
    )


BROKEN = {
    "another major version": (attribute("/", "kvtrace_version", "2.0.0"), "kvtrace_version"),
    "no version": (attribute("/", "kvtrace_version", None), "kvtrace_version"),
    "not complete": (attribute("/", "complete", np.uint8(0)), "complete"),
    "no tokens": (attribute("/", "tokens", np.int64(0)), "tokens"),
    "absurd tokens": (attribute("/", "tokens", np.int64(1 << 40)), "tokens"),
    "more prompt than tokens": (attribute("/", "prompt_tokens", np.int64(13)), "prompt_tokens"),
    "negative prompt": (attribute("/", "prompt_tokens", np.int64(-1)), "prompt_tokens"),
    "tokens are text": (attribute("/", "tokens", "12"), "tokens"),
    "no heads": (attribute("/model", "kv_heads", np.int64(0)), "kv_heads"),
    "no attribute": (attribute("/model", "head_dim", None), "head_dim"),
    "heads do not divide": (attribute("/model", "query_heads", np.int64(5)), "multiple of kv_heads"),
    "absurd head_dim": (attribute("/model", "head_dim", np.int64(1 << 30)), "head_dim"),
    "scale is NaN": (attribute("/model", "scale", np.nan), "scale"),
    "scale is zero": (attribute("/model", "scale", 0.0), "scale"),
    "softcap is negative": (attribute("/model", "softcap", -1.0), "softcap"),
    "attention_scaling is infinite": (attribute("/model", "attention_scaling", np.inf), "attention_scaling"),
    "unknown rope_style": (attribute("/model", "rope_style", "spiral"), "rope_style"),
    "no rope_type": (attribute("/model", "rope_type", None), "rope_type"),
    "no inv_freq": (lambda file: file.pop("model/inv_freq"), "inv_freq"),
    "inv_freq too long": (put("model/inv_freq", np.ones(D, np.float32)), "inv_freq"),
    "inv_freq not finite": (put("model/inv_freq", np.full(4, np.nan, np.float32)), "inv_freq"),
    "position too short": (put("tokens/position", np.arange(T - 1, dtype=np.int32)), "tokens/position"),
    "position not increasing": (put("tokens/position", np.r_[0, 1, 1, 3:T].astype(np.int32)), r"position.*\[2\]"),
    "position negative": (put("tokens/position", np.arange(-1, T - 1, dtype=np.int32)), r"position.*\[0\]"),
    "position of floats": (put("tokens/position", np.arange(T, dtype=np.float32)), "tokens/position"),
    "id too long": (put("tokens/id", np.arange(T + 1, dtype=np.int32)), "tokens/id"),
    "logprob not finite": (put("tokens/logprob", np.r_[0, np.inf, 2:T].astype(np.float32)), r"logprob.*\[1\]"),
    "no layers": (lambda file: [file["layers"].pop(name) for name in list(file["layers"])], "layers"),
    "layer past the model": (attribute("/layers/001", "layer", np.int64(6)), "layer"),
    "the same layer twice": (attribute("/layers/001", "layer", np.int64(4)), "layer"),
    "negative window": (attribute("/layers/001", "window", np.int64(-1)), "window"),
    "unknown rope": (attribute("/layers/001", "rope", "mid"), "rope"),
    "unknown recipe": (attribute("/layers/001", "rope_recipe", "fp8"), "rope_recipe"),
    "no keys": (lambda file: file.pop("layers/001/k"), "layers/001"),
    "no q_index for few rows": (lambda file: file.pop("layers/001/q_index"), "layers/001/q"),
    "q_index not ascending": (put("layers/001/q_index", np.array([0, 7, 3, 8, 11], np.int32)), r"q_index.*\[2\]"),
    "q_index past the end": (put("layers/001/q_index", np.array([0, 3, 7, 8, 12], np.int32)), r"q_index.*\[4\]"),
    "q_index too long": (put("layers/001/q_index", np.arange(6, dtype=np.int32)), "layers/001/q"),
    "keys of another type": (put("layers/001/k", np.ones((HKV, T, D), np.float32)), "layers/001/k"),
    "keys of doubles": (put("layers/001/k", np.ones((HKV, T, D))), "layers/001/k"),
    "output of another type": (put("layers/001/o", np.ones((HQ, ROWS, DV), np.float16)), "layers/001/o"),
    "attention of another type": (put("layers/001/attention", np.ones((HQ, ROWS, T), np.float32)), "001/attention"),
    "gradient of another type": (put("layers/001/e", np.ones((HQ, ROWS, DV), np.float16)), "layers/001/e"),
    "sink_logit too short": (put("layers/001/sink_logit", np.ones(HQ - 1, np.float32)), "layers/001/sink_logit"),
    "wo transposed": (attribute("/model", "hidden_size", np.int64(HIDDEN + 1)), "layers/001/wo"),
    "key not finite": (not_finite("layers/004/k", (1, 7, 3)), r"/layers/004/k.*\[1, 7, 3\]"),
    "query not finite": (not_finite("layers/001/q", (3, 4, 7)), r"/layers/001/q.*\[3, 4, 7\]"),
    "gradient not finite": (not_finite("layers/001/g", (2, 0, 1, 5)), r"/layers/001/g.*\[2, 0, 1, 5\]"),
    "sink_logit not finite": (not_finite("layers/001/sink_logit", 2), r"/layers/001/sink_logit.*\[2\]"),
    "values not written": (not_written, "layers/001/v"),
    "content changed": (attribute("/", "content_sha256", "0" * 64), "content_sha256"),
}  # fmt: skip


@pytest.fixture(params=BROKEN)
def broken(request, path):
    """A trace that breaks one rule, and what the message must match."""
    change, message = BROKEN[request.param]
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file)
    return path, message


def test_each_rule(broken):
    with pytest.raises(TraceError, match=f"x.h5: .*{broken[1]}"):
        Trace(broken[0])


def test_cpp_reader_agrees(broken, kvreplay_binary):
    done = subprocess.run([kvreplay_binary, "inspect", broken[0]], capture_output=True, text=True, check=False)
    assert done.returncode == 3, done.stdout + done.stderr


def test_cpp_reader_takes_what_we_write(path, kvreplay_binary):
    done = subprocess.run([kvreplay_binary, "inspect", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_error_says_where(path):
    with h5py.File(path, "r+") as file:
        not_finite("layers/004/k", (1, 7, 3))(file)
    with pytest.raises(TraceError) as caught:
        Trace(path)
    assert (caught.value.file, caught.value.dataset, caught.value.index) == (str(path), "/layers/004/k", (1, 7, 3))
    Trace(path, values=False).close()  # the shapes are fine


def test_damaged_files(path, tmp_path):
    whole = path.read_bytes()
    (tmp_path / "text.h5").write_text("not a trace")
    (tmp_path / "short.h5").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    with h5py.File(path) as file:
        flipped[file["layers/001/k"].id.get_chunk_info(0).byte_offset + 3] ^= 0xFF
    (tmp_path / "flipped.h5").write_bytes(flipped)
    for name in ("missing.h5", "text.h5", "short.h5", "flipped.h5"):
        with pytest.raises(TraceError, match=name):
            Trace(tmp_path / name)


@pytest.mark.parametrize("changes, message", [
    ({"k": np.ones((HKV, T + 1, D))}, r"/layers/001/k: has shape \[2, 13, 8\], the header asks for \[2, 12, 8\]"),
    ({"v": np.full((HKV, T, DV), np.nan)}, r"/layers/001/v: .* \[0, 0, 0\]"),
    ({"q": np.full((HQ, ROWS, D), 3.4e38)}, "not finite in bfloat16"),
    ({"q_index": np.array([0, 3, 3, 8, 11])}, r"q_index.*\[2\]"),
    ({"q_index": None}, "no q_index says which"),
    ({"rope": "sideways"}, "rope"),
    ({"k": np.ones((HKV, T, D), int)}, "int64 values cannot be stored as bfloat16"),
    ({"attention": np.ones((HQ, ROWS, T), np.uint32)}, "uint32 values cannot be stored as float16"),
    ({"types": {"e": "float16"}}, "/layers/001/e"),
])  # fmt: skip
def test_writer_refuses(tmp_path, changes, message):
    with pytest.raises(TraceError, match=message):
        write(tmp_path / "x.h5", make_header(), [make_layer(**changes)])
    assert list(tmp_path.iterdir()) == []  # neither the file nor its .part


def test_writer_refuses_headers_and_order(tmp_path):
    for changes in ({"prompt_tokens": 13}, {"position": np.zeros(T)}, {"dtype": "int8"}, {"segment": np.zeros(3)}):
        with pytest.raises(TraceError):
            Writer(tmp_path / "x.h5", make_header(**changes))
    with pytest.raises(TraceError, match="comes after layer 4"):
        write(tmp_path / "x.h5", make_header(), [make_layer(4), make_layer(1)])
    with pytest.raises(TraceError, match="no layer"):
        write(tmp_path / "x.h5", make_header(), [])
    with pytest.raises(TraceError, match="cannot be written"):
        Writer(tmp_path / "nowhere" / "x.h5", make_header())
    assert list(tmp_path.iterdir()) == []


def test_nothing_looks_complete_before_close(tmp_path):
    with Writer(tmp_path / "x.h5", make_header()) as writer:
        writer.write_layer(make_layer())
        assert [p.name for p in tmp_path.iterdir()] == ["x.h5.part"]
    assert [p.name for p in tmp_path.iterdir()] == ["x.h5"]


def test_hash_is_computed_when_absent(path):
    with Trace(path) as read:
        expected = read.content_sha256
    with h5py.File(path, "r+") as file:
        del file.attrs["content_sha256"]
    for values in (True, False):
        with Trace(path, values=values) as read:
            assert read.content_sha256 == expected
