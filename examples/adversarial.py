"""Distillation without data, as a procedure of your own: a generator and a student, an optimizer each.

    fastkd distill --plugin examples/adversarial.py --method adversarial --data digits --teacher resnet8 --epochs 20

After Micaelli & Storkey, "Zero-shot Knowledge Transfer via Adversarial Belief Matching" (NeurIPS 2019).
"""

import torch
from torch import Tensor, nn

from fastkd.data.batch import Batches
from fastkd.functional import kl_div, logit_stats
from fastkd.methods import Part, Procedure, Step
from fastkd.methods.registry import register


class Generator(nn.Module):
    def __init__(self, latent: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.small = (32, height // 2, width // 2)
        self.first = nn.Linear(latent, 32 * (height // 2) * (width // 2))
        layers = [nn.GroupNorm(4, 32), nn.Upsample((height, width)), nn.Conv2d(32, 32, 3, padding=1)]
        self.maps = nn.Sequential(*layers, nn.LeakyReLU(0.2), nn.Conv2d(32, channels, 3, padding=1), nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        return 2.5 * self.maps(self.first(noise).unflatten(1, self.small))


@register("adversarial", family="data-free", needs=("teacher",), trains="generator, student", paper="NeurIPS 2019")
class Adversarial(Procedure):
    """The generator looks for images on which student and teacher differ; on these the student learns to agree.

    Args:
        latent: dimensions of the noise.
        student_steps: updates of the student for each of the generator.
        balance: weight of the generator's term that wants all classes equally often.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        images: Tensor,
        batch_size: int = 64,
        *,
        latent: int = 32,
        student_steps: int = 5,
        balance: float = 1.0,
    ) -> None:
        super().__init__()
        self.student, self.generator = student, Generator(latent, *images.shape[1:])
        self.freeze("teacher", teacher)
        self.batch_size, self.latent, self.student_steps, self.balance = batch_size, latent, student_steps, balance

    def parts(self) -> dict[str, Part]:
        return {
            "student": Part(self.student),
            "generator": Part(self.generator, optimizer="adam", learning_rate=1e-3, weight_decay=0.0),
        }

    def network(self) -> nn.Module:
        return self.student

    def noise(self, step: Step) -> Tensor:
        return torch.randn(self.batch_size, self.latent, device=next(self.parameters()).device)

    def iteration(self, batch: Batches, step: Step) -> dict[str, Tensor]:
        teacher = self.frozen["teacher"]
        images = self.generator(self.noise(step))
        given = teacher(images)
        unequal = -logit_stats(given.softmax(1).mean(0).log()).entropy  # least where all classes are as often
        difference = kl_div(self.student(images), given)
        step.update(self.balance * unequal - difference, "generator")
        for _ in range(self.student_steps):
            with torch.no_grad():
                images = self.generator(self.noise(step))
                given = teacher(images)
            loss = kl_div(self.student(images), given)
            step.update(loss, "student")
        return {"loss": loss, "generator_loss": -difference, "unequal_loss": unequal}
