"""Makes the agent's bundle for a wheel, so that the server in it can give the agent to hosts."""

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUNDLE = "server/fleetwire_server/deploy/bundle/fleetwire-agent.pyz"


class AgentBundleHook(BuildHookInterface[Any]):
    """Runs what scripts/build-agent runs. Not for editable installs, whose tree scripts/build-agent itself fills."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        root = Path(self.root)
        sys.path.insert(0, str(root / "scripts/lib"))
        from build_agent import build_bundle  # type: ignore[import-not-found]

        build_bundle(root, root / BUNDLE)
        build_data["artifacts"].append(BUNDLE)
