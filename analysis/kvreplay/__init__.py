"""The Python side of kvreplay: `trace` reads and writes recordings, `results` reads a run's output folder, `figures`
draws it; `spectra` and `similarity` look at a recording itself. Python and C++ meet in files only."""

__version__ = "0.1.0"
