# SPDX-License-Identifier: Apache-2.0
"""The JSON schemas of docs/schemas, to hold against what the programs print."""

import json
from pathlib import Path
from typing import Any

import jsonschema

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "schemas"


def conform(text: str, name: str) -> Any:
    """The JSON in `text`, which must be as the schema `name` says."""
    value = json.loads(text)
    schema = json.loads((FOLDER / f"{name}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(value, schema, jsonschema.Draft202012Validator)
    return value
