"""Adds the extension of JupyterLab to the wheel: ``share/jupyter/labextensions/llm-magic``."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_FOLDER = "share/jupyter/labextensions/llm-magic"


class LabExtension(BuildHookInterface[Any]):
    """Writes the metadata of the extension, whose version and license are those of the package."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Add the files of the extension to the data files of the wheel."""
        core = self.metadata.core
        # With the version in its name, no browser uses the file of an earlier one.
        script = f"static/llm_magic.{self.metadata.version}.js"
        package = {
            "name": "llm-magic",
            "version": self.metadata.version,
            "description": "Highlights prompts of llm_magic, completes outputs after a reload, and removes"
            " password boxes that nothing reads.",
            "license": core.license_expression,
            "jupyterlab": {
                "extension": True,
                "_build": {"load": script, "extension": "./extension"},
            },
        }
        install = {"packageManager": "python", "packageName": core.raw_name}
        self._folder = tempfile.TemporaryDirectory()
        for name, content in (("package.json", package), ("install.json", install)):
            file = Path(self._folder.name, name)
            file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            build_data["shared_data"][str(file)] = f"{_FOLDER}/{name}"
        build_data["shared_data"]["labextension/llm_magic.js"] = f"{_FOLDER}/{script}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the metadata, which the wheel contains now."""
        self._folder.cleanup()
