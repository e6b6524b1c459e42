"""The training methods, one row each: citation, default settings, and what is trained.

They are here and not in `training/` because a model card cites the method, and `concept/` imports no other folder.
To add a method, add its row to `METHODS`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_DTI = "Directional Textual Inversion ([Kim et al., 2026](https://arxiv.org/abs/2512.13672))"


@dataclass(frozen=True)
class Method:
    """A training method: settings of `DTITrainer`.

    Args:
        summary: the text for `dti train --help`.
        citation: Markdown for the model card.
        settings: values for `DTIConfig` that take precedence over the family's defaults. The numbers are from the authors'
            training scripts.
        raw: train the raw rows with AdamW, including their norms, instead of the directions.
        contextual_start: start from the encoder's output for the initializer instead of its embedding.
    """

    summary: str
    citation: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    raw: bool = False
    contextual_start: bool = False


METHODS: dict[str, Method] = {
    "dti": Method("Directional Textual Inversion", _DTI),
    "ti": Method(
        "classic Textual Inversion: AdamW on the raw row, whose norm may drift",
        "Textual Inversion ([Gal et al., 2022](https://arxiv.org/abs/2208.01618))",
        {"learning_rate": 0.005},
        raw=True,
    ),
    "crossinit": Method(
        "the same from the encoder's output for the initializer, with a pull toward it (arXiv 2312.15905)",
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
