"""The methods: what each asks of the images, and how the student learns on them.

Weights are those of the authors' code, where it is public. Logarithms here are natural: DAFL's log10 is in its weight.
"""

from __future__ import annotations

import math

from fastkd.methods.datafree.procedure import DataFree
from fastkd.methods.registry import register

NEEDS = ("teacher",)
DAFL_BALANCE = 5.0 / math.log(10.0)

register(
    "ta-dfkd",
    summary="Hard images, of which the student learns only those that the teacher is confident of.",
    family="data-free",
    needs=NEEDS,
    trains="generator, student",
    paper="Shin & Choi, AAAI 2024",
    adversarial=1.0,
    bn_statistics=10.0,
    total_variation=1.5e-5,
    l2=6e-3,
    select=True,
    distance="l1",
    student_steps=10,
    latent=1000,
)(DataFree)

register(
    "dafl",
    summary="Images that the teacher is sure of, of all classes alike, that excite its features.",
    family="data-free",
    needs=NEEDS,
    trains="generator, student",
    paper="Chen et al., ICCV 2019",
    class_prior=1.0,
    balance=DAFL_BALANCE,
    activation=0.1,
    share_images=True,
    latent=1000,
)(DataFree)

register(
    "dfad",
    summary="Images on which student and teacher differ, and nothing else.",
    family="data-free",
    needs=NEEDS,
    trains="generator, student",
    paper="Fang et al., 2019",
    adversarial=1.0,
    adversary="l1",
    distance="l1",
    student_steps=5,
)(DataFree)

register(
    "zskt",
    summary="As DFAD, by the KL divergence, and the student learns the teacher's attention maps, too.",
    family="data-free",
    needs=NEEDS,
    trains="generator, student",
    paper="Micaelli & Storkey, NeurIPS 2019",
    adversarial=1.0,
    adversary="kl",
    attention=250.0,
    student_steps=7,
    latent=100,
)(DataFree)

register(
    "dfq",
    summary="Images of the teacher's statistics that it is sure of and the student is not, of all classes alike.",
    family="data-free",
    needs=NEEDS,
    trains="generator, student",
    paper="Choi et al., CVPR workshops 2020",
    adversarial=1.0,
    adversary="kl",
    class_prior=1.0,
    balance=20.0,
    bn_statistics=1.0,
    share_images=True,
)(DataFree)

register(
    "deep-inversion",
    summary="Pixels themselves, towards the teacher's statistics and a class each, on which the student differs (ADI).",
    family="data-free",
    needs=NEEDS,
    trains="pixels, student",
    paper="Yin et al., CVPR 2020",
    adversarial=1.0,
    class_prior=1.0,
    ask_classes=True,
    bn_statistics=10.0,
    total_variation=2.5e-5,
    l2=3e-8,
    source="pixels",
    jitter=2,
    memory="bank",
    generator_steps=200,
    student_steps=50,
    generator_learning_rate=0.1,
)(DataFree)

register(
    "cmi",
    summary="Batches of the teacher's statistics by a generator each, told from all images made before.",
    family="data-free",
    needs=NEEDS,
    trains="generator, latents, head, student",
    paper="Fang et al., IJCAI 2021",
    adversarial=0.5,
    adversary="kl",
    agreed_only=True,
    class_prior=0.5,
    ask_classes=True,
    bn_statistics=1.0,
    contrast=0.8,
    source="latents",
    renew=1,
    memory="bank",
    generator_steps=200,
    student_steps=50,
    generator_betas=(0.5, 0.999),
)(DataFree)

register(
    "pre-dfkd",
    summary="As DAFL, on images on which the student differs, beside a memory that makes those of earlier epochs.",
    family="data-free",
    needs=NEEDS,
    trains="generator, memory, student",
    paper="Binici et al., AAAI 2022",
    adversarial=1.0,
    class_prior=1.0,
    balance=DAFL_BALANCE,
    activation=0.1,
    distance="l1",
    memory="replay",
    latent=1000,
)(DataFree)

register(
    "nayer",
    summary="As CMI, with a generator that goes on for some batches, and fresh noise for each class and image.",
    family="data-free",
    needs=NEEDS,
    trains="generator, noise layer, student",
    paper="Tran et al., CVPR 2024",
    adversarial=1.33,
    adversary="kl",
    agreed_only=True,
    class_prior=0.5,
    ask_classes=True,
    bn_statistics=10.0,
    source="latents",
    renew=10,
    memory="bank",
    generator_steps=40,
    student_steps=50,
    generator_learning_rate=4e-3,
    generator_betas=(0.5, 0.999),
)(DataFree)
