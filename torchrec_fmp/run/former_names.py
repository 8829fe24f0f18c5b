"""Former modules of classes that YAML names, so that the config of an old run still loads."""

from __future__ import annotations

# Former module -> present module of its classes.
FORMER_MODULES = {
    "torchrec_fmp.policies": "torchrec_fmp.selection.policies",
    "torchrec_fmp.schedules": "torchrec_fmp.selection.schedules",
    "torchrec_fmp.scores": "torchrec_fmp.scorers",
}
