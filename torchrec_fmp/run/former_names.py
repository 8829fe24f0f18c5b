"""Former places of what YAML names by class, so that the config of an old run still loads."""

from __future__ import annotations

# Former module -> where its classes are now.
FORMER_MODULES = {
    "torchrec_fmp.policies": "torchrec_fmp.selection.policies",
    "torchrec_fmp.schedules": "torchrec_fmp.selection.schedules",
    "torchrec_fmp.scores": "torchrec_fmp.scorers",
}
