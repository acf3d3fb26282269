"""The JSON Schema of manifest.json, generated from the structs.

The committed copy in `schema/` is for other languages and for editors; a test holds it to
what `render_schema` gives. Write it again with `python -m evermind_manifests.schema`.
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from .manifest import SCHEMA, Manifest

SCHEMA_PATH = Path(__file__).parent / "schema" / "evermind.package-1.schema.json"


def render_schema() -> bytes:
    """The schema as JSON, with sorted keys and a newline at the end."""
    schema = msgspec.json.schema(Manifest)
    described = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:{SCHEMA.replace('/', ':')}",
        "title": SCHEMA,
    }
    return json.dumps(described | schema, indent=2, sort_keys=True).encode() + b"\n"


if __name__ == "__main__":
    SCHEMA_PATH.write_bytes(render_schema())
