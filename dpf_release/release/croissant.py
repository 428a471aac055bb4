"""`croissant.json`: the release for tools that read MLCommons' Croissant 1.0. Files only: it has no HDF5 records."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from dpf_release.release.manifest import FileRecord

CROISSANT = "croissant.json"
_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty", "fileSet", "format",
    "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField", "path", "recordSet", "references", "regex",
    "repeated", "replace", "samplingRate", "separator", "source", "subField", "transform",
)  # fmt: skip
# The standard one of https://github.com/mlcommons/croissant.
CONTEXT: dict[str, Any] = {term: f"cr:{term}" for term in _TERMS} | {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "sc": "https://schema.org/",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
}
ENCODINGS = {".h5": "application/x-hdf5", ".json": "application/json", ".safetensors": "application/octet-stream"}


def croissant(name: str, version: str, licence: str, description: str, files: Sequence[FileRecord]) -> dict[str, Any]:
    """The tree of `croissant.json`: the data; not itself, nor the card, nor the manifest, which lists it."""
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": name,
        "version": version,
        "license": licence,
        "description": description,
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": record.path,
                "name": record.path,
                "contentUrl": record.path,
                "contentSize": f"{record.bytes} B",
                "encodingFormat": ENCODINGS[PurePosixPath(record.path).suffix],
                "sha256": record.sha256,
            }
            for record in files
            if record.role not in {"card", "croissant"}
        ],
    }
