"""Short digests that tell one state of an input from another."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from raylux import sources
from raylux.errors import UserError
from raylux.queries import Query

_BLOCK = 1 << 22


def of_file(path: Path) -> str:
    """BLAKE2b of a file's bytes, 16 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def of_source(path: str) -> dict[str, Any]:
    """Of a corpus as a config names it: the digest of local files, only the name of what lies elsewhere."""
    where = sources.resolve(path)
    if sources.is_url(where):
        return {"path": path}
    try:
        files = sources.find_files(where)
    except UserError:
        return {"path": path}
    digest = hashlib.blake2b(digest_size=8)
    for file in files:
        digest.update(of_file(Path(file.path)).encode())
    return {"path": path, "files": len(files), "content": digest.hexdigest()}


def of_model(folder: str) -> dict[str, str]:
    """Of each file of a model folder that decides its numbers: file name -> digest."""
    files = sorted(path for pattern in ("config.json", "*.safetensors") for path in Path(folder).glob(pattern))
    return {path.name: of_file(path) for path in files}


def of_query(query: Query) -> str:
    """Of what is computed for a query: its parts' tokens, labels and weights."""
    digest = hashlib.blake2b(query.measurement.encode(), digest_size=8)
    for part in query.parts:
        digest.update(f"{part.tokens.tolist()} {part.labels.tolist()} {part.weight}".encode())
    return digest.hexdigest()
