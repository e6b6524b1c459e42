"""The training methods, one row each: what a model card cites, what the settings default to, what is trained.

They are here, not in `training/`, because a model card names the method and `concept/` imports no other folder.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_DTI = "Directional Textual Inversion ([Kim et al., 2026](https://arxiv.org/abs/2512.13672))"


@dataclass(frozen=True)
class Method:
    """A training method: settings of the one trainer.

    Args:
        summary: what `dti train --help` says.
        citation: Markdown, what a model card says.
        settings: defaults of `DTIConfig`, before those of the family. Figures are the authors' (their launchers).
        raw: whether the raw rows are trained by AdamW, norms and all, instead of their directions.
        contextual_start: whether training starts from the encoder's output for the initializer, instead of its row.
    """

    summary: str
    citation: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    contextual_start: bool = False


METHODS: dict[str, Method] = {
    "dti": Method("Directional Textual Inversion", _DTI),
    "ti": Method(
        "classic Textual Inversion, AdamW on the raw row, whose norm may drift",
        "Textual Inversion ([Gal et al., 2022](https://arxiv.org/abs/2208.01618))",
        {"learning_rate": 0.005},
        raw=True,
    ),
    "crossinit": Method(
        "the same from the encoder's output for the initializer, with a pull to it (arXiv 2312.15905)",
        "CrossInit ([Pang et al., 2023](https://arxiv.org/abs/2312.15905))",
        {"learning_rate": 0.005, "reg_lambda": 1e-5},
        raw=True,
        contextual_start=True,
    ),
    "dco": Method(
        "DTI together with a LoRA trained by Direct Consistency Optimization (arXiv 2402.12004)",
        f"{_DTI}, with a LoRA by Direct Consistency Optimization ([Lee et al., 2024](https://arxiv.org/abs/2402.12004))",
        {"adapter": "lora", "dco_beta": 1000.0, "max_train_steps": 250},
    ),
    "oft": Method(
        "DTI together with Orthogonal Finetuning (arXiv 2306.07280)",
        f"{_DTI}, with Orthogonal Finetuning ([Qiu et al., 2023](https://arxiv.org/abs/2306.07280))",
        {"adapter": "oft", "max_train_steps": 150},
    ),
}
