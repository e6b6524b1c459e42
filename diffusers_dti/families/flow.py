"""Flow matching: the straight path from latents to noise, with its velocity as the target."""

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .base import Batch, Family

PREDICTION_TYPES = ("flow_prediction", "trigflow")


class FlowFamily(Family):
    """Share what the flow matching families have in common. All noise levels have the same weight."""

    scheduler: FlowMatchEulerDiscreteScheduler

    def training_scheduler(self) -> FlowMatchEulerDiscreteScheduler:
        """Return sigmas in even steps from 1 down to 1/1000.

        The `flow_shift` of a sampler is ignored, as in the authors' training. The `shift` of a scheduler that is made for flow
        matching is kept.
        """
        scheduler, config = self.pipe.scheduler, self.pipe.scheduler.config
        flow = type(scheduler).__name__.startswith("FlowMatch")
        if not flow and config.get("prediction_type") not in PREDICTION_TYPES:
            raise ValueError(
                f"{type(scheduler).__name__} with prediction_type {config.get('prediction_type')!r} is not a scheduler for "
                "flow matching: give the pipeline the one that its model was trained with."
            )
        return FlowMatchEulerDiscreteScheduler(config.num_train_timesteps, shift=config.get("shift", 1.0) if flow else 1.0)

    def noisy_latents(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return (1 - sigma) latents + sigma noise, and the sigmas, (n,). `batch.timesteps` count down from sigma 1."""
        sigmas = self.scheduler.sigmas.to(batch.latents.device, non_blocking=True)[batch.timesteps]
        at = sigmas.view(-1, *[1] * (batch.latents.ndim - 1))
        return (1 - at) * batch.latents + at * batch.noise, sigmas

    def target(self, batch: Batch) -> Tensor:
        return batch.noise - batch.latents
