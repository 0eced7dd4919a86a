"""A wheel carries the experiments, for ``tensortrain reproduce``; editable installations find them in the checkout."""

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ExperimentsInWheel(BuildHookInterface):  # type: ignore[type-arg]
    """Adds ``experiments/`` as ``tensortrain/_experiments``."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by the builder; ``version`` is "standard" or "editable"."""
        if version == "standard":
            build_data["force_include"]["experiments"] = "tensortrain/_experiments"
