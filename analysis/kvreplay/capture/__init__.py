"""Records the attention of a Hugging Face model into a trace (`kvtrace/1`).

from kvreplay import capture
with capture.recorder(model, "trace.h5", layers=[0, 9], dataset="wikitext-2") as rec:
    model(input_ids)                      # or model.generate(...): prompt and every decode step

python -m kvreplay.capture --model MODEL --text FILE --tokens 1024 --prompt 768 --layers 0,9 --output trace.h5

Needs torch and transformers (`pip install "kvreplay[capture]"`), imported on first use only.
"""

from __future__ import annotations

from kvreplay.capture.errors import CaptureError

__all__ = ["CaptureError", "Recorder", "load_model", "recorder"]


def __getattr__(name: str):
    """`recorder`, `Recorder` and `load_model`, importing torch only now."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from kvreplay.capture.models import load_model
        from kvreplay.capture.recording import Recorder
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise ModuleNotFoundError(
            f'recording needs {error.name}: pip install "kvreplay[capture]"', name=error.name
        ) from error
    return {"Recorder": Recorder, "recorder": Recorder, "load_model": load_model}[name]
