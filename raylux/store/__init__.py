"""The run folder: the one place that knows Zarr.

A commit is one small manifest object, written last, that names every object it vouches for with size and
checksum. Readers trust only what a manifest names, and keys are never used twice.
"""

from raylux.store.corpus import CorpusReader, read_table, write_corpus
from raylux.store.damage import DamagedError
from raylux.store.files import Files
from raylux.store.folder import FORMAT_VERSION, Manifest, RunFolder
from raylux.store.lease import Holder, Lease, LeaseLostError, present_holder
from raylux.store.scores import CHOSEN, ESTIMATED, PILOT, ScoreBlock, answer_blocks, best_rows, score_blocks, token_rows

__all__ = [
    "CHOSEN",
    "ESTIMATED",
    "FORMAT_VERSION",
    "PILOT",
    "CorpusReader",
    "DamagedError",
    "Files",
    "Holder",
    "Lease",
    "LeaseLostError",
    "Manifest",
    "RunFolder",
    "ScoreBlock",
    "answer_blocks",
    "best_rows",
    "present_holder",
    "read_table",
    "score_blocks",
    "token_rows",
    "write_corpus",
]
