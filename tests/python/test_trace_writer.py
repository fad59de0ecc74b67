"""Writing a trace piece by piece makes the same file content as writing whole arrays."""

import numpy as np
import pytest
from kvreplay.trace import Trace, TraceError, Writer
from kvreplay.trace_writer import Matrices
from test_trace import make_header, make_layer

STREAMED = ("q", "k", "v", "o", "e", "g", "wo")


def pieces(values: np.ndarray) -> Matrices:
    """The array, one matrix at a time."""
    return Matrices(values.shape, lambda index: values[index])


def written(path, layer, dtype):
    with Writer(path, make_header(dtype)) as writer:
        writer.write_layer(layer)
    return Trace(path)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_pieces_equal_arrays(tmp_path, dtype):
    whole = written(tmp_path / "a.h5", make_layer(), dtype)
    split = written(
        tmp_path / "b.h5", make_layer(**{name: pieces(getattr(make_layer(), name)) for name in STREAMED}), dtype
    )
    assert whole.content_sha256 == split.content_sha256
    for name in whole.layer(1).names:
        assert np.array_equal(whole.layer(1).words(name), split.layer(1).words(name)), name
        assert whole.layer(1).dtype(name) == split.layer(1).dtype(name)


def test_a_bad_value_in_a_piece_is_named_and_leaves_no_file(tmp_path):
    values = make_layer().g.copy()
    values[2, 1, 3, 0] = np.nan
    with pytest.raises(TraceError, match=r"/layers/001/g: value is not finite in bfloat16 at \[2, 1, 3, 0\]"):
        written(tmp_path / "t.h5", make_layer(g=pieces(values)), "bfloat16")
    assert list(tmp_path.iterdir()) == []


def test_a_piece_of_the_wrong_shape(tmp_path):
    short = Matrices(make_layer().k.shape, lambda index: make_layer().k[index][:-1])
    with pytest.raises(TraceError, match=r"/layers/001/k.*has shape"):
        written(tmp_path / "t.h5", make_layer(k=short), "bfloat16")
