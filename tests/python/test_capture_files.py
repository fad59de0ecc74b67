"""What a recording leaves on disk and holds in memory, and what importing the package needs."""

import subprocess
import sys

import numpy as np
import pytest
from capture_packages import MISSING, require

require(MISSING)

import torch  # noqa: E402
from capture_zoo import ZOO, build, sequence  # noqa: E402
from kvreplay import capture  # noqa: E402
from kvreplay.capture.spool import SLAB_ROWS, Spool  # noqa: E402


@pytest.fixture
def llama():
    return build(ZOO["llama"], "sdpa")


def record(model, path):
    """A trace of one call."""
    with capture.recorder(model, path), torch.no_grad():
        model(sequence())


def test_32k_tokens_of_an_8b_layer_stay_out_of_memory(tmp_path, repo):
    """640 MiB of recording: the process peaks below 2 GiB and grows by less than what it records. A window keeps the
    attention itself cheap."""
    program = f"""
import sys
sys.path[:0] = [{str(repo / "analysis")!r}, {str(repo / "tests" / "python")!r}]
from capture_zoo import CACHE
import torch
from transformers import DynamicCache, MistralConfig, MistralForCausalLM
from kvreplay import capture
torch.set_num_threads(2)
config = MistralConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, sliding_window=64,
                       num_attention_heads=32, num_key_value_heads=8, head_dim=128, max_position_embeddings=32768)
model, cache = MistralForCausalLM(config).bfloat16().eval(), DynamicCache(config=config)
def peak():  # KiB, of this program: getrusage's also counts the process that it was forked from
    with open("/proc/self/status") as status:
        return next(line.split()[1] for line in status if line.startswith("VmHWM"))
before = peak()
with capture.recorder(model, {str(tmp_path / "t.h5")!r}, compression=0), torch.no_grad():
    for _ in range(64):
        model(torch.randint(0, 64, (1, 512)), use_cache=True, **{{CACHE: cache}})
print(before, peak())
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, peak = (int(word) for word in done.stdout.split())  # KiB
    size = (tmp_path / "t.h5").stat().st_size
    (tmp_path / "t.h5").unlink()
    assert size >= 32768 * 2 * 128 * (32 + 8 + 8 + 32)
    assert peak < 2 << 20 and (peak - before) * 1024 < 0.75 * size, (before, peak)


def test_a_crash_leaves_nothing(llama, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        with capture.recorder(llama, tmp_path / "t.h5"), torch.no_grad():
            llama(sequence())
            raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with torch.no_grad():
        llama(sequence())  # nothing is recorded, nothing fails


def test_a_killed_process_leaves_no_trace(tmp_path, repo):
    """Killed hard in the middle: there is a spool, but nothing by the trace's name; the next recording clears it."""
    program = f"""
import os, sys
sys.path[:0] = [{str(repo / "analysis")!r}, {str(repo / "tests" / "python")!r}]
import torch
from capture_zoo import ZOO, build, sequence
from kvreplay import capture
model = build(ZOO["llama"])
with capture.recorder(model, {str(tmp_path / "t.h5")!r}), torch.no_grad():
    model(sequence(100))
    os._exit(9)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 9, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5.spool"]
    record(build(ZOO["llama"]), tmp_path / "t.h5")
    assert [path.name for path in tmp_path.iterdir()] == ["t.h5"]


def test_an_old_trace_survives_a_failing_recording(llama, tmp_path):
    record(llama, tmp_path / "t.h5")
    before = (tmp_path / "t.h5").read_bytes()
    with pytest.raises(capture.CaptureError):
        with capture.recorder(llama, tmp_path / "t.h5"):
            pass
    assert (tmp_path / "t.h5").read_bytes() == before


def test_the_spool_returns_what_it_was_given(tmp_path):
    spool, generator = Spool(tmp_path / "spool"), torch.Generator().manual_seed(0)
    slabs = [torch.randn(3, n, 5, generator=generator).bfloat16() for n in (100, 1, 2, *[1] * SLAB_ROWS, 70, 3)]
    for slab in slabs:
        spool.append(4, "k", slab)
    whole = torch.cat(slabs, 1)
    assert spool.shape(4, "k") == tuple(whole.shape)
    for head in range(3):
        assert np.array_equal(spool.head(4, "k", head), whole[head].view(torch.int16).numpy().view(np.uint16))
    spool.drop(4)
    assert list((tmp_path / "spool").iterdir()) == []


def test_importing_kvreplay_does_not_import_torch(repo):
    program = "import sys, kvreplay, kvreplay.trace, kvreplay.capture.cli; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], check=False, env={"PYTHONPATH": str(repo / "analysis")})
    assert done.returncode == 0


def test_without_torch_the_message_says_what_to_install(repo):
    program = "import sys; sys.modules['torch'] = None\nfrom kvreplay import capture\ncapture.recorder"
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True,
        env={"PYTHONPATH": str(repo / "analysis")},
    )  # fmt: skip
    assert done.returncode == 1 and 'pip install "kvreplay[capture]"' in done.stderr
