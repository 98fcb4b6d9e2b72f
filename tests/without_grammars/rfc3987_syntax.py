"""Replaces the package with which jsonschema checks IRIs: no notebook and no setting here has one.

The package makes 38 parsers when it is imported. jsonschema does without it where the import fails.
"""

from __future__ import annotations

raise ImportError("The import of rfc3987_syntax takes too long for tests.")
