"""What the flow matching families share: the straight path from latents to noise, and its velocity as the target."""

from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from ..training.samples import Batch
from .objective import squared_error

PREDICTION_TYPES = ("flow_prediction", "trigflow")


def training_scheduler(pipe: Any) -> FlowMatchEulerDiscreteScheduler:
    """Sigmas in even steps from 1 down to 1/1000. A sampler's `flow_shift` plays no part, as in the authors' training; the
    `shift` of schedulers made for flow matching does.

    Raises:
        ValueError: for schedulers that are not made for flow matching.
    """
    config = pipe.scheduler.config
    flow = type(pipe.scheduler).__name__.startswith("FlowMatch")
    if not flow and config.get("prediction_type") not in PREDICTION_TYPES:
        raise ValueError(
            f"{type(pipe.scheduler).__name__} with prediction_type {config.get('prediction_type')!r} is no scheduler for flow "
            "matching: give the pipeline the one that its model was trained with."
        )
    return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.get("shift", 1.0) if flow else 1.0)


def noisy_latents(scheduler: FlowMatchEulerDiscreteScheduler, batch: Batch) -> tuple[Tensor, Tensor]:
    """(1 - sigma) latents + sigma noise, and the sigmas, (n,); `batch.timesteps` count them from sigma 1 downwards."""
    sigmas = scheduler.sigmas.to(batch.latents.device)[batch.timesteps]
    at = sigmas.view(-1, *[1] * (batch.latents.ndim - 1))
    return (1 - at) * batch.latents + at * batch.noise, sigmas


def error(prediction: Tensor, batch: Batch) -> Tensor:
    """Squared error of a predicted velocity, of which noise - latents is the truth; all sigmas count alike."""
    return squared_error(prediction, batch.noise - batch.latents, batch)
