"""What lies on disk: expert trajectories and distilled sets, in files that describe themselves."""

from dd_lightning.formats.atomic import write_atomically
from dd_lightning.formats.expert_store import ExpertAccuracies, ExpertIdentity, ExpertMetadata, ExpertStore
from dd_lightning.formats.synthetic_file import SyntheticFile, load_synthetic, save_synthetic

__all__ = [
    "ExpertAccuracies",
    "ExpertIdentity",
    "ExpertMetadata",
    "ExpertStore",
    "SyntheticFile",
    "load_synthetic",
    "save_synthetic",
    "write_atomically",
]
