"""What was exported -> README.md, the model card that goes with it."""

from __future__ import annotations

from pathlib import Path

from dianjing import __version__
from dianjing.export.receipt import Proof
from dianjing.use.generate import Seer


def write_card(seer: Seer, folder: Path, format: str, loading: str, proof: Proof) -> None:
    """Write README.md: how the model was made, how it is loaded, how far it equals its run."""
    lines = [
        f"# {Path(seer.name).name}",
        "",
        f"A LLaVA, written by Dianjing {__version__} as `{format}`.",
        "",
        "## Loading",
        "",
        loading.strip(),
        "",
        "## Parity",
        "",
        f"{proof.compared}: logits within {proof.max_logit_difference:.1e} on {len(proof.cases)} conversations "
        "(`parity.json`).",
    ]
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
