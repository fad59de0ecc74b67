"""python -m kvreplay.capture on a tiny model in a folder."""

import numpy as np
import pytest
from capture_packages import MISSING, require

require(MISSING)

import torch  # noqa: E402
from capture_zoo import ZOO, build  # noqa: E402
from kvreplay.capture.cli import main  # noqa: E402
from kvreplay.capture.models import Source, find  # noqa: E402
from kvreplay.trace import Trace  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import PreTrainedTokenizerFast  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, its tokenizer (word w3 is token 3) and a text of 200 words."""
    folder = tmp_path_factory.mktemp("cli") / "tiny-llama"
    model = build(ZOO["llama"], "sdpa")
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words = {f"w{i}": i for i in range(64)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(folder)
    ids = np.random.default_rng(0).integers(3, 64, 200)
    (folder.parent / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    np.save(folder.parent / "ids.npy", ids)
    return folder


def record(folder, *options):
    """Exit code of the program with a model, a text and an output."""
    here = folder.parent
    return main(["--model", str(folder), "--text", str(here / "text.txt"), "--output", str(here / "t.h5"), *options])


def test_a_text_with_a_prompt(folder, capsys):
    ids = np.load(folder.parent / "ids.npy")
    options = "--tokens 60 --prompt 40 --layers 0,2 --dtype bfloat16 --with wo,gradient,logprob,text --license CC0"
    assert record(folder, *options.split()) == 0
    trace = Trace(folder.parent / "t.h5")
    header = trace.header
    assert (trace.tokens, trace.prompt_tokens, trace.layers, trace.dtype) == (60, 40, (0, 2), "bfloat16")
    assert np.array_equal(header.token_id, ids[:60]) and header.text[:2] == [f"w{i}" for i in ids[:2]]
    assert (header.model_id, header.dataset, header.license) == ("tiny-llama", "text.txt", "CC0")
    assert "sdpa" in header.framework and header.logprob is not None
    assert trace.layer(2).names == ("q", "k", "v", "o", "wo", "e")
    assert "t.h5: 2 layers" in capsys.readouterr().out


def test_skip_and_repeat(folder):
    ids = np.load(folder.parent / "ids.npy")
    assert record(folder, *"--skip-tokens 150 --tokens 80 --prompt 45 --repeat 40 --no-tokens".split()) == 0
    hidden = Trace(folder.parent / "t.h5")
    assert hidden.header.token_id is None and "repeat those 40 positions earlier" in hidden.header.dataset
    assert record(folder, *"--skip-tokens 150 --tokens 80 --prompt 45 --repeat 40".split()) == 0
    got = Trace(folder.parent / "t.h5").header.token_id
    assert np.array_equal(got[:45], ids[150:195])
    assert np.array_equal(got[45:], got[5:40])
    assert Trace(folder.parent / "t.h5").content_sha256 == hidden.content_sha256


def test_generate_in_prefill_chunks(folder):
    options = "--tokens 50 --generate 12 --prefill-chunk 16 --queries last:4,decode --with logprob"
    assert record(folder, *options.split()) == 0
    trace = Trace(folder.parent / "t.h5")
    assert (trace.tokens, trace.prompt_tokens) == (62, 50)
    assert trace.layer(0).q_index.tolist() == list(range(46, 62))
    assert trace.header.segment.tolist() == [1] * 50 + [4] * 12
    # greedy: every generated token is the likeliest, so none is less likely than one in 64
    assert (trace.header.logprob[50:] >= -np.log(64)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--tokens 300", "the text has 200 tokens, 300 are needed"),
        ("--tokens 20 --prompt 30", "--prompt 30 of --tokens 20"),
        ("--tokens 20 --prompt 10 --repeat 11", "--repeat 11 must lie in 1 to 10"),
        ("--tokens 20 --prompt 10 --generate 5", "--generate goes on after the text"),
        ("--tokens 20 --prefill-chunk -1", "--prefill-chunk -1 must be at least 1"),
        ("--tokens 20 --layers 5", "layers that have: 0-2"),
        ("--tokens 20 --with hessian", "'hessian' is none of"),
        ("--text /nowhere/text.txt", "No such file"),
        ("--model /nowhere/model", "is no folder"),
        ("--model pytest", "holds 0 GGUF files"),
        ("--tokens 20 --output FOLDER/text.txt/t.h5", "cannot be written"),
    ],
)
def test_a_wrong_request_exits_2_with_one_line(folder, capsys, options, words):
    assert record(folder, *options.replace("FOLDER", str(folder.parent)).split()) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvreplay.capture: ")]
    assert len(lines) == 1 and words in lines[0]


def test_model_names(tmp_path):
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").touch()
    source = find(str(tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf"))
    assert source == Source(str(tmp_path), "SmolLM2-135M-Instruct.Q4_1.gguf")
    assert source.model_id(torch.bfloat16) == "SmolLM2-135M-Instruct (Q4_1 GGUF, run in bfloat16)"
    assert find("meta-llama/Llama-3.1-8B").model_id(torch.float32) == "meta-llama/Llama-3.1-8B"
