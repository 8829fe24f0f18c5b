"""Matching versions of torch, torchrec and fbgemm, and the installed versions.

Imports none of these packages, so it also works where they are broken.
"""

from __future__ import annotations

from importlib import metadata

# torchrec -> torch, by major and minor version. fbgemm has torchrec's version number.
SUPPORTED = {"1.6": "2.11", "1.7": "2.12", "1.8": "2.13", "1.9": "2.14"}
NEWEST = list(SUPPORTED)[-1]
TORCHMETRICS = "1.0.3"
TORCHX = "0.7.0"

FBGEMM = ("fbgemm-gpu", "fbgemm-gpu-cpu")
FBGEMM_NIGHTLY = ("fbgemm-gpu-nightly", "fbgemm-gpu-nightly-cpu")
NIGHTLY = (*FBGEMM_NIGHTLY, "torchrec-nightly", "torchrec-nightly-cpu")
DISTRIBUTIONS = ("torch", "torchrec", *FBGEMM, *NIGHTLY, "torchmetrics", "torchx")


def installed_versions() -> dict[str, str | None]:
    """Version of each distribution in `DISTRIBUTIONS`; None if it is not installed."""
    return {name: _version(name) for name in DISTRIBUTIONS}


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
