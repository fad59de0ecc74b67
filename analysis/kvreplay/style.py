"""How figures look: one colour, marker and dash per policy, the same in every figure; sizes and fonts of a venue.

Colours are Okabe-Ito and Paul Tol's muted set, told apart by readers with any colour vision; markers and dashes carry
the same information in black and white.
"""

from __future__ import annotations

import hashlib
import inspect
from dataclasses import dataclass

from matplotlib.colors import to_rgb
from tueplots import bundles

# Okabe-Ito, its yellow left out, then Tol's muted set with a darker sand.
_BLUE, _ORANGE, _GREEN, _RED, _PINK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"
_SKY, _BLACK = "#56B4E9", "#000000"
_INDIGO, _OLIVE, _WINE, _TEAL, _SAND, _GREY = "#332288", "#999933", "#882255", "#44AA99", "#B39B3F", "#777777"

SOLID, DASH, DOT, DASHDOT, LONG = "-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (8, 2))


@dataclass(frozen=True)
class Style:
    """A policy's look: colour as hex, marker and dash as matplotlib takes them."""

    color: str
    marker: str
    dash: str | tuple = SOLID


POLICIES = {
    "full": Style(_BLACK, "*", DOT),
    "random": Style(_GREY, "x", DOT),
    "streaming_llm": Style(_ORANGE, "s"),
    "h2o": Style(_BLUE, "o"),
    "tova": Style(_SKY, "^"),
    "snapkv": Style(_RED, "D"),
    "knorm": Style(_OLIVE, "v", DASH),
    "keydiff": Style(_PINK, "P", DASH),
    "weighted_kv": Style(_GREEN, "h", LONG),
    "lagkv": Style(_OLIVE, "<", DASHDOT),
    "expected_attention": Style(_INDIGO, "p", DASH),
    "r_kv": Style(_WINE, ">", DASH),
    "critical_kv": Style(_RED, "X", DASH),
    "pyramid": Style(_SKY, "d", DASH),
    "adaptive": Style(_BLUE, "d", DASHDOT),
    "scissorhands": Style(_BLUE, "v", DASH),
    "quest": Style(_SKY, "s", DASHDOT),
    "duo_attention": Style(_ORANGE, "^", DASH),
    "kvzip": Style(_WINE, "s", DASHDOT),
    "kv_slimmer": Style(_INDIGO, "D", LONG),
    "kv_slimmer_released": Style(_INDIGO, "s", DASHDOT),
    "asym_kv": Style(_WINE, "o", LONG),
    "mean_merge": Style(_GREY, "d", LONG),
    "kv_merger": Style(_TEAL, "^", LONG),
    "cam": Style(_PINK, "o", DASH),
    "d2o": Style(_RED, "P", DASHDOT),
    "keepkv": Style(_WINE, "v", DASH),
    "look_m": Style(_SAND, "<", LONG),
    "zsmerge": Style(_SAND, ">", DASH),
    "oracle_mass": Style(_BLACK, "^", DASH),
    "oracle_greedy": Style(_BLACK, "v", DASHDOT),
    "least_squares_merge": Style(_BLACK, "h", LONG),
}

# For policies that are not in the catalogue: colours that no catalogue policy has.
_OTHERS = [
    Style(color, marker, dash)
    for color in ("#EE3377", "#8C510A", "#AA4499", "#117733", "#6699CC", "#661100")
    for marker, dash in zip("osD^vPXdp<>h", (SOLID, DASH, LONG, DASHDOT) * 3, strict=True)
]
_COLORS = (_BLUE, _RED, _GREEN, _ORANGE, _PINK, _SKY, _INDIGO, _OLIVE, _WINE, _TEAL, _BLACK, _GREY)
_MARKERS = "osD^vPXdp<>"  # one less than colours, so that no pair comes twice soon
_VARIANT_DASHES = (SOLID, DASH, DOT, DASHDOT, LONG)

NOTE_SIZE = 5.5  # points, of the footer


def policy_style(name: str, variant: int = 0) -> Style:
    """The look of policy `name`; unknown names get one by hash, the same everywhere. `variant` counts parameterisations
    of one policy: each has the policy's colour, lighter, the same marker and another dash."""
    style = POLICIES.get(name)
    if style is None:
        style = _OTHERS[int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % len(_OTHERS)]
    if not variant:
        return style
    lighter = 1 - 0.7 ** min(variant, 4)
    mixed = tuple(round(255 * (c + (1 - c) * lighter * 0.8)) for c in to_rgb(style.color))
    dashes = [d for d in _VARIANT_DASHES if d != style.dash]
    return Style("#{:02x}{:02x}{:02x}".format(*mixed), style.marker, dashes[(variant - 1) % len(dashes)])


def variant_style(variant: int) -> Style:
    """The look of variant `variant` in a figure that shows one policy alone, whose colour then says nothing."""
    dash = (SOLID, DASH, LONG, DASHDOT)[variant % 4]
    return Style(_COLORS[variant % len(_COLORS)], _MARKERS[variant % len(_MARKERS)], dash)


def policy_order(name: str) -> tuple[int, str]:
    """Catalogue order, unknown policies after it by name."""
    known = list(POLICIES)
    return (known.index(name), "") if name in POLICIES else (len(known), name)


def venues() -> list[str]:
    """The conferences and journals whose sizes are known (tueplots bundles with a page or column width)."""
    return [
        name
        for name, f in inspect.getmembers(bundles, inspect.isfunction)
        if not name.startswith("_") and "nrows" in inspect.signature(f).parameters
    ]


def venue_params(venue: str) -> dict:
    """Matplotlib settings of `venue` at full text width, with fonts that come with matplotlib and embed as TrueType."""
    bundle = getattr(bundles, venue)
    known = inspect.signature(bundle).parameters
    params = bundle(**{k: v for k, v in (("column", "full"), ("usetex", False)) if k in known})
    serif = params.get("font.family", "serif") == "serif"
    params["axes.labelsize"] = params["font.size"] - 1
    params.update(
        {
            "font.serif": ["STIXGeneral"],
            "font.sans-serif": ["DejaVu Sans"],  # a machine without Times draws the same
            "text.usetex": False,
            "mathtext.fontset": "stix" if serif else "dejavusans",
            "pdf.fonttype": 42,
            "ps.fonttype": 42,
            "text.latex.preamble": "",
            "figure.constrained_layout.use": False,
            "figure.autolayout": False,
            "axes.linewidth": 0.6,
            "lines.linewidth": 1.1,
            "lines.markersize": 4,
            "axes.axisbelow": True,
            "axes.grid": True,
            "grid.linewidth": 0.4,
            "grid.color": "#dddddd",
            "legend.frameon": False,
            "savefig.dpi": 300,
        }
    )
    return params
