"""Continual-CLIP: images are compared with the names of the classes, and nothing is learned from images."""

from __future__ import annotations

from torch import Tensor

from cil.learners.bases.texts import DescribesClasses


class ZeroShot(DescribesClasses):
    """Continual-CLIP (Thengane et al., arXiv 2210.03114), with the descriptors of Menon and Vondrick (ICLR 2023).

    z_c(x) = s · cos(p(f(x)), t_c), with the text prototypes t_c of the classes seen so far, the projection p from
    features to the space that images and texts share, and CLIP's own scale s. Prediction: argmax_c z_c. Images are
    never looked at, so the final accuracy depends neither on the class order nor on the split into tasks. With
    ``descriptors``, t_c = mean_k n(encode("{class}, which has {descriptor_k}")). Keeps d numbers per class.
    """

    name = "zero_shot"
    summary = "cosine of images and class names, on a vision-language backbone (Continual-CLIP)"
    trains = "nothing"
    paper = "Thengane et al., CLIP model is an Efficient Continual Learner, 2022, arXiv 2210.03114"

    def logits(self, features: Tensor) -> Tensor:
        return self.text.logits(features)
