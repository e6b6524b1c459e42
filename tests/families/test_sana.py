"""What is special about SANA and Sprint."""

import torch
from helpers import family_batch, family_loss


def test_sprint_is_called_as_its_pipeline_calls_it(sprint):
    """Noise level, guidance and latents are those of the pipeline, which computes them by TrigFlow."""
    seen = []

    def note(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"], kwargs["timestep"], kwargs["guidance"]))

    batch = family_batch(sprint, 1, timesteps=torch.tensor([300]))  # sigma .7
    angle = torch.atan(torch.tensor(0.7 / 0.3))
    trig = (angle.cos() * batch.latents + angle.sin() * batch.noise) / angle.cos().square().add(angle.sin().square()).sqrt()
    with sprint.transformer.register_forward_pre_hook(note, with_kwargs=True), torch.no_grad():
        family_loss(sprint, batch)
        timesteps = {"num_inference_steps": 1, "max_timesteps": angle.item(), "intermediate_timesteps": None}
        settings = {"height": 32, "width": 32, "use_resolution_binning": False, "complex_human_instruction": None}
        sprint("a dog on the beach", latents=trig, output_type="latent", **timesteps, **settings)
    (ours, time, guidance), (its, its_time, its_guidance) = seen
    torch.testing.assert_close(ours, its, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(time, its_time, rtol=1e-5, atol=0)
    torch.testing.assert_close(guidance, its_guidance)
