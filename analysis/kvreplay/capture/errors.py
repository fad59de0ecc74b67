"""What a recording may refuse."""


class CaptureError(ValueError):
    """The model, the call or the request is nothing a trace can hold; the message names the layer and the way out."""
