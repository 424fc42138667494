"""What MosaicKD is compared with: students that learn from the teacher on images of another domain, without labels.

Each is a method of labelled images whose loss is left without its labels: the teacher's response, by ``T^2 KL`` with a weight
of 1, and the method's own term with its usual weight. Balanced (Nayak et al., WACV 2021) is the first on balanced draws.
"""

from __future__ import annotations

from fastkd.methods.contrastive import CRD, SSKD
from fastkd.methods.registry import register
from fastkd.methods.relational import RKD
from fastkd.methods.representation import FitNet
from fastkd.methods.response import Hinton

__all__ = ["BASELINES"]

BASELINES = {
    "ood-kd": (Hinton, "", "student", "Hinton et al., 2015"),
    "ood-fitnet": (FitNet, ", and FitNet's hint", "student, regressor", "Romero et al., ICLR 2015"),
    "ood-rkd": (RKD, ", and the relations of RKD", "student", "Park et al., CVPR 2019"),
    "ood-crd": (CRD, ", and the contrast of CRD", "student, two embeddings", "Tian et al., ICLR 2020"),
    "ood-sskd": (SSKD, ", and the self-supervision of SSKD", "student, head of each network", "Xu et al., ECCV 2020"),
}
"""By name: the class, what it adds, what it trains, the source."""

for _name, (_kind, _adds, _trains, _paper) in BASELINES.items():
    register(
        _name,
        family="out-of-domain",
        needs=("out-of-domain images", "teacher"),
        trains=_trains,
        summary=f"``T^2 KL(teacher || student)``{_adds}, without labels.",
        paper=_paper,
        task_weight=0.0,
        kd_weight=1.0,
    )(_kind)
