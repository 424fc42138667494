"""Attention transfer in a loop of your own, on scikit-learn's digits: `python examples/own_loop.py`, seconds on a CPU."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812

from fastkd.data.digits import image_sets
from fastkd.methods import AT, FeatureTap
from fastkd.models.convnet import ConvNet
from fastkd.training import evaluate


def shuffled(count: int, epochs: int) -> Iterator[torch.Tensor]:
    for _ in range(epochs):
        yield from torch.randperm(count).split(128)


def main(epochs: int = 8) -> dict[str, float]:
    train, test = image_sets()
    images, target = train.normalised(), train.target

    teacher = ConvNet((32, 64), seed=0)
    optimizer = torch.optim.AdamW(teacher.parameters(), 3e-3)
    for batch in shuffled(len(target), epochs):
        optimizer.zero_grad()
        F.cross_entropy(teacher(images[batch]), target[batch]).backward()
        optimizer.step()

    student = ConvNet((8, 16), seed=1)
    stages = ["features.3", "features.7"]  # as named_modules() calls them
    method = AT(stages, feature_weight=100.0)
    student_tap = FeatureTap(student, method.layers)
    teacher_tap = FeatureTap(teacher.eval(), method.teacher_layers)
    optimizer = torch.optim.AdamW([*student.parameters(), *method.parameters()], 3e-3)
    for batch in shuffled(len(target), epochs):
        with torch.no_grad():
            given = teacher_tap(images[batch])
        loss = method(student_tap(images[batch]), given, target[batch])
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    print({name: round(term.item(), 4) for name, term in loss.terms.items()})  # of the last batch

    networks = {"teacher": teacher, "student": student}
    return {
        name: evaluate(network, test.normalised(), test.target)["test_accuracy"] for name, network in networks.items()
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    print(main())
